"""Which prompts `generate` draws, and where it writes their images: the plain layout and two
benchmarks'.

    layout    prompts                     images
    plain     a file with a text a line   00000_0.png, 00000_1.png ...
    geneval   evaluation_metadata.jsonl   images/00000/samples/0000.png, 0001.png ...,
                                          images/00000/metadata.jsonl
    dpg       a folder of NAME.txt        images/NAME.png, four images in two rows

The folder images/ holds nothing else, since a benchmark takes every file there for its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cm3leon.types import UserError

_SEPARATORS = re.compile("[\\r\\v\\f\\x1c-\\x1e\\x85\\u2028\\u2029]+")
IMAGES = "images"
"""The folder that is given to a benchmark's own script."""


@dataclass(frozen=True)
class TextPrompt:
    """A text to draw."""

    text: str
    origin: str
    """Where it came from, for messages: `prompts.txt, line 3`."""
    name: str
    """What its files' names begin with."""
    line: str = ""
    """The line of GenEval's file that it stands in."""


class ImageLayout:
    """The plain layout: a file for each image."""

    counts: tuple[int, ...] | None = None
    """How many images a prompt may have; None = any number."""

    def prompts(self, path: Path) -> list[TextPrompt]:
        """The texts of a file, one a line.

        Only a line feed ends a line. Other line separators, a carriage return before it and a byte
        order mark do not become part of a prompt.

        Raises:
            UserError: for a file that cannot be read or has no text.
        """
        found: list[TextPrompt] = []
        for number, line in _lines(path):
            found.append(TextPrompt(line, f"{path}, line {number}", f"{len(found):05d}"))
        return found

    def folder(self, out: Path) -> Path:
        """The folder that the images are written to."""
        return out

    def image_files(self, prompt: TextPrompt, count: int) -> list[str]:
        """The file of each of a prompt's images, below `folder`."""
        return [f"{prompt.name}_{index}.png" for index in range(count)]

    def files(self, prompt: TextPrompt, count: int) -> set[str]:
        """All files of a prompt, below `folder`."""
        return set(self.image_files(prompt, count))

    def write(self, folder: Path, prompt: TextPrompt, images: Sequence[Image.Image]) -> None:
        """Write the files of a prompt."""
        for name, image in zip(self.image_files(prompt, len(images)), images, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / name)

    def told(self, folder: Path, size: tuple[int, int], count: int) -> str:
        """What is printed at the end: the folder, and the command that starts the benchmark."""
        return f"images: {folder}"


class GenEval(ImageLayout):
    """A folder for each prompt, by its index from 0, with its line of the file beside the
    samples."""

    def prompts(self, path: Path) -> list[TextPrompt]:
        """The prompts of a file with a JSON object a line, whose `prompt` is drawn.

        Raises:
            UserError: for a file that cannot be read or is empty, or a line without a prompt.
        """
        found: list[TextPrompt] = []
        for number, line in _lines(path):
            origin = f"{path}, line {number}"
            try:
                entry = json.loads(line)
                text = entry["prompt"].strip()
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(
                    f"prompts: {origin} is not a line of GenEval, such as "
                    '{"tag": "single_object", "prompt": "a photo of a bench"}'
                ) from error
            if not text:
                raise UserError(f"prompts: {origin} has an empty prompt")
            found.append(TextPrompt(text, origin, f"{len(found):05d}", line))
        return found

    def folder(self, out: Path) -> Path:
        return out / IMAGES

    def image_files(self, prompt: TextPrompt, count: int) -> list[str]:
        return [f"{prompt.name}/samples/{index:04d}.png" for index in range(count)]

    def files(self, prompt: TextPrompt, count: int) -> set[str]:
        return {*super().files(prompt, count), self._metadata(prompt)}

    def write(self, folder: Path, prompt: TextPrompt, images: Sequence[Image.Image]) -> None:
        super().write(folder, prompt, images)
        (folder / self._metadata(prompt)).write_text(f"{prompt.line}\n", encoding="utf-8")

    def told(self, folder: Path, size: tuple[int, int], count: int) -> str:
        command = f"python evaluation/evaluate_images.py {folder}"
        return f"{super().told(folder, size, count)}\nGenEval: {command}"

    def _metadata(self, prompt: TextPrompt) -> str:
        return f"{prompt.name}/metadata.jsonl"


class DpgBench(ImageLayout):
    """One image for each prompt, named after its file: a sample, or four samples in two rows."""

    counts = (1, 4)

    def prompts(self, path: Path) -> list[TextPrompt]:
        """The texts of a folder of .txt files, by their names.

        Raises:
            UserError: for a path that is not such a folder, or a file that cannot be read or has no
                text.
        """
        files = sorted(path.glob("*.txt"))
        if not files:
            raise UserError(
                f"prompts: {path} must be a folder of .txt files for layout=dpg, "
                "such as dpg_bench/prompts"
            )
        found = []
        for file in files:
            lines = [line for _, line in _lines(file)]
            found.append(TextPrompt(" ".join(lines), str(file), file.stem))
        return found

    def folder(self, out: Path) -> Path:
        return out / IMAGES

    def image_files(self, prompt: TextPrompt, count: int) -> list[str]:
        return [f"{prompt.name}.png"] * count

    def write(self, folder: Path, prompt: TextPrompt, images: Sequence[Image.Image]) -> None:
        width, height = images[0].size
        across = 1 if len(images) == 1 else 2
        grid = Image.new("RGB", (across * width, across * height))
        for index, image in enumerate(images):
            grid.paste(image, (index % across * width, index // across * height))
        super().write(folder, prompt, [grid])

    def told(self, folder: Path, size: tuple[int, int], count: int) -> str:
        command = f"PIC_NUM={count} bash dpg_bench/dist_eval.sh {folder} {size[0]}"
        return f"{super().told(folder, size, count)}\nDPG-Bench, resolution {size[0]}: {command}"


LAYOUTS: dict[str, ImageLayout] = {"plain": ImageLayout(), "geneval": GenEval(), "dpg": DpgBench()}
"""By the names that users give them."""


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers from 1.

    Raises:
        UserError: for a file that cannot be read, or in which every line is empty.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: {path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if text := _SEPARATORS.sub(" ", line).strip():
            found.append((number, text))
    if not found:
        raise UserError(f"prompts: {path} has no line with a text")
    return found
