"""What stands beside texts and images in a sequence: data, so that another family's sequences need no code.

paper      <eos> a cat <break> I4 I7 <break> a dog <break> I2 I9 <eos>
Chameleon  <s> a cat <break> I4 I7 <end_of_span> <next> a dog <break> I2 I9 <end_of_span> </s>
with rows  <s> a dog <break> <1> <2> I2 I9 <row> I5 I6 <row> <end_of_span> </s>
Emu3       <s> a dog <break> 2 * 2 <codes> I2 I9 <row> I5 I6 <row> <all rows> <end_of_span> </s>
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from cm3leon.types import TokenSegment, UserError

PAD, EOS, BREAK, END_OF_SPAN = range(4)
SPECIALS = ("<pad>", "<eos>", "<break>", "<end_of_span>")
"""Names of the special tokens that every vocabulary begins with."""

Unconditional = Literal["mask", "none"]
Grid = tuple[int, int]
"""Rows and columns of an image's codes."""
UNKNOWN: Grid = (0, 0)
"""The grid of an image without codes: its size is not said."""


@dataclass(frozen=True)
class Layout:
    """Ids that stand beside those of texts and images; the defaults are the paper's (section 2.1, figures 8 and 9)."""

    begin: int = EOS
    """Opens a sample."""
    end: int = EOS
    """Closes a sample."""
    between_segments: tuple[int, ...] = (BREAK,)
    """Between the segments of a document."""
    between_documents: tuple[int, ...] = (BREAK,)
    """Between the documents of a sample."""
    image_open: tuple[int, ...] = ()
    """In front of an image."""
    image_close: tuple[int, ...] = ()
    """Behind an image."""
    row_close: int | None = None
    """Behind each row of an image's codes; None = rows are not marked."""
    last_row_closed: bool = True
    """Whether `row_close` stands behind an image's last row, too, or between its rows alone."""
    turn: tuple[int, ...] = ()
    """Behind a question, where a model answers in turns; empty = it does not."""
    unconditional_text: Unconditional = "mask"
    """What the unconditional stream has in the place of a text: a mask, or nothing, as models without masks have it."""
    sizes: Mapping[Grid, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """Behind `image_open`, by the image's rows and columns: special tokens, or pieces of text.
    Empty = sizes are not said."""

    def around_image(self, grid: Grid) -> int:
        """Ids in front of an image of that size and behind it."""
        return len(self.image_open) + len(self.sizes.get(grid, ())) + len(self.image_close)

    @cached_property
    def around_any_image(self) -> int | None:
        """The same where it is one number for all sizes; None where it is not."""
        lengths = {len(tokens) for tokens in self.sizes.values()} or {0}
        if len(lengths) > 1:
            return None
        return len(self.image_open) + lengths.pop() + len(self.image_close)

    @property
    def before_an_image(self) -> tuple[int, ...]:
        """Ids between a text and the image behind it; the first of them ends the text."""
        return (*self.between_segments, *self.image_open)

    def opening(self, segment: TokenSegment) -> tuple[int, ...]:
        """Ids in front of a segment; none for one that goes on with what stands before it.

        Raises:
            ValueError: for an image of a size that has no ids.
        """
        if segment.modality == "text" or segment.joined:
            return ()
        grid = segment.grid or self.grid_of(segment.ids_T)
        if not self.sizes or grid == UNKNOWN:
            return self.image_open
        if grid not in self.sizes:
            raise ValueError(f"images of {grid[0]} x {grid[1]} codes have no ids of their size")
        return (*self.image_open, *self.sizes[grid])

    def closing(self, segment: TokenSegment) -> tuple[int, ...]:
        """Ids behind a segment."""
        return () if segment.modality == "text" else self.image_close

    def grid_of(self, ids_T: np.ndarray) -> Grid:
        """Rows and columns of an image by its ids; where rows are not closed it is taken to be
        square.

        An image of one row, of which nothing is closed, is not told from one that is masked.
        """
        if self.row_close is None:
            return square_grid(len(ids_T))
        ends = np.flatnonzero(ids_T == self.row_close)
        if not len(ends):
            return UNKNOWN
        return len(ends) + (not self.last_row_closed), int(ends[0])

    def sizes_within(self, codes: int) -> list[Grid]:
        """The sizes of at most so many codes that allow for no further row or column.

        >>> Layout(sizes={(1, 1): (), (1, 2): (), (2, 1): (), (1, 3): (), (2, 2): ()}).sizes_within(3)
        [(1, 3), (2, 1)]
        """
        widest: dict[int, int] = {}
        for rows, columns in self.sizes:
            if rows * columns <= codes:
                widest[rows] = max(columns, widest.get(rows, 0))
        found: list[Grid] = []
        for rows in sorted(widest, reverse=True):
            if not found or widest[rows] > found[-1][1]:
                found.append((rows, widest[rows]))
        return found[::-1]

    def image_length(self, grid: Grid) -> int:
        """Ids of an image of that size, without those around it."""
        rows, columns = grid
        return rows * self.row_length(columns) - self._unclosed

    def row_length(self, columns: int) -> int:
        """Ids of a row of so many codes, with what closes it."""
        return columns + (self.row_close is not None)

    @property
    def _unclosed(self) -> int:
        """Ids that the last row lacks of those of the others."""
        return int(self.row_close is not None and not self.last_row_closed)

    def closed_rows(self, ids: np.ndarray, grid: Grid) -> np.ndarray:
        """Ids of images (..., T) from those of their codes (..., N): the same, or each row closed."""
        if self.row_close is None:
            return ids
        rows = ids.reshape(*ids.shape[:-1], *grid)
        ends = np.full((*rows.shape[:-1], 1), self.row_close)
        closed = np.concatenate([rows, ends], -1).reshape(*ids.shape[:-1], -1)
        return closed[..., : closed.shape[-1] - self._unclosed]

    def open_rows(self, ids: np.ndarray) -> np.ndarray:
        """Ids of the codes alone (..., N); the inverse of `closed_rows`."""
        if self.row_close is None:
            return ids
        return ids[ids != self.row_close].reshape(*ids.shape[:-1], -1)

    def row_ends(self, columns: int, start: int, end: int) -> tuple[int, ...]:
        """Which of an image's ids [start, end), counted from `start`, close a row of so many columns.

        >>> Layout(row_close=9).row_ends(2, 1, 6)
        (1, 4)
        """
        if self.row_close is None:
            return ()
        return tuple(
            place - start for place in range(start, end) if place % (columns + 1) == columns
        )


@dataclass(frozen=True)
class LayoutTable:
    """A layout by the names of its tokens, as a file beside the text tokenizer has it."""

    specials: tuple[str, ...] = SPECIALS
    """Names of the ids at the beginning of the vocabulary; `SPECIALS` come first."""
    layout: Layout = field(default_factory=Layout)

    @classmethod
    def from_names(cls, content: Mapping[str, Any], where: str) -> LayoutTable:
        """The table of a JSON object: `specials`, and the fields of `Layout` with names in the place of ids.

        The keys of `sizes` are written as 16x16, rows first. `pieces` has the ids of pieces of text
        that are named.

        Raises:
            UserError: for a field that is not known, or a name that is no special token and no such
                piece.
        """
        names = content.get("specials")
        if not isinstance(names, list) or tuple(names[: len(SPECIALS)]) != SPECIALS:
            raise UserError(
                f"{where}: specials must be a list that begins with {', '.join(SPECIALS)}"
            )
        number = {name: id_ for id_, name in enumerate(names)}
        pieces = content.get("pieces", {})
        if not isinstance(pieces, dict) or not all(type(id_) is int for id_ in pieces.values()):
            raise UserError(f"{where}: pieces must be an object of ids by the names of pieces")
        number = {**pieces, **number}

        def id_of(name: Any, key: str) -> int:
            if name not in number:
                raise UserError(f"{where}: {key} names {name!r}, which is not among its specials")
            return number[name]

        given: dict[str, Any] = {}
        for key, value in content.items():
            if key in ("specials", "pieces"):
                continue
            if key not in {each.name for each in fields(Layout)}:
                raise UserError(f"{where}: {key} is not known")
            if key == "unconditional_text":
                if value not in get_args(Unconditional):
                    raise UserError(f"{where}: {key} is {value!r}; it must be mask or none")
                given[key] = value
            elif key == "last_row_closed":
                if not isinstance(value, bool):
                    raise UserError(f"{where}: {key} is {value!r}; it must be true or false")
                given[key] = value
            elif key == "sizes":
                given[key] = {
                    _grid(text, where): tuple(id_of(name, key) for name in tokens)
                    for text, tokens in value.items()
                }
            elif isinstance(value, list):
                given[key] = tuple(id_of(name, key) for name in value)
            else:
                given[key] = None if value is None else id_of(value, key)
        layout = Layout(**given)
        if layout._unclosed and any(rows == 1 for rows, _ in layout.sizes):
            raise UserError(
                f"{where}: sizes has images of one row, whose row nothing closes where "
                "last_row_closed is false"
            )
        return cls(tuple(names), layout)


def _grid(text: str, where: str) -> Grid:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise UserError(f"{where}: sizes has {text!r}; it must be rows x columns, as in 16x16")
    return int(match[1]), int(match[2])


def square_grid(codes: int) -> Grid:
    """Rows and columns of a square image of so many codes."""
    side = math.isqrt(codes)
    return side, side


PAPER = Layout()
