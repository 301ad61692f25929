"""Which prompts `generate` draws, and where their images lie: its own layout, and those that benchmarks read.

    plain     00000_0.png, 00000_1.png ...                                              for a file with a text a line
    geneval   images/00000/metadata.jsonl, images/00000/samples/0000.png, 0001.png ...  for evaluation_metadata.jsonl
    dpg       images/NAME.png, four images in two rows                                  for a folder of NAME.txt

The folder images/ has nothing else in it: a benchmark takes whatever it finds for its own.
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
"""Folder that a benchmark is given."""


@dataclass(frozen=True)
class Prompt:
    """A text to draw."""

    text: str
    origin: str
    """What messages call it."""
    name: str
    """What its files are called."""
    line: str = ""
    """What its benchmark has to say of it."""


class Layout:
    """`generate`'s own: a file an image."""

    counts: tuple[int, ...] | None = None
    """Images that a prompt may have; None = any number."""

    def prompts(self, path: Path) -> list[Prompt]:
        """The texts of a file, one a line.

        A line ends at a line feed and nothing else. Other separators of lines, the carriage return before it and a
        byte order mark are no part of a prompt.

        Raises:
            UserError: for what cannot be read, or has no text.
        """
        found: list[Prompt] = []
        for number, line in _lines(path):
            found.append(Prompt(line, f"{path}, line {number}", f"{len(found):05d}"))
        return found

    def folder(self, out: Path) -> Path:
        """Where the images lie."""
        return out

    def image_files(self, prompt: Prompt, count: int) -> list[str]:
        """The file of each of a prompt's images, below `folder`."""
        return [f"{prompt.name}_{place}.png" for place in range(count)]

    def files(self, prompt: Prompt, count: int) -> set[str]:
        """All files of a prompt, below `folder`."""
        return set(self.image_files(prompt, count))

    def write(self, folder: Path, prompt: Prompt, images: Sequence[Image.Image]) -> None:
        """Write the files of a prompt."""
        for name, image in zip(self.image_files(prompt, len(images)), images, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / name)

    def told(self, folder: Path, size: tuple[int, int], count: int) -> str:
        """What there is to say of the images: their folder, and how a benchmark is started."""
        return f"images: {folder}"


class GenEval(Layout):
    """A folder a prompt, by the number of its line from 0, with that line beside the samples."""

    def prompts(self, path: Path) -> list[Prompt]:
        """The prompts of a file with a JSON object a line, whose `prompt` is drawn.

        Raises:
            UserError: for what cannot be read, has no line, or a line without a prompt.
        """
        found: list[Prompt] = []
        for number, line in _lines(path):
            origin = f"{path}, line {number}"
            try:
                entry = json.loads(line)
                text = entry["prompt"].strip()
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(
                    f'prompts: {origin} is not a line of GenEval, such as {{"tag": "single_object", "prompt": '
                    '"a photo of a bench"}'
                ) from error
            if not text:
                raise UserError(f"prompts: {origin} has an empty prompt")
            found.append(Prompt(text, origin, f"{len(found):05d}", line))
        return found

    def folder(self, out: Path) -> Path:
        return out / IMAGES

    def image_files(self, prompt: Prompt, count: int) -> list[str]:
        return [f"{prompt.name}/samples/{place:04d}.png" for place in range(count)]

    def files(self, prompt: Prompt, count: int) -> set[str]:
        return {*super().files(prompt, count), self._metadata(prompt)}

    def write(self, folder: Path, prompt: Prompt, images: Sequence[Image.Image]) -> None:
        super().write(folder, prompt, images)
        (folder / self._metadata(prompt)).write_text(f"{prompt.line}\n", encoding="utf-8")

    def told(self, folder: Path, size: tuple[int, int], count: int) -> str:
        return f"{super().told(folder, size, count)}\nGenEval: python evaluation/evaluate_images.py {folder}"

    def _metadata(self, prompt: Prompt) -> str:
        return f"{prompt.name}/metadata.jsonl"


class DpgBench(Layout):
    """An image a prompt, named as its file: one sample, or four of them in two rows."""

    counts = (1, 4)

    def prompts(self, path: Path) -> list[Prompt]:
        """The texts of a folder of .txt files, by their names.

        Raises:
            UserError: for what is no such folder, a file that cannot be read, or one without a text.
        """
        files = sorted(path.glob("*.txt"))
        if not files:
            raise UserError(
                f"prompts: {path} must be a folder of .txt files for layout=dpg, such as dpg_bench/prompts"
            )
        found = []
        for file in files:
            lines = [line for _, line in _lines(file)]
            found.append(Prompt(" ".join(lines), str(file), file.stem))
        return found

    def folder(self, out: Path) -> Path:
        return out / IMAGES

    def image_files(self, prompt: Prompt, count: int) -> list[str]:
        return [f"{prompt.name}.png"] * count

    def write(self, folder: Path, prompt: Prompt, images: Sequence[Image.Image]) -> None:
        width, height = images[0].size
        across = 1 if len(images) == 1 else 2
        grid = Image.new("RGB", (across * width, across * height))
        for place, image in enumerate(images):
            grid.paste(image, (place % across * width, place // across * height))
        super().write(folder, prompt, [grid])

    def told(self, folder: Path, size: tuple[int, int], count: int) -> str:
        command = f"PIC_NUM={count} bash dpg_bench/dist_eval.sh {folder} {size[0]}"
        return f"{super().told(folder, size, count)}\nDPG-Bench, resolution {size[0]}: {command}"


LAYOUTS: dict[str, Layout] = {"plain": Layout(), "geneval": GenEval(), "dpg": DpgBench()}
"""By the names that users give them."""


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that have a text, with their numbers from 1."""
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
