"""Types of callers' arguments, and checks of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from cm3leon.arguments import any_text
from cm3leon.config import Component, Range
from cm3leon.data.images import ImageInput, read_given_image
from cm3leon.registry import DECODERS
from cm3leon.types import UserError

DecoderChoice = Annotated[str | dict[str, Any] | Component, DECODERS] | None
"""A decoder by its name, by a section as in YAML, or None for the run's own."""
GivenImage = Annotated[ImageInput, read_given_image]
"""An image as a path, the bytes of a file, a Pillow image or an array; methods get its pixels."""
Samples = Annotated[int, Range(ge=1, le=65_536)]


def _part(value: Any, where: str) -> str | np.ndarray:
    """Return a text as it is, and the pixels of anything else; a file of an image is a Path."""
    if isinstance(value, str):
        return any_text(value, where)
    return read_given_image(value, where)


Parts = Sequence[Annotated[str | ImageInput, _part]]
"""The texts and images of a page, in order."""


def check_lengths(**lists: Sequence[Any]) -> None:
    """Raise UserError unless all lists, of one item a document, are as long as the first."""
    (first, items), *others = lists.items()
    for name, other in others:
        if len(other) != len(items):
            raise UserError(f"{name} has {len(other)} items, and {first} {len(items)}")


def check_queries(by: str, texts: Sequence[str] | None, images_BHWC: np.ndarray | None) -> None:
    """Raise UserError if the texts, or the images, that are to be searched with are missing."""
    name, given = ("texts", texts) if by == "text" else ("images", images_BHWC)
    if given is None:
        raise UserError(
            f"by is {by}, but no {name} are given; give them, or choose the other value of by"
        )


def check_ids(where: str, ids_T: np.ndarray, size: int) -> None:
    """Raise UserError unless an array is a list of ids of a vocabulary of that size."""
    whole = ids_T.ndim == 1 and np.issubdtype(ids_T.dtype, np.integer)
    if not whole or (ids_T.size and not 0 <= ids_T.min() <= ids_T.max() < size):
        raise UserError(f"{where} must be lists (T,) of ids from 0 to {size - 1} of the vocabulary")


def check_codes(where: str, codes_BN: np.ndarray, length: int, size: int) -> None:
    """Raise UserError unless an array holds images of `length` codes of a codebook of that size."""
    if codes_BN.ndim != 2 or codes_BN.shape[1] != length:
        raise UserError(f"{where} has the shape {codes_BN.shape}; it must be (images, {length})")
    whole = np.issubdtype(codes_BN.dtype, np.integer)
    if not whole or (codes_BN.size and not 0 <= codes_BN.min() <= codes_BN.max() < size):
        raise UserError(f"{where} must be integers from 0 to {size - 1}")
