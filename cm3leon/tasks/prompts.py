"""Prompts for what is asked of a model by hand: any spans of a document, edits of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cm3leon.objectives.cm3 import rotate
from cm3leon.tasks.base import without_conditions
from cm3leon.tokenizers.document import lay_out
from cm3leon.tokenizers.layout import Layout
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Sample, TokenDocument, TokenSegment, UserError


class AskedSpan(NamedTuple):
    """Tokens [start, end) of the segment of that number, which are asked for."""

    segment: int
    start: int
    end: int


def spans_prompt(
    query: TokenDocument,
    spans: Sequence[AskedSpan],
    retrieved: Sequence[TokenDocument],
    vocab: Vocab,
) -> np.ndarray:
    """Asks for spans of a document by the form that the CM3 objective trains.

    `<eos> a red dog <break> I7 I2 I9 I4 <eos>` with the spans "red" and I2 I9 asks
    `<eos> a <mask:0> dog <break> I7 <mask:1> I4 <eos> <mask:0>`; `infilling` is the grammar of the answer.

    Raises:
        UserError: for no spans, more than there are sentinels, or spans that overlap or are not in order.
    """
    if not 0 < len(spans) <= vocab.sentinels:
        raise UserError(
            f"{len(spans)} spans are asked for; it must be from 1 to {vocab.sentinels}, one a sentinel"
        )
    laid_out = lay_out(Sample(query, tuple(retrieved)), vocab)
    own = [segment for segment in laid_out.segments if segment.is_query]
    places = [
        (own[span.segment].start + span.start, own[span.segment].start + span.end) for span in spans
    ]
    if any(start >= end for start, end in places) or any(a[1] > b[0] for a, b in pairwise(places)):
        raise UserError("spans must not be empty, and stand in order without overlap")
    rotated_T, _ = rotate(laid_out.ids_T, places, vocab)
    behind = sum(end - start + 2 for start, end in places)
    return rotated_T[: len(rotated_T) - behind + 1]


def unconditional_spans_prompt(
    query: TokenDocument,
    spans: Sequence[AskedSpan],
    retrieved: Sequence[TokenDocument],
    vocab: Vocab,
) -> np.ndarray | None:
    """The unconditional stream of `spans_prompt`: the same spans, and a mask for what guides them.

    `<eos> a red dog <break> I7 <mask:0> I4 <eos> <mask:0>` asks for I2 I9 under the text; beside it
    stands `<eos> <mask:1> <break> I7 <mask:0> I4 <eos> <mask:0>`. Words are asked for beside a masked
    image alike. None where spans of both modalities are asked for: what is left of a segment that is
    itself asked for is context of the answer, and there is nothing to guide by.
    """
    modalities = {query.segments[span.segment].modality for span in spans}
    if len(modalities) > 1:
        return None
    unguided = without_conditions(query, modalities.pop(), vocab, spans=len(spans))
    return None if unguided is None else spans_prompt(unguided, spans, retrieved, vocab)


def fill(
    query: TokenDocument, spans: Sequence[AskedSpan], answer: Sequence[int], vocab: Vocab
) -> TokenDocument:
    """The document with the answer to `spans_prompt` put where the spans were."""
    contents: list[list[int]] = [[]]
    for token in answer:
        if vocab.kind(token) == "sentinel":
            contents.append([])
        elif token != vocab.end_of_span:
            contents[-1].append(token)
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
    grid: int,
    width: int,
    height: int,
    layout: Layout,
) -> list[AskedSpan]:
    """The codes of an image that a box of its pixels touches, as spans: one for each row of codes, in order.

    The tokenizer sees the central square of an image. Codes run row by row, so that a box is a span in each of its
    rows; rows that it takes whole are one span together.

    Args:
        box: (left, top, right, bottom) in pixels of the image; right and bottom are outside.
        grid: codes of a row, and rows.
        width, height: of the image in pixels.
        layout: which says whether rows of codes are closed.

    Raises:
        UserError: for a box that is empty or leaves the square.
    """
    left, top, right, bottom = box
    side = min(width, height)
    margins = (width - side) // 2, (height - side) // 2
    square = (*margins, margins[0] + side, margins[1] + side)
    if not (square[0] <= left < right <= square[2] and square[1] <= top < bottom <= square[3]):
        seen = "" if width == height else f", in the square {square} of it that the model sees"
        raise UserError(
            f"box is {tuple(box)}; it must be (left, top, right, bottom) inside an image of "
            f"{width} x {height} pixels{seen}"
        )

    def code(pixel: int, length: int, *, up: bool) -> int:
        """The code at a pixel's edge, from the middle of the image, whose square may begin between two pixels."""
        numerator, denominator = (2 * pixel - (length - side)) * grid, 2 * side
        rounded = -(-numerator // denominator) if up else numerator // denominator
        return min(max(rounded, 0), grid)

    asked_GG = np.zeros((grid, grid), bool)
    rows = slice(code(top, height, up=False), code(bottom, height, up=True))
    asked_GG[rows, code(left, width, up=False) : code(right, width, up=True)] = True
    return code_spans(asked_GG, segment=segment, layout=layout)


def mask_codes(mask_HW: np.ndarray, grid: int) -> np.ndarray:
    """Which of an image's codes a mask of its pixels touches: boolean (grid, grid).

    The tokenizer sees the central square of an image, cut into `grid` x `grid` cells; a code is touched if a single
    pixel of its cell is, be it cut by the cell's edge. Pixels outside the square touch none.
    """
    side = min(mask_HW.shape)

    def pixels(cell: int, length: int) -> slice:
        """The pixels of one axis that a row or column of cells touches."""
        start = (length - side) * grid + 2 * cell * side
        return slice(start // (2 * grid), -(-(start + 2 * side) // (2 * grid)))

    height, width = mask_HW.shape
    touched_GG = np.zeros((grid, grid), bool)
    for row, column in np.ndindex(grid, grid):
        touched_GG[row, column] = mask_HW[pixels(row, height), pixels(column, width)].any()
    return touched_GG


def code_spans(asked_GG: np.ndarray, *, segment: int, layout: Layout) -> list[AskedSpan]:
    """The codes of an image that are asked for, as spans: each run of them in reading order is one.

    . 1 1 .      two spans, of the codes 1 2 and 5 6
    . 1 1 .

    . . 1 1      one span, of the codes 2 to 7
    1 1 1 1

    What closes a row belongs to a span where the whole row does.
    """
    rows, columns = asked_GG.shape
    asked_RT = np.zeros((rows, layout.image_length((1, columns))), bool)
    asked_RT[:, :columns] = asked_GG
    asked_RT[:, columns:] = asked_GG.all(1, keepdims=True)
    edges_N = np.flatnonzero(np.diff(asked_RT.ravel(), prepend=False, append=False))
    return [
        AskedSpan(segment, int(start), int(end))
        for start, end in zip(edges_N[::2], edges_N[1::2], strict=True)
    ]
