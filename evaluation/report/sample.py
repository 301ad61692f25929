"""One training sample as an HTML page: what the model is trained on, drawn like the paper's figures
8 and 9.

The page is one file with nothing to fetch and no script. Every string is escaped, since captions
and ids come from data sets and are not trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from cm3leon.evaluation.report import numbers
from cm3leon.evaluation.report.page import Cell, Picture, Table, fill, write_page
from cm3leon.objectives.cm3 import Span
from cm3leon.tokenizers.document import LaidOut, SegmentSpan
from cm3leon.tokenizers.layout import SPECIALS
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Block

Kind = Literal["text", "image", "break", "eos", "mask", "end", "pad"]
SPECIAL_KINDS: tuple[Kind, ...] = ("pad", "eos", "break", "end")
"""Kinds of the special tokens, in the order of their ids."""

MOST_CODES, FIRST_CODES, LAST_CODES = 16, 8, 3
"""A longer run of codes is abbreviated to its first and last codes."""
UNFOLDED = 8
"""A longer run of codes is folded in the table of tokens."""
PIXELS = 112
"""Side of an image, in CSS pixels."""

# The drawing of a rotation, in CSS pixels: between boxes, width of a letter, height of a box, tops
# of the rows.
GAP, LETTER, TALL, ROWS = 3, 6.7, 28, (34, 106, 178)
LONG_LABEL = 17
"""A longer label of a box is shortened."""


# ------------------------------------------------------------------------------------ what is shown


@dataclass(frozen=True)
class Names:
    """Ids as people read them.

    Args:
        decode: ids of text -> the text.
        piece: id of text -> its piece, bytes that are no whole character as `\\xe2`.
        specials: names of the special tokens, in the order of their ids.
    """

    vocab: Vocab
    decode: Callable[[np.ndarray], str]
    piece: Callable[[int], str]
    specials: Sequence[str] = SPECIALS

    def kind(self, id_: int) -> Kind:
        """What an id stands for."""
        kind = self.vocab.kind(id_)
        if kind == "special":
            return SPECIAL_KINDS[id_] if id_ < len(SPECIAL_KINDS) else "break"
        return kind if kind in ("text", "image") else "mask"

    def token(self, id_: int) -> str:
        """One token: a special token's name, a code's number, or a piece with visible spaces."""
        match self.kind(id_):
            case "text":
                return visible(self.piece(id_)).replace(" ", "␣")
            case "image":
                return str(self.vocab.image_codes(np.array(id_)))
            case "mask":
                return mask_name(int(self.vocab.sentinel_numbers(np.array(id_))))
            case _:
                return self.specials[id_]

    def run(self, ids_T: np.ndarray) -> str:
        """Tokens of one kind: text as text, codes as `17 993 4 ... 12 8`, others by name."""
        kind = self.kind(int(ids_T[0]))
        if kind == "text":
            return visible(self.decode(ids_T))
        words = [self.token(int(id_)) for id_ in ids_T]
        if kind == "image" and len(words) > MOST_CODES:
            words = [*words[:FIRST_CODES], "...", *words[-LAST_CODES:]]
        return " ".join(words)


def mask_name(number: int) -> str:
    """The name of a sentinel."""
    return f"<mask:{number}>"


def visible(text: str) -> str:
    """The text with all that cannot be seen escaped: newlines as `\\n`, terminal codes, marks of
    direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True, eq=False)
class ShownSegment:
    """A segment of the laid-out sample; for an image its pictures with labels, that of its codes
    first."""

    span: SegmentSpan
    pictures: Sequence[tuple[str, np.ndarray]] = ()


@dataclass(frozen=True)
class ShownDocument:
    """A document of the sample: its role, its id, how it was found, and its segments."""

    role: str
    id: str
    note: str
    segments: Sequence[ShownSegment]


@dataclass(frozen=True)
class Companion:
    """A sample, or a piece of one, in a block: its name, the id of its query, and its number of
    tokens."""

    name: str
    query: str
    tokens: int


