"""Prompts for what is asked of a model by hand: any spans of a document, edits of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cm3leon.objectives.cm3 import rotate
from cm3leon.tasks.base import without_conditions
from cm3leon.tokenizers.document import lay_out
from cm3leon.tokenizers.layout import Grid, Layout
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Sample, TokenDocument, TokenSegment, UserError


class AskedSpan(NamedTuple):
    """Tokens [start, end) of a segment that are asked for, with the segment's index."""

    segment: int
    start: int
    end: int


def spans_prompt(
    query: TokenDocument,
    spans: Sequence[AskedSpan],
    retrieved: Sequence[TokenDocument],
    vocab: Vocab,
) -> np.ndarray:
    """The prompt for spans of a document, in the form that CM3 trains.

    `<eos> a red dog <break> I7 I2 I9 I4 <eos>` with the spans "red" and I2 I9 becomes
    `<eos> a <mask:0> dog <break> I7 <mask:1> I4 <eos> <mask:0>`; `infilling` is the grammar of the
    answer.

    Raises:
        UserError: for no spans, more than there are sentinels, or spans that overlap or are not in
            order.
    """
    if not 0 < len(spans) <= vocab.sentinels:
        raise UserError(
            f"{len(spans)} spans are asked for; there must be from 1 to {vocab.sentinels} of them, "
            "one for each sentinel"
        )

    # Positions of the spans in the sample.
    laid_out = lay_out(Sample(query, tuple(retrieved)), vocab)
    own = [segment for segment in laid_out.segments if segment.is_query]
    found = []
    for span in spans:
        first = own[span.segment].start
        found.append((first + span.start, first + span.end))
    empty = any(start >= end for start, end in found)
    if empty or any(one[1] > next_one[0] for one, next_one in pairwise(found)):
        raise UserError("spans must not be empty or overlap, and must stand in order")

    # Keep the first sentinel of what the rotation moved behind the sample; the rest is the answer.
    rotated_T, _ = rotate(laid_out.ids_T, found, vocab)
    moved = sum(end - start + 2 for start, end in found)
    return rotated_T[: len(rotated_T) - moved + 1]


def unconditional_spans_prompt(
    query: TokenDocument,
    spans: Sequence[AskedSpan],
    retrieved: Sequence[TokenDocument],
    vocab: Vocab,
) -> np.ndarray | None:
    """The unconditional stream of `spans_prompt`: the same spans, and masks for what guides them.

    `<eos> a red dog <break> I7 <mask:0> I4 <eos> <mask:0>` asks for I2 I9 given the text; beside it
    stands `<eos> <mask:1> <break> I7 <mask:0> I4 <eos> <mask:0>`. Words are asked for beside a
    masked image in the same way. None if spans of both modalities are asked for: what is left of a
    segment that is itself asked for is context of the answer, so there is nothing to guide by.
    """
    modalities = {query.segments[span.segment].modality for span in spans}
    if len(modalities) > 1:
        return None
    unguided = without_conditions(query, modalities.pop(), vocab, spans=len(spans))
    return None if unguided is None else spans_prompt(unguided, spans, retrieved, vocab)


def fill(
    query: TokenDocument, spans: Sequence[AskedSpan], answer: Sequence[int], vocab: Vocab
) -> TokenDocument:
    """The document with the answer to `spans_prompt` in place of the spans."""
    contents: list[list[int]] = [[]]
    for token in answer:
        if vocab.kind(token) == "sentinel":
            contents.append([])
        elif token != vocab.end_of_span:
            contents[-1].append(token)

    # From the last span on, so that earlier ones keep their positions.
    segments = list(query.segments)
    for span, content in reversed(list(zip(spans, contents, strict=True))):
        old = segments[span.segment]
        ids_T = np.concatenate(
            [old.ids_T[: span.start], np.array(content, np.int64), old.ids_T[span.end :]]
        )
        segments[span.segment] = TokenSegment(old.modality, ids_T)
    return replace(query, segments=tuple(segments))


