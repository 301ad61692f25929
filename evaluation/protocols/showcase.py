"""Prompts to look at: the showcase of a model (the paper's figures 1, 5 to 7, 12 to 16, and
appendix A)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.config import PositiveInt, choices
from cm3leon.data.images import UnusableImage, read_image
from cm3leon.data.instructions.templates import FEATURES, ROLES, TABLE_5, fill_with_pixels
from cm3leon.evaluation.metrics import Measured, average
from cm3leon.evaluation.protocols.base import MAX_TOKENS, Answer, Item, Protocol, clip_score
from cm3leon.io import digest_of_parts
from cm3leon.registry import PROTOCOLS
from cm3leon.types import Document, TextSegment, UserError

SLOTS = {
    "text_to_image": ("text",),
    "edit": ("image1", "instruction"),
    "write": ("text",),
    "grounded": ("caption", "objects"),
    "features": ("feature", "feature_image", "caption"),
    "caption": ("image",),
    "paragraph": ("image",),
    "vqa": ("image", "question"),
}
"""What a prompt gives, by task."""
IN_TEXT = ("caption", "paragraph", "vqa")
IMAGES = ("image", "image1", "feature_image")
"""Slots that hold paths of images."""


@PROTOCOLS.register("showcase")
class Showcase(Protocol):
    """Prompts of one task, each with what is given for it.

    There are no true answers, and the result is to be looked at. The figures are the CLIP score of
    images, and the number of words of texts.
    """

    has_truth = False

    @dataclass(kw_only=True)
    class Config:
        """The task and its prompts."""

        task: str
        """text_to_image, edit, write, grounded, features, caption, paragraph or vqa."""
        prompts: list[dict[str, str]]
        """Values for the slots of the task's template, each a text or the path of an image: {text:
        ...}, {image1: PATH, instruction: ...}, {feature: depth, feature_image: PATH, caption:
        ...}."""
        max_pixels: PositiveInt = 64 * 1024 * 1024
        """Most pixels of a given image."""

        def check(self) -> None:
            if self.task not in SLOTS:
                raise UserError(f"task is {self.task}; {choices(self.task, SLOTS)}")
            if not self.prompts:
                raise UserError(
                    "prompts is empty; give at least one, for example [{text: a red dog}] for "
                    "text_to_image"
                )

            # A prompt fills all slots of its task, and no others.
            for number, prompt in enumerate(self.prompts):
                if set(prompt) != set(SLOTS[self.task]):
                    has = ", ".join(sorted(prompt)) or "nothing"
                    takes = ", ".join(SLOTS[self.task])
                    raise UserError(f"prompts.{number} has {has}; {self.task} takes {takes}")
                if prompt.get("feature", "depth") not in FEATURES:
                    raise UserError(
                        f"prompts.{number}.feature is {prompt['feature']}, which is not known; "
                        f"{choices(prompt['feature'], FEATURES)}"
                    )

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.answers_in = "text" if config.task in IN_TEXT else "image"
        self.max_tokens = MAX_TOKENS.get(config.task, Protocol.max_tokens)

    def items(self) -> list[Item]:
        return [self._item(number, prompt) for number, prompt in enumerate(self.config.prompts)]

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        if self.answers_in == "text":
            words = [len(answer.text.split()) for answer in answers]
            return {"words": average(np.array(words, float))}
        return clip_score(answers)

    def fingerprint(self) -> str:
        files = []
        for prompt in self.config.prompts:
            for slot in SLOTS[self.config.task]:
                if slot in IMAGES:
                    files.append(_existing(prompt[slot]))
        return digest_of_parts(file.read_bytes() for file in files)

    # ---------------------------------------------------------------------------------------- parts

    def _item(self, number: int, prompt: Mapping[str, str]) -> Item:
        """The item of a prompt: its values in the first of the task's templates."""
        task, id_ = self.config.task, f"{self.config.task}-{number}"
        if task == "text_to_image":
            return Item(id_, task, Document(id_, (TextSegment(prompt["text"]),)))

        # Slots that the prompt leaves empty, the answer's among them, hold a placeholder.
        blank_HWC = np.zeros((1, 1, 3), np.uint8)
        values: dict[str, Any] = {
            "answer": "?",
            "caption": "?",
            "image": blank_HWC,
            "image2": blank_HWC,
        }

        # Paths are replaced by pixels, and a kind of features by its name in the paper's templates.
        for slot, value in prompt.items():
            if slot in IMAGES:
                values[slot] = self._image(value)
            elif slot == "feature":
                values[slot] = FEATURES[value]
            else:
                values[slot] = value
        segments = fill_with_pixels(TABLE_5[task][0], values, ROLES[task])
        return Item(id_, "instruction", Document(id_, segments))

    def _image(self, path: str) -> np.ndarray:
        try:
            return read_image(_existing(path), self.config.max_pixels)
        except UnusableImage as error:
            raise UserError(f"prompts: {path} cannot be read as an image: {error}") from error


def _existing(path: str) -> Path:
    """The file at a path of a prompt. Raises UserError if there is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"prompts: {path} does not exist; give the path of an image")
    return file
