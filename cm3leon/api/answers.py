"""What a model answers, and what is said beside an answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from cm3leon.types import (
    Notice,
    TokenDocument,
)

NO_ROOM = "the model has no room for more"
NO_MORE = "the retriever's rules leave no more of the memory bank"


class UnrankedWarning(Notice):
    """Samples are in the order of their seeds, as there is nothing to rank them by."""


class UntunedWarning(Notice):
    """What is asked for is a task that the model was not fine-tuned on."""


class ShortageWarning(Notice):
    """Fewer retrieved documents than asked stand in a prompt."""


class TruncatedWarning(Notice):
    """A text was stopped by its length before it ended."""


@dataclass(frozen=True, eq=False)
class Completed:
    """A document with the answer that was asked for."""

    document: TokenDocument
    truncated: bool
    """Whether the answer is a text that was stopped by its length before it ended."""


@dataclass(frozen=True, eq=False)
class UsedDocument:
    """A retrieved document that stood in a prompt."""

    id: str
    text: str
    image: Image.Image | None


@dataclass(frozen=True, eq=False)
class FoundDocument(UsedDocument):
    """A document of the memory bank that was searched for."""

    row: int
    """Of the bank."""
    score: float
    """Inner product with what was searched by."""


@dataclass(frozen=True, eq=False)
class GeneratedImage:
    """A generated image."""

    image: Image.Image
    codes_N: np.ndarray
    score: float
    """Cosine of prompt and image by the run's own CLIP; NaN where its retriever has none."""
    seed: int
    documents: tuple[UsedDocument, ...]
    """What stood in the prompt, the closest last."""
    asked: int = 0
    """Documents that were asked for."""
    shortage: str = ""
    """Why fewer documents than asked stood in the prompt; "" where there were as many."""


@dataclass(frozen=True, eq=False)
class Images:
    """What a call of the model gives, as pipelines of diffusers do."""

    images: list[Image.Image]
    """In the order of the prompts, those of a prompt together."""


@dataclass(frozen=True, eq=False)
class Filled:
    """An image with its text, a part of which was made anew."""

    image: Image.Image
    text: str
    codes_N: np.ndarray


def shortage_of(asked: int, found: int, kept: int) -> str:
    """Why fewer retrieved documents than asked stand in a prompt, "" if as many do."""
    if kept == asked:
        return ""
    return NO_ROOM if kept < found else NO_MORE


def found_of(kept: int, asked: int, shortage: str) -> str:
    """What is said of a prompt with fewer retrieved documents than asked."""
    return f"found {kept} of {asked} documents: {shortage}"


def shortened(text: str, length: int = 40) -> str:
    """The beginning of a text, quoted, as messages show it."""
    return repr(text if len(text) <= length else f"{text[:length]}...")
