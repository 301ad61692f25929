"""Images with words written in them, to be generated with these words: TextOCR and COCO-Text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from cm3leon.config import PositiveInt, Probability
from cm3leon.data.file_source import BadRecord
from cm3leon.data.instructions.base import Example, InstructionConfig, InstructionSource, read_json
from cm3leon.registry import SOURCES
from cm3leon.types import UserError


@SOURCES.register("ocr")
class OcrSource(InstructionSource):
    """TextOCR's and COCO-Text's JSON: `imgs`, and `anns` with `utf8_string` and a box.

    The words of an image are read line by line. Words that are too small or unreadable ("." in
    TextOCR) are left out.
    """

    task = "write"

    @dataclass(kw_only=True)
    class Config(InstructionConfig):
        """Where the file and the images are, and which words are used."""

        least_height: Probability = 0.04
        """Words lower than this share of the image's height are left out, as too small to read."""
        most: PositiveInt = 8
        """Most words of an image; images with more are left out."""

    config: Config

    def entries(self) -> list[Any]:
        content = read_json(self.files, "data.path")
        if not isinstance(content, Mapping):
            content = {}
        images, words = content.get("imgs"), content.get("anns")
        if not isinstance(images, Mapping) or not isinstance(words, Mapping):
            raise UserError(
                f"data.path: {self.config.path} has no imgs and anns; give TextOCR's or "
                "COCO-Text's JSON"
            )

        of_image: dict[str, list[Any]] = {}
        for word in words.values():
            if isinstance(word, Mapping):
                of_image.setdefault(str(word.get("image_id")), []).append(word)
        return [(id_, image, of_image.get(str(id_), [])) for id_, image in images.items()]

    def example(self, entry: Any, rng: Random) -> Example:
        id_, image, words = entry
        height = image.get("height") if isinstance(image, Mapping) else None
        if not isinstance(height, (int, float)) or height <= 0:
            raise BadRecord("the image has no height")

        read = [
            (word["bbox"], word["utf8_string"].strip())
            for word in words
            if self._is_used(word, height)
        ]
        if not 0 < len(read) <= self.config.most:
            raise BadRecord(f"{len(read)} readable words, from 1 to {self.config.most} are used")
        text = self.words(" ".join(in_reading_order(read)), "the text")
        return Example(f"ocr-{id_}", {"text": text, "image": self.image(image.get("file_name"))})

    def _is_used(self, word: Mapping[str, Any], height: float) -> bool:
        """Whether a word of an image of that height is written down, legible and large enough."""
        text, box = word.get("utf8_string"), word.get("bbox")
        if not isinstance(text, str) or text.strip() in ("", "."):
            return False
        if word.get("legibility", "legible") != "legible":
            return False
        if not isinstance(box, list) or len(box) != 4:
            return False
        return bool(box[3] >= self.config.least_height * height)


def in_reading_order(words: list[tuple[list[float], str]]) -> list[str]:
    """Order words line by line, and in a line from left to right. A box is [left, top, width,
    height]; a word is on the line of the last one if its middle is within that one's height."""
    lines: list[list[tuple[list[float], str]]] = []
    for box, text in sorted(words, key=lambda word: word[0][1] + word[0][3] / 2):
        middle = box[1] + box[3] / 2
        last = lines[-1][-1][0] if lines else None
        if last is not None and last[1] <= middle <= last[1] + last[3]:
            lines[-1].append((box, text))
        else:
            lines.append([(box, text)])
    ordered: list[str] = []
    for line in lines:
        ordered += [text for _, text in sorted(line, key=lambda word: word[0][0])]
    return ordered
