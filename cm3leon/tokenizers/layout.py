"""Layouts of sequences: which ids stand around and between texts and images.

A layout is data, so another family's sequences need no code. Here are those of four families:

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

from cm3leon.config import choices
from cm3leon.types import TokenSegment, UserError

PAD, EOS, BREAK, END_OF_SPAN = range(4)
SPECIALS = ("<pad>", "<eos>", "<break>", "<end_of_span>")
"""Names of the special tokens that every vocabulary begins with."""

Unconditional = Literal["mask", "none"]
Grid = tuple[int, int]
"""Rows and columns of an image's codes."""
UNKNOWN: Grid = (0, 0)
"""The grid of an image whose codes do not show its size."""


@dataclass(frozen=True)
class Layout:
    """Ids around and between texts and images.

    The defaults are the paper's (section 2.1, figures 8 and 9).
    """

    begin: int = EOS
    """Opens a sample."""
    end: int = EOS
    """Closes a sample."""
    between_segments: tuple[int, ...] = (BREAK,)
    """Separate the segments of a document."""
    between_documents: tuple[int, ...] = (BREAK,)
    """Separate the documents of a sample."""
    image_open: tuple[int, ...] = ()
    """Stand in front of an image."""
    image_close: tuple[int, ...] = ()
    """Stand behind an image."""
    row_close: int | None = None
    """Closes each row of an image's codes; None = rows are not marked."""
    last_row_closed: bool = True
    """Whether `row_close` also follows the last row of an image; otherwise it separates rows."""
    turn: tuple[int, ...] = ()
    """Follow a question to a model that answers in turns; empty for other models."""
    unconditional_text: Unconditional = "mask"
    """What replaces the text in the unconditional stream: a mask, or nothing, for models that were
    trained without masks."""
    sizes: Mapping[Grid, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """Ids that follow `image_open` and tell an image's rows and columns: special tokens, or pieces
    of text. Empty = sequences do not tell sizes."""

    def around_image(self, grid: Grid) -> int:
        """Count the ids in front of an image of that size and behind it."""
        return len(self.image_open) + len(self.sizes.get(grid, ())) + len(self.image_close)

    @cached_property
    def around_any_image(self) -> int | None:
        """Count of ids around an image if it is the same for all sizes; None otherwise."""
        lengths = {len(tokens) for tokens in self.sizes.values()} or {0}
        if len(lengths) > 1:
            return None
        return len(self.image_open) + lengths.pop() + len(self.image_close)

    @property
    def before_an_image(self) -> tuple[int, ...]:
        """Ids between a text and the image that follows it; the first of them ends the text."""
        return (*self.between_segments, *self.image_open)

    def opening(self, segment: TokenSegment) -> tuple[int, ...]:
        """Return the ids in front of a segment; none for one that continues the one before it.

        Raises:
            ValueError: for an image whose size has no ids.
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
        """Return the ids behind a segment."""
        return () if segment.modality == "text" else self.image_close

    def grid_of(self, ids_T: np.ndarray) -> Grid:
        """Read an image's rows and columns off its ids. Without closed rows, it is square.

        An image of one row that is not closed looks like a masked one, and gives `UNKNOWN`.
        """
        if self.row_close is None:
            return square_grid(len(ids_T))
        ends = np.flatnonzero(ids_T == self.row_close)
        if not len(ends):
            return UNKNOWN
        return len(ends) + (not self.last_row_closed), int(ends[0])

    def sizes_within(self, codes: int) -> list[Grid]:
        """List the sizes of at most so many codes that have room for no further row or column.

        >>> Layout(sizes={(1, 1): (), (1, 2): (), (2, 1): (), (1, 3): (), (2, 2): ()}).sizes_within(3)
        [(1, 3), (2, 1)]
        """
        widest: dict[int, int] = {}
        for rows, columns in self.sizes:
            if rows * columns <= codes:
                widest[rows] = max(columns, widest.get(rows, 0))

        # From many rows to few: a size stays if it is wider than all that have more rows.
        found: list[Grid] = []
        for rows in sorted(widest, reverse=True):
            if not found or widest[rows] > found[-1][1]:
                found.append((rows, widest[rows]))
        return found[::-1]

    def image_length(self, grid: Grid) -> int:
        """Count the ids of an image of that size, without those around it."""
        rows, columns = grid
        return rows * self.row_length(columns) - self._unclosed

    def row_length(self, columns: int) -> int:
        """Count the ids of a row of so many codes, including the one that closes it."""
        return columns + (self.row_close is not None)

    @property
    def _unclosed(self) -> int:
        """How many ids the last row has less than the others: 0 or 1."""
        return int(self.row_close is not None and not self.last_row_closed)

    def closed_rows(self, ids: np.ndarray, grid: Grid) -> np.ndarray:
        """Insert the ids that close rows: ids of codes (..., N) become ids of images (..., T).

        >>> Layout(row_close=9).closed_rows(np.array([5, 6, 7, 8]), (2, 2))
        array([5, 6, 9, 7, 8, 9])
        """
        if self.row_close is None:
            return ids
        rows = ids.reshape(*ids.shape[:-1], *grid)
        ends = np.full((*rows.shape[:-1], 1), self.row_close)
        closed = np.concatenate([rows, ends], -1).reshape(*ids.shape[:-1], -1)
        return closed[..., : closed.shape[-1] - self._unclosed]

    def open_rows(self, ids: np.ndarray) -> np.ndarray:
        """Remove the ids that close rows; the inverse of `closed_rows`."""
        if self.row_close is None:
            return ids
        return ids[ids != self.row_close].reshape(*ids.shape[:-1], -1)

    def row_ends(self, columns: int, start: int, end: int) -> tuple[int, ...]:
        """Find which of an image's ids [start, end) close a row, counted from `start`.

        >>> Layout(row_close=9).row_ends(2, 1, 6)
        (1, 4)
        """
        if self.row_close is None:
            return ()
        ends = []
        for index in range(start, end):
            if index % (columns + 1) == columns:
                ends.append(index - start)
        return tuple(ends)


@dataclass(frozen=True)
class LayoutTable:
    """A layout by the names of its tokens, read from a file beside the text tokenizer."""

    specials: tuple[str, ...] = SPECIALS
    """Names of the first ids of the vocabulary, which begin with `SPECIALS`."""
    layout: Layout = field(default_factory=Layout)

    @classmethod
    def from_names(cls, content: Mapping[str, Any], where: str) -> LayoutTable:
        """Read a table from a JSON object.

        It has `specials` and the fields of `Layout`, with names instead of ids. The keys of `sizes`
        are rows x columns, as in 16x16. `pieces` gives the ids of those pieces of text that are
        named.

        Raises:
            UserError: for an unknown field, or a name that is neither a special token nor one of
                the pieces.
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

        # A special token wins over a piece that is spelled like it.
        number = {**pieces, **number}

        # Every other field is a list of names, one name, or one of three exceptions.
        def id_of(name: Any, key: str) -> int:
            if name not in number:
                raise UserError(f"{where}: {key} names {name!r}, which is not among its specials")
            return number[name]

        given: dict[str, Any] = {}
        for key, value in content.items():
            if key in ("specials", "pieces"):
                continue
            if key not in {each.name for each in fields(Layout)}:
                known = [*(each.name for each in fields(Layout)), "specials", "pieces"]
                raise UserError(f"{where}: {key} is not a known key; {choices(key, known)}")
            if key == "unconditional_text":
                if value not in get_args(Unconditional):
                    raise UserError(f"{where}: {key} is {value!r}; it must be mask or none")
                given[key] = value
            elif key == "last_row_closed":
                if not isinstance(value, bool):
                    raise UserError(f"{where}: {key} is {value!r}; it must be true or false")
                given[key] = value
            elif key == "sizes":
                sizes = {}
                for text, tokens in value.items():
                    grid = _grid(text, where)
                    sizes[grid] = tuple(id_of(name, key) for name in tokens)
                given[key] = sizes
            elif isinstance(value, list):
                given[key] = tuple(id_of(name, key) for name in value)
            else:
                given[key] = None if value is None else id_of(value, key)

        layout = Layout(**given)
        if layout._unclosed and any(rows == 1 for rows, _ in layout.sizes):
            raise UserError(
                f"{where}: sizes has images of one row, which nothing closes if last_row_closed is "
                "false; set it to true, or leave those sizes out"
            )
        return cls(tuple(names), layout)


def _grid(text: str, where: str) -> Grid:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise UserError(f"{where}: sizes has {text!r}; it must be rows x columns, as in 16x16")
    return int(match[1]), int(match[2])


def square_grid(codes: int) -> Grid:
    """Return the rows and columns of a square image of so many codes."""
    side = math.isqrt(codes)
    return side, side


PAPER = Layout()
