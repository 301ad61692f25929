"""What calls of a model return, and the warnings that may come with it."""

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
    """Samples are in the order of their seeds, because nothing can rank them."""


class UntunedWarning(Notice):
    """The model was not fine-tuned on the task of the call."""


class ShortageWarning(Notice):
    """A prompt holds fewer retrieved documents than the call asked for."""


class TruncatedWarning(Notice):
    """A text reached its largest length before it ended."""


@dataclass(frozen=True, eq=False)
class Completed:
    """A document with its generated answer."""

    document: TokenDocument
    truncated: bool
    """Whether the answer is a text that reached its largest length before it ended."""


@dataclass(frozen=True, eq=False)
class UsedDocument:
    """A retrieved document of a prompt."""

    id: str
    text: str
    image: Image.Image | None


@dataclass(frozen=True, eq=False)
class FoundDocument(UsedDocument):
    """A document of the memory bank that a search found."""

    row: int
    """Row of the bank."""
    score: float
    """Inner product with the query."""


@dataclass(frozen=True, eq=False)
class GeneratedImage:
    """A generated image."""

    image: Image.Image
    codes_N: np.ndarray
    score: float
    """Cosine of prompt and image by the run's own CLIP; NaN if its retriever has none."""
    seed: int
    documents: tuple[UsedDocument, ...]
    """The retrieved documents of the prompt, the closest last."""
    asked: int = 0
    """Number of documents that the call asked for."""
    shortage: str = ""
    """Why the prompt holds fewer documents than that; "" if it does not."""


@dataclass(frozen=True, eq=False)
class Images:
    """What `model(...)` returns, named as in pipelines of diffusers."""

    images: list[Image.Image]
    """The images of the first prompt, then those of the second, and so on."""


@dataclass(frozen=True, eq=False)
class Filled:
    """An image and its text, with a part of either generated anew."""

    image: Image.Image
    text: str
    codes_N: np.ndarray


def shortage_of(asked: int, found: int, kept: int) -> str:
    """Say why a prompt holds fewer documents than asked for; "" if it does not.

    Args:
        asked: number of documents that the call asked for.
        found: number of documents that the retriever found.
        kept: number of documents that the prompt holds.
    """
    if kept == asked:
        return ""
    return NO_ROOM if kept < found else NO_MORE


def found_of(kept: int, asked: int, shortage: str) -> str:
    """Word the warning about a prompt with fewer retrieved documents than asked for."""
    return f"found {kept} of {asked} documents: {shortage}"


def shortened(text: str, length: int = 40) -> str:
    """Quote the beginning of a text for a message."""
    if len(text) > length:
        text = f"{text[:length]}..."
    return repr(text)