def box_spans(
    box: tuple[int, int, int, int],
    *,
    segment: int,
    grid: Grid,
    width: int,
    height: int,
    layout: Layout,
) -> list[AskedSpan]:
    """The codes of an image that a box of its pixels touches, as spans (`code_spans`).

    The tokenizer sees the middle of an image, the largest part with the shape of its grid.

    Args:
        box: (left, top, right, bottom) in pixels of the image; right and bottom are outside.
        grid: rows and columns of the image's codes.
        width: of the image, in pixels.
        height: of the image, in pixels.
        layout: says whether rows of codes are closed.

    Raises:
        UserError: for a box that is empty or leaves the visible part.
    """
    left, top, right, bottom = box
    across, down = _cells(width, height, grid)
    seen = (*across.seen, *down.seen)
    square = (seen[0], seen[2], seen[1], seen[3])
    if not (square[0] <= left < right <= square[2] and square[1] <= top < bottom <= square[3]):
        shape = "square" if grid[0] == grid[1] else "part"
        whole = square == (0, 0, width, height)
        inside = "" if whole else f", in the {shape} {square} of it that the model sees"
        raise UserError(
            f"box is {tuple(box)}; it must be (left, top, right, bottom) inside an image of "
            f"{width} x {height} pixels{inside}"
        )

    asked_RC = np.zeros(grid, bool)
    rows = slice(down.code(top, up=False), down.code(bottom, up=True))
    asked_RC[rows, across.code(left, up=False) : across.code(right, up=True)] = True
    return code_spans(asked_RC, segment=segment, layout=layout)


def mask_codes(mask_HW: np.ndarray, grid: Grid) -> np.ndarray:
    """The codes of an image that a mask of its pixels touches: boolean (rows, columns).

    The tokenizer sees the middle of an image, divided into cells of its grid. A code is touched if
    any pixel of its cell is, even one that the cell's edge cuts. Pixels outside the visible part
    touch none.
    """
    height, width = mask_HW.shape
    across, down = _cells(width, height, grid)
    touched_RC = np.zeros(grid, bool)
    for row, column in np.ndindex(*grid):
        touched_RC[row, column] = mask_HW[down.pixels(row), across.pixels(column)].any()
    return touched_RC


@dataclass(frozen=True)
class _Cells:
    """The cells along one axis of an image, centred on its middle;
    they may start between two pixels."""

    length: int
    """Pixels of the axis."""
    cells: int
    """Number of cells, of `num / den` pixels each."""
    num: int
    den: int

    @property
    def seen(self) -> tuple[int, int]:
        """Pixels [start, end) that the cells cover."""
        start = (self.length * self.den - self.cells * self.num) // (2 * self.den)
        return start, start - (-self.cells * self.num // self.den)

    def code(self, pixel: int, *, up: bool) -> int:
        """The cell at a pixel's edge, rounded down or up."""
        numerator = (2 * pixel - self.length) * self.den + self.cells * self.num
        rounded = -(-numerator // (2 * self.num)) if up else numerator // (2 * self.num)
        return min(max(rounded, 0), self.cells)

    def pixels(self, cell: int) -> slice:
        """The pixels that a cell touches."""
        start = self.length * self.den + (2 * cell - self.cells) * self.num
        end = start + 2 * self.num
        return slice(start // (2 * self.den), -(-end // (2 * self.den)))


def _cells(width: int, height: int, grid: Grid) -> tuple[_Cells, _Cells]:
    """Columns and rows of the largest cells whose grid fits into an image."""
    rows, columns = grid
    num, den = (width, columns) if width * rows <= height * columns else (height, rows)
    return _Cells(width, columns, num, den), _Cells(height, rows, num, den)


def code_spans(asked_GG: np.ndarray, *, segment: int, layout: Layout) -> list[AskedSpan]:
    """The codes of an image that are asked for, as spans: each run of them in reading order is one.

    . 1 1 .      two spans, of the codes 1 2 and 5 6
    . 1 1 .

    . . 1 1      one span, of the codes 2 to 7
    1 1 1 1

    The token that closes a row belongs to a span if the whole row does.
    """
    rows, columns = asked_GG.shape
    asked_RT = np.zeros((rows, layout.row_length(columns)), bool)
    asked_RT[:, :columns] = asked_GG
    asked_RT[:, columns:] = asked_GG.all(1, keepdims=True)
    asked_T = asked_RT.ravel()[: layout.image_length((rows, columns))]
    edges_N = np.flatnonzero(np.diff(asked_T, prepend=False, append=False))
    return [
        AskedSpan(segment, int(start), int(end))
        for start, end in zip(edges_N[::2], edges_N[1::2], strict=True)
    ]