@dataclass(frozen=True, eq=False)
class ShownPiece:
    """Positions [start, end) of the laid-out sample as they are trained on in a block.

    `spans` are the moved spans, as positions of the laid-out sample; `source_T` has for each
    trained token its position there, -1 for an added one. Both are None if the objective changed
    the sample in another way.
    """

    start: int
    end: int
    step: int
    lane: int
    block: Block
    number: int
    samples: Sequence[Companion]
    spans: Sequence[Span] | None
    source_T: np.ndarray | None

    @property
    def first(self) -> int:
        """Its first position in the block."""
        return int(np.flatnonzero(self.block.sample_T == self.number)[0])

    @property
    def ids_T(self) -> np.ndarray:
        """Its tokens."""
        return self.block.ids_T[self.block.sample_T == self.number]

    @property
    def tail(self) -> int:
        """Where its moved spans start, each between its sentinel and `<end_of_span>`; its length if
        it has none."""
        return len(self.ids_T) - sum(end - start + 2 for start, end in self.spans or ())

    @property
    def loss_T(self) -> np.ndarray:
        """The weight of each of its tokens as a target; the first token is not a target."""
        weight_T = self.block.weight_T[self.block.sample_T == self.number]
        return np.concatenate([[0], weight_T[:-1]]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class ShownSample:
    """Everything to show of a training sample.

    `left_out` are the ids of retrieved documents for which its block has no room; `grid` is the
    side of an image in codes.
    """

    title: str
    names: Names
    laid_out: LaidOut
    documents: Sequence[ShownDocument]
    left_out: Sequence[str]
    pieces: Sequence[ShownPiece]
    grid: int

    @cached_property
    def spans(self) -> list[tuple[str, Span]]:
        """The name and the positions of each moved span, over all pieces."""
        found: list[tuple[str, Span]] = []
        for number, piece in enumerate(self.pieces, 1):
            # Masks are numbered in each piece, so that with several the piece is named too.
            where = f" of piece {number}" if len(self.pieces) > 1 else ""
            for mask, span in enumerate(piece.spans or ()):
                found.append((mask_name(mask) + where, span))
        return found

    @cached_property
    def span_numbers(self) -> np.ndarray:
        """Index in `spans` of each position of the laid-out sample, -1 outside: int64 (T,)."""
        numbers_T = np.full(len(self.laid_out.ids_T), -1)
        for number, (_, (start, end)) in enumerate(self.spans):
            numbers_T[start:end] = number
        return numbers_T

    def moved(self, piece: ShownPiece) -> np.ndarray:
        """Index in `spans` of each token of a piece, sentinels included, -1 outside: int64 (T,)."""
        if piece.source_T is None:
            return np.full(len(piece.ids_T), -1)
        # A sentinel is numbered in its piece, and a span over all pieces.
        before = sum(len(other.spans or ()) for other in self.pieces if other.start < piece.start)
        numbers_T = np.where(piece.source_T >= 0, self.span_numbers[piece.source_T], -1)
        masks_T = self.names.vocab.is_sentinel(piece.ids_T)
        numbers_T[masks_T] = before + self.names.vocab.sentinel_numbers(piece.ids_T[masks_T])
        return numbers_T

    def words(self, span: SegmentSpan) -> list[tuple[str, int]]:
        """The text of a segment in parts, each with its index in `spans`, -1 outside."""
        ids_T = self.laid_out.ids_T[span.start : span.end]
        number_T = self.span_numbers[span.start : span.end]
        parts = []
        for start, end in runs(ids_T, self.names, number_T):
            parts.append((self.names.run(ids_T[start:end]), int(number_T[start])))
        return parts

    def moved_codes(self, span: SegmentSpan) -> dict[int, int]:
        """How many codes of an image lie in each of `spans`."""
        number_T = self.span_numbers[span.start : span.end]
        numbers_M, counts_M = np.unique(number_T[number_T >= 0], return_counts=True)
        return dict(zip(numbers_M.tolist(), counts_M.tolist(), strict=True))

    def moved_cells(self, span: SegmentSpan) -> Iterator[tuple[int, int, int, int]]:
        """Moved codes of an image as (index in `spans`, column, row, width), row by row."""
        number_T = self.span_numbers[span.start : span.end]
        borders = [0, *(np.flatnonzero(np.diff(number_T)) + 1).tolist(), len(number_T)]
        for start, end in pairwise(borders):
            if start == end or number_T[start] < 0:
                continue
            # A run of codes that goes over the end of a row continues at the start of the next.
            for row in range(start // self.grid, (end - 1) // self.grid + 1):
                first = row * self.grid
                left, right = max(start, first), min(end, first + self.grid)
                yield int(number_T[start]), left - first, row, right - left

    def document_at(self, position: int) -> str:
        """The role of the document at a position of the laid-out sample; "" between documents."""
        for document in self.documents:
            if not document.segments:
                continue
            first, last = document.segments[0].span, document.segments[-1].span
            if first.start <= position < last.end:
                return document.role
        return ""


def runs(ids_T: np.ndarray, names: Names, *keys_T: np.ndarray) -> Iterator[tuple[int, int]]:
    """Divide a sequence into runs [start, end) of text or codes that agree in all keys; each other
    token is a run."""
    kinds = [names.kind(int(id_)) for id_ in ids_T]
    start = 0
    for end in range(1, len(kinds) + 1):
        grows = (
            end < len(kinds)
            and kinds[end] == kinds[start]
            and kinds[start] in ("text", "image")
            and all(key_T[end] == key_T[start] for key_T in keys_T)
        )
        if not grows:
            yield start, end
            start = end


# ----------------------------------------------------------------------------------------- the page


def write_sample_page(
    path: Path, sample: ShownSample, facts: Sequence[tuple[str, str]], footer: str = ""
) -> None:
    """Write the page atomically."""
    write_page(path, render_sample(sample, facts, footer))


def render_sample(sample: ShownSample, facts: Sequence[tuple[str, str]], footer: str = "") -> str:
    """The page as HTML; `facts` are the rows of its first table, and `footer` names the images'
    licensors."""
    return fill(
        "sample.html",
        sample=sample,
        footer=footer,
        facts=Table(("", ""), facts),
        picture=lambda label, pixels_HWC: Picture(pixels_HWC, label, height=PIXELS),
        visible=visible,
        rotation_of=rotation_of,
        block_of=block_of,
        folds_of=folds_of,
    )


def block_of(piece: ShownPiece) -> Table:
    """The samples of the block, and the padding behind them."""
    rows: list[list[Cell]] = []
    start, seq_len = 0, len(piece.block.ids_T)
    for number, companion in enumerate(piece.samples):
        name = "this sample" if number == piece.number else f"sample {companion.name}"
        end = start + companion.tokens
        where = numbers.span(start, end)
        rows.append([number, name, visible(companion.query), companion.tokens, where])
        start = end
    if start < seq_len:
        rows.append([None, "padding", "", seq_len - start, numbers.span(start, seq_len)])
    columns = ("in block", "sample", "query", "tokens", "positions")
    return Table(columns, rows, highlight=frozenset({piece.number}))


def folds_of(sample: ShownSample, piece: ShownPiece) -> Iterator[tuple[int, int, bool]]:
    """The tokens of a piece as long runs of codes, which are folded, and what lies between them."""
    begin = 0
    for start, end in runs(piece.ids_T, sample.names, sample.moved(piece), piece.loss_T):
        is_image = sample.names.kind(int(piece.ids_T[start])) == "image"
        if is_image and end - start > UNFOLDED:
            if begin < start:
                yield begin, start, False
            yield start, end, True
            begin = end
    if begin < len(piece.ids_T):
        yield begin, len(piece.ids_T), False


# The drawing of a rotation


@dataclass(frozen=True)
class Bar:
    """A run of tokens from `start` as a box of the drawing, with its left and right side in CSS
    pixels."""

    start: int
    left: float
    right: float
    top: int
    kind: Kind
    label: str
    span: int
    has_loss: bool


@dataclass(frozen=True)
class Band:
    """A band from the boxes of a span in one row to those in the next row."""

    span: int
    above: tuple[float, float]
    below: tuple[float, float]
    top: int
    bottom: int


@dataclass(frozen=True)
class Rotation:
    """The drawing of a rotation: the sides of each document, bands of moved spans, and boxes of
    tokens."""

    documents: Mapping[str, tuple[float, float]]
    bands: Sequence[Band]
    bars: Sequence[Bar]
    width: float
    height: int
    tall: int = TALL


def rotation_of(sample: ShownSample, piece: ShownPiece) -> Rotation:
    """Three rows: the piece as it is laid out, what stays of it, and the moved spans behind it."""
    # What is laid out has no loss yet, so all of it is drawn as if it had.
    names, start, end, tail = sample.names, piece.start, piece.end, piece.tail
    moved_T, has_loss_T = sample.moved(piece), piece.loss_T > 0
    role_T = np.array([sample.document_at(position) for position in range(start, end)])
    above = _bars(
        names,
        ROWS[0],
        sample.laid_out.ids_T[start:end],
        sample.span_numbers[start:end],
        np.ones(end - start, bool),
        role_T,
    )
    stays = _bars(names, ROWS[1], piece.ids_T[:tail], moved_T[:tail], has_loss_T[:tail])
    behind = _bars(names, ROWS[2], piece.ids_T[tail:], moved_T[tail:], has_loss_T[tail:])

    # Documents are named above their boxes.
    documents: dict[str, list[Bar]] = {}
    for bar in above:
        documents.setdefault(str(role_T[bar.start]), []).append(bar)
    documents.pop("", None)  # special tokens between documents

    # Bands lead from where a span was to its sentinel, and on to where it went.
    bands = []
    for span in dict.fromkeys(bar.span for bar in above if bar.span >= 0):
        bands += [_band(above, stays, span), _band(stays, behind, span)]
    rows = [above, stays, behind] if behind else [above]
    return Rotation(
        {role: _sides(bars) for role, bars in documents.items()},
        bands,
        list(chain.from_iterable(rows)),
        width=max(bars[-1].right for bars in (above, stays, behind) if bars) + 2,
        height=ROWS[len(rows) - 1] + TALL + 2,
    )


def _bars(
    names: Names,
    top: int,
    ids_T: np.ndarray,
    span_T: np.ndarray,
    has_loss_T: np.ndarray,
    *keys_T: np.ndarray,
) -> list[Bar]:
    """Boxes wide enough for their labels; longer runs have wider boxes, but not in proportion, so
    that everything stays visible."""
    bars, left = [], 0.0
    for start, end in runs(ids_T, names, span_T, has_loss_T, *keys_T):
        kind, label = names.kind(int(ids_T[start])), names.run(ids_T[start:end])
        if kind == "image":
            label = numbers.counted(end - start, "code")
        elif len(label) > LONG_LABEL:
            label = f"{label[: LONG_LABEL - 1]}…"
        right = left + max(LETTER * len(label) + 10, 3 * (end - start) ** 0.5)
        has_loss = bool(has_loss_T[start])
        bars.append(Bar(start, left, right, top, kind, label, int(span_T[start]), has_loss))
        left = right + GAP
    return bars


def _sides(bars: Sequence[Bar]) -> tuple[float, float]:
    """The left side of the first box, and the right side of the last."""
    return bars[0].left, bars[-1].right


def _band(upper: Sequence[Bar], lower: Sequence[Bar], span: int) -> Band:
    above = [bar for bar in upper if bar.span == span]
    below = [bar for bar in lower if bar.span == span]
    return Band(span, _sides(above), _sides(below), above[0].top + TALL, below[0].top)
