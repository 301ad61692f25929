"""The one vocabulary of text pieces, image codes and sentinels. No other file knows an id range.

    [0, text_size)                       text, beginning with <pad> <eos> <break> <end_of_span>
    [text_size, + image_size)            image codes
    [.., + sentinels)                    <mask:0> <mask:1> ...
    [.., size)                           reserved, up to the next power of two

The paper's sizes, 56,320 text + 8,192 image + 512 sentinels, leave 512 reserved ids and make 65,536 = 2^16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from cm3leon.types import Modality, UserError

if TYPE_CHECKING:
    from torch import Tensor

SPECIALS = ("<pad>", "<eos>", "<break>", "<end_of_span>")

Kind = Literal["special", "text", "image", "sentinel", "reserved"]
"""What an id stands for."""

Ids = TypeVar("Ids", np.ndarray, "Tensor")
"""An array or a tensor of ids, of any shape."""


@dataclass(frozen=True)
class Vocab:
    """Id ranges. `text_size` counts the four special tokens; sizes are numbers of ids.

    >>> Vocab(text_size=56_320, image_size=8_192).size
    65536
    """

    text_size: int
    image_size: int
    sentinels: int = 512

    pad = 0
    eos = 1
    brk = 2
    end_of_span = 3

    def __post_init__(self) -> None:
        if self.text_size <= len(SPECIALS) or self.image_size < 1 or self.sentinels < 1:
            raise UserError(
                f"a vocabulary needs more than {len(SPECIALS)} text ids, an image code and a sentinel, "
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
        if id_ < len(SPECIALS):
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

    def image_ids(self, codes: np.ndarray) -> np.ndarray:
        """Codes 0.. of the image tokenizer as ids, same shape, int64."""
        return np.asarray(codes, dtype=np.int64) + self.image_start

    def image_codes(self, ids: np.ndarray) -> np.ndarray:
        """Inverse of `image_ids`. Raises ValueError for an id that is no image code."""
        if not self.is_image(np.asarray(ids)).all():
            raise ValueError("ids outside the image range cannot become image codes")
        return np.asarray(ids, dtype=np.int64) - self.image_start

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
            (len(SPECIALS), self.text_size)
            if modality == "text"
            else (self.image_start, self.sentinel_start)
        )
