"""Edits of images by instructions: InstructPix2Pix, as published."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from cm3leon.data.file_source import BadRecord, parse_object
from cm3leon.data.instructions.base import Example, InstructionConfig, InstructionSource, read_json
from cm3leon.registry import SOURCES
from cm3leon.types import UserError


@SOURCES.register("instruct_pix2pix")
class InstructPix2PixSource(InstructionSource):
    """InstructPix2Pix: seeds.json lists folders with their seeds, and each folder has a prompt.json
    and pairs of images.

    `path` is seeds.json. A pair is `{seed}_0.jpg` before the edit and `{seed}_1.jpg` after it. One
    seed is drawn for each folder.
    """

    task = "edit"

    Config = InstructionConfig

    def entries(self) -> list[Any]:
        content = read_json(self.files, "data.path")
        if not isinstance(content, list):
            raise UserError(
                f"data.path: {self.config.path} is not a JSON list; give InstructPix2Pix's "
                "seeds.json"
            )
        return content

    def example(self, entry: Any, rng: Random) -> Example:
        if not (
            isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and entry[1]
        ):
            raise BadRecord("not a pair of a folder and its seeds")
        folder, seeds = entry
        seed = seeds[int(rng.random() * len(seeds))]
        prompt = parse_object(self.image(f"{folder}/prompt.json")(), "prompt.json")
        if not isinstance(prompt, Mapping):
            raise BadRecord("prompt.json is no object")
        values = {
            "instruction": self.words(prompt.get("edit"), "the instruction"),
            "image1": self.image(f"{folder}/{seed}_0.jpg"),
            "image2": self.image(f"{folder}/{seed}_1.jpg"),
        }
        return Example(f"edit-{folder}-{seed}", values)
