"""The contents of the page's fields, checked and converted; mistakes are UserErrors."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.api import CM3Leon
from cm3leon.registry import DECODERS
from cm3leon.serve.asked import decoder_of
from cm3leon.serve.pictures import given_pixels
from cm3leon.types import UserError

LONGEST_TEXT = 4_000
"""The most characters of an entered text."""


def text_of(entered: str | None, what: str) -> str:
    """A text that must not be empty.

    Args:
        what: name of the field, for messages.
    """
    text = (entered or "").strip()
    if not text:
        raise UserError(f"{what} is empty; write a text")
    if len(text) > LONGEST_TEXT:
        raise UserError(f"{what} has {len(text)} characters; it must have at most {LONGEST_TEXT}")
    return text


def seed_of(entered: str | None) -> int:
    """The entered seed; a random one if the field is empty."""
    text = (entered or "").strip()
    if not text:
        return secrets.randbelow(1_000_000)
    if not (text.isascii() and text.isdigit()) or int(text) >= 2**63:
        raise UserError(
            f"seed is {text[:40]!r}; it must be a whole number from 0 on, or empty for any"
        )
    return int(text)


def decoder_choices() -> list[str]:
    """The decoders for images of a text; `edit` needs the streams of an edit."""
    return [name for name in DECODERS.names() if name != "edit"]


def decoder_entered(model: CM3Leon, name: str | None, guidance: float | None) -> Any:
    """The decoder of the two fields; None for the run's own."""
    if guidance is None:
        return name or None
    usual = model.run.experiment.decoder
    if not 0 <= guidance <= 1000:
        raise UserError(f"guidance is {guidance}; it must be from 0 to 1000, or empty")
    return decoder_of(DECODERS.check(name) if name else None, guidance, usual)


def pixels_of(file: str | None, size: int, max_pixels: int) -> np.ndarray:
    """Pixels (size, size, 3) that the model sees of an image file.

    Raises:
        UserError: for no file, one that cannot be read, or too many pixels.
    """
    if not file:
        raise UserError("image is missing; choose or take a picture")
    content = Path(file).read_bytes()
    return given_pixels(content, "image", size=size, max_pixels=max_pixels)


def box_of(entered: str | None, size: int) -> tuple[int, int, int, int] | None:
    """The box that was entered as four numbers; None for an empty field."""
    words = (entered or "").replace(",", " ").strip("[]() ").split()
    if not words:
        return None
    if len(words) == 4 and all(word.isascii() and word.isdigit() for word in words):
        left, top, right, bottom = map(int, words)
        if left < right <= size and top < bottom <= size:
            return left, top, right, bottom
    raise UserError(
        f"box is {entered!r}; it must be left, top, right, bottom in an image of {size} x {size} "
        f"pixels, such as 0, {size // 2}, {size}, {size}"
    )


def words_of(entered: str) -> tuple[str, tuple[int, int] | None]:
    """A caption without its [brackets], and the characters that they were around.

    "a [red] dog" becomes "a red dog" and (2, 5).
    """
    start, end = entered.find("["), entered.find("]")
    if start < 0 and end < 0:
        return entered, None
    if entered.count("[") != 1 or entered.count("]") != 1 or end <= start + 1:
        raise UserError("caption must have one pair of [brackets] around words that are made anew")
    text = entered[:start] + entered[start + 1 : end] + entered[end + 1 :]
    return text, (start, end - 1)
