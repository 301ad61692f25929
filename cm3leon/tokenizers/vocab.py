"""The one vocabulary of text pieces, image codes and sentinels. No other file knows an id range.

    range                        the paper's          what
    [0, text_size)               [0, 56320)           <pad> <eos> <break> <end_of_span>, text
    [.., + image_size)           [56320, 64512)       image codes
    [.., + sentinels)            [64512, 65024)       <mask:0> <mask:1> ...
    [.., size)                   [65024, 65536)       reserved, up to the next power of two

Vocabularies of public weights may have further special tokens in front of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from cm3leon.tokenizers.layout import (
    BREAK,
    END_OF_SPAN,
    EOS,
    PAD,
    PAPER,
    SPECIALS,
    Grid,
    Layout,
    square_grid,
)
from cm3leon.types import Modality, UserError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["special", "text", "image", "sentinel", "reserved"]
"""What an id stands for."""

Ids = TypeVar("Ids", np.ndarray, "Tensor")
"""An array or a tensor of ids, of any shape."""


@dataclass(frozen=True)
class Vocab:
    """Id ranges, and the layout of sequences.

    Sizes are numbers of ids; `text_size` includes the `specials`.

    >>> Vocab(text_size=56_320, image_size=8_192).size
    65536
    """

    text_size: int
    image_size: int
    sentinels: int = 512
    specials: int = len(SPECIALS)
    """Number of special tokens, the first of the text ids. They occur in no text, and the model
    never draws them as text."""
    layout: Layout = PAPER

    pad = PAD
    eos = EOS
    brk = BREAK
    end_of_span = END_OF_SPAN

    def __post_init__(self) -> None:
        if self.text_size <= self.specials or self.image_size < 1 or self.sentinels < 1:
            raise UserError(
                f"a vocabulary needs more than {self.specials} text ids, and at least one image "
                f"code and one sentinel; it has {self.text_size}, {self.image_size} and "
                f"{self.sentinels}"
            )

    @property
    def image_start(self) -> int:
        """Id of image code 0."""
        return self.text_size

    @property
    def sentinel_start(self) -> int:
        """Id of `<mask:0>`."""
        return self.text_size + self.image_size

    @property
    def used(self) -> int:
        """Number of ids in use, all but the reserved ones."""
        return self.sentinel_start + self.sentinels

    @property
    def size(self) -> int:
        """Number of all ids, a power of two."""
        return 1 << (self.used - 1).bit_length()

    def sentinel(self, number: int) -> int:
        """Id of `<mask:number>`."""
        if not 0 <= number < self.sentinels:
            raise ValueError(
                f"there is no <mask:{number}>: the vocabulary has {self.sentinels} sentinels"
            )
        return self.sentinel_start + number

    @property
    def id_dtype(self) -> type[np.unsignedinteger]:
        """Type that ids are stored as: 16 bits if all ids in use fit, 32 bits otherwise."""
        return np.uint16 if self.used <= 1 << 16 else np.uint32

    def kind(self, id_: int) -> Kind:
        """What an id stands for."""
        if id_ < self.specials:
            return "special"
        if id_ < self.image_start:
            return "text"
        if id_ < self.sentinel_start:
            return "image"
        return "sentinel" if id_ < self.used else "reserved"

    def is_text(self, ids: Ids) -> Ids:
        """Tell which ids are pieces of text or special tokens."""
        return ids < self.text_size

    def is_image(self, ids: Ids) -> Ids:
        """Tell which ids are image codes."""
        return (ids >= self.image_start) & (ids < self.sentinel_start)

    def is_sentinel(self, ids: Ids) -> Ids:
        """Tell which ids are sentinels."""
        return (ids >= self.sentinel_start) & (ids < self.used)

    def image_ids(self, codes: np.ndarray, grid: Grid | None = None) -> np.ndarray:
        """Return the ids (..., T), int64, of images, with those that close rows in some layouts.

        Args:
            codes: image codes from 0 on, (..., N).
            grid: rows and columns of an image; None = it is square.
        """
        ids = np.asarray(codes, dtype=np.int64) + self.image_start
        return self.layout.closed_rows(ids, grid or square_grid(ids.shape[-1]))

    def image_codes(self, ids: np.ndarray) -> np.ndarray:
        """Invert `image_ids`. Raises ValueError for an id that is no image code."""
        ids = self.layout.open_rows(np.asarray(ids, dtype=np.int64))
        if not self.is_image(ids).all():
            raise ValueError("ids outside the image range cannot become image codes")
        return ids - self.image_start

    def sentinel_numbers(self, ids: np.ndarray) -> np.ndarray:
        """Invert `sentinel`: the same shape, int64. Raises ValueError for ids of other kinds."""
        if not self.is_sentinel(np.asarray(ids)).all():
            raise ValueError("ids outside the range of the sentinels have no number")
        return np.asarray(ids, dtype=np.int64) - self.sentinel_start

    def ranges(self) -> dict[str, int | list[int]]:
        """List the vocabulary: single ids as numbers, ranges as [first, one past the last]."""
        return {
            "pad": self.pad,
            "eos": self.eos,
            "break": self.brk,
            "end_of_span": self.end_of_span,
            "text": list(self.id_range("text")),
            "image": list(self.id_range("image")),
            "sentinels": [self.sentinel_start, self.used],
            "reserved": [self.used, self.size],
        }

    def id_range(self, modality: Modality) -> tuple[int, int]:
        """Return the first id, and one past the last, of the content tokens of a modality."""
        if modality == "text":
            return self.specials, self.text_size
        return self.image_start, self.sentinel_start
