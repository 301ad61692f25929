"""The one vocabulary of text pieces, image codes and sentinels. No other file knows an id range.

    [0, text_size)                       text, beginning with <pad> <eos> <break> <end_of_span> and other specials
    [text_size, + image_size)            image codes
    [.., + sentinels)                    <mask:0> <mask:1> ...
    [.., size)                           reserved, up to the next power of two

The paper's sizes, 56,320 text + 8,192 image + 512 sentinels, leave 512 reserved ids and make 65,536 = 2^16.
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
    """Id ranges, and the layout of sequences in them. Sizes are numbers of ids; `text_size` counts the `specials`.

    >>> Vocab(text_size=56_320, image_size=8_192).size
    65536
    """

    text_size: int
    image_size: int
    sentinels: int = 512
    specials: int = len(SPECIALS)
    """Ids at the beginning of the text's that are no pieces: no text holds them, and none is drawn as one."""
    layout: Layout = PAPER

    pad = PAD
    eos = EOS
    brk = BREAK
    end_of_span = END_OF_SPAN

    def __post_init__(self) -> None:
        if self.text_size <= self.specials or self.image_size < 1 or self.sentinels < 1:
            raise UserError(
                f"a vocabulary needs more than {self.specials} text ids, an image code and a sentinel, "
                f"got {self.text_size}, {self.image_size}, {self.sentinels}"
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
        """Ids in use, before the reserved ones."""
        return self.sentinel_start + self.sentinels

    @property
    def size(self) -> int:
        """All ids: the next power of two."""
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
        """What ids are stored as: 16 bits where all in use fit, 32 bits otherwise."""
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
        """Boolean array: which ids are pieces of text or special tokens."""
        return ids < self.text_size

    def is_image(self, ids: Ids) -> Ids:
        """Boolean array: which ids are image codes."""
        return (ids >= self.image_start) & (ids < self.sentinel_start)

    def is_sentinel(self, ids: Ids) -> Ids:
        """Boolean array: which ids are sentinels."""
        return (ids >= self.sentinel_start) & (ids < self.used)

    def image_ids(self, codes: np.ndarray, grid: Grid | None = None) -> np.ndarray:
        """Codes 0.. (..., N) of images as ids (..., T), int64: as many, and one behind each row if the layout says so.

        Args:
            grid: rows and columns of an image; None = it is square.
        """
        ids = np.asarray(codes, dtype=np.int64) + self.image_start
        return self.layout.closed_rows(ids, grid or square_grid(ids.shape[-1]))

    def image_codes(self, ids: np.ndarray) -> np.ndarray:
        """Inverse of `image_ids`. Raises ValueError for an id that is no image code."""
        ids = self.layout.open_rows(np.asarray(ids, dtype=np.int64))
        if not self.is_image(ids).all():
            raise ValueError("ids outside the image range cannot become image codes")
        return ids - self.image_start

    def sentinel_numbers(self, ids: np.ndarray) -> np.ndarray:
        """Inverse of `sentinel`, same shape, int64. Raises ValueError for an id that is no sentinel."""
        if not self.is_sentinel(np.asarray(ids)).all():
            raise ValueError("ids outside the range of the sentinels have no number")
        return np.asarray(ids, dtype=np.int64) - self.sentinel_start

    def ranges(self) -> dict[str, int | list[int]]:
        """All of the vocabulary: single ids as numbers, ranges as [first, one past the last]."""
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
        """First id, and one past the last, of the content tokens of a modality."""
        return (
            (self.specials, self.text_size)
            if modality == "text"
            else (self.image_start, self.sentinel_start)
        )
