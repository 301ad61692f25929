"""Images with the words that are written in them: TextOCR, COCO-Text."""

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
    """TextOCR's and COCO-Text's JSON: `imgs`, `anns` with `utf8_string` and a box, `imgToAnns`.

    The words of an image are read line by line, those that are too small or unreadable ("." in
    TextOCR) are left out.
    """

    task = "write"

    @dataclass(kw_only=True)
    class Config(InstructionConfig):
        """Which words."""

        least_height: Probability = 0.04
        """Words lower than this share of the image are left out: nothing could be read of them."""
        most: PositiveInt = 8
        """Words of an image that are asked for; images with more are left out."""

    config: Config

    def entries(self) -> list[Any]:
        content = read_json(self.files, "data.path")
        if not isinstance(content, Mapping):
            content = {}
        images, words = content.get("imgs"), content.get("anns")
        if not isinstance(images, Mapping) or not isinstance(words, Mapping):
            raise UserError(
                f"data.path: {self.config.path} has no imgs and anns; give TextOCR's or COCO-Text's JSON"
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
            if isinstance(word.get("utf8_string"), str)
            and word["utf8_string"].strip() not in ("", ".")
            and word.get("legibility", "legible") == "legible"
            and isinstance(word.get("bbox"), list)
            and len(word["bbox"]) == 4
            and word["bbox"][3] >= self.config.least_height * height
        ]
        if not 0 < len(read) <= self.config.most:
            raise BadRecord(f"{len(read)} readable words, from 1 to {self.config.most} are used")
        text = self.words(" ".join(in_reading_order(read)), "the text")
        return Example(f"ocr-{id_}", {"text": text, "image": self.image(image.get("file_name"))})


def in_reading_order(words: list[tuple[list[float], str]]) -> list[str]:
    """Words line by line, each from left to right; boxes are [left, top, width, height]."""
    lines: list[list[tuple[list[float], str]]] = []
    for box, text in sorted(words, key=lambda word: word[0][1] + word[0][3] / 2):
        middle = box[1] + box[3] / 2
        last = lines[-1][-1][0] if lines else None
        if last is not None and last[1] <= middle <= last[1] + last[3]:
            lines[-1].append((box, text))
        else:
            lines.append([(box, text)])
    return [text for line in lines for _, text in sorted(line, key=lambda word: word[0][0])]
