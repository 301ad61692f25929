"""One training sample as an HTML page: what the model is trained on, drawn as the paper's figures 8 and 9 draw it.

The page is one file with nothing to fetch and no script. Every string is escaped: captions and ids come from data sets
and are trusted with nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from cm3leon.evaluation.report import _STYLE, _png_uri
from cm3leon.objectives.cm3 import Span
from cm3leon.tokenizers.document import LaidOut, SegmentSpan
from cm3leon.tokenizers.vocab import SPECIALS, Vocab
from cm3leon.types import Block

Kind = Literal["text", "image", "break", "eos", "mask", "end", "pad"]
SPECIAL_KINDS: tuple[Kind, ...] = ("pad", "eos", "break", "end")
"""Kinds of the special tokens, in the order of their ids."""

COLOURS = 6
"""Spans take turns in so many colours."""
MOST_CODES, FIRST_CODES, LAST_CODES = 16, 8, 3
"""A longer run of codes is abbreviated to its first and last ones."""
UNFOLDED = 8
"""A longer run of codes is folded in the table of tokens."""
PIXELS = 160
"""Side of a picture, in CSS pixels."""


# ------------------------------------------------------------------------------------------------ what is shown


@dataclass(frozen=True)
class Names:
    """Ids as people read them.

    Args:
        decode: ids of text -> the text.
        piece: id of text -> its piece, bytes that are no whole character as `\\xe2`.
    """

    vocab: Vocab
    decode: Callable[[np.ndarray], str]
    piece: Callable[[int], str]

    def kind(self, id_: int) -> Kind:
        """What an id stands for."""
        if id_ < len(SPECIALS):
            return SPECIAL_KINDS[id_]
        if id_ < self.vocab.image_start:
            return "text"
        return "image" if id_ < self.vocab.sentinel_start else "mask"

    def token(self, id_: int) -> str:
        """One token: a special token's name, a code's number, or a piece with its spaces visible."""
        match self.kind(id_):
            case "text":
                return visible(self.piece(id_)).replace(" ", "␣")
            case "image":
                return str(id_ - self.vocab.image_start)
            case "mask":
                return mask_name(id_ - self.vocab.sentinel_start)
            case _:
                return SPECIALS[id_]

    def run(self, ids_T: np.ndarray) -> str:
        """Tokens of one kind in a row: text as text, codes as `17 993 4 ... 12 8`, others by name."""
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
    """The text with all that cannot be seen escaped: newlines as `\\n`, terminal codes, marks of direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True, eq=False)
class ShownSegment:
    """A segment of the laid-out sample; for an image its pictures with their labels, that of its codes first."""

    span: SegmentSpan
    pictures: Sequence[tuple[str, np.ndarray]] = ()


@dataclass(frozen=True)
class ShownDocument:
    """A document of the sample: its part in it, its id, how it was found, and its segments."""

    role: str
    id: str
    note: str
    segments: Sequence[ShownSegment]


@dataclass(frozen=True)
class Companion:
    """A sample, or a piece of one, in a block: its name, the id of its query, and how many tokens it has there."""

    name: str
    query: str
    tokens: int


@dataclass(frozen=True, eq=False)
class ShownPiece:
    """Positions [start, end) of the laid-out sample as they are trained on, in a block.

    `spans` are those that were moved, as positions of the laid-out sample, and `source_T` has for each trained token
    its position there, -1 for one that was added; both are None where the objective changed the sample otherwise.
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
    def loss_T(self) -> np.ndarray:
        """The weight of each of its tokens as a target; the first one is none."""
        weight_T = self.block.weight_T[self.block.sample_T == self.number]
        return np.concatenate([[0], weight_T[:-1]]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class ShownSample:
    """All there is to see of a training sample."""

    title: str
    facts: Sequence[tuple[str, str]]
    names: Names
    laid_out: LaidOut
    documents: Sequence[ShownDocument]
    pieces: Sequence[ShownPiece]
    grid: int

    @property
    def spans(self) -> list[tuple[str, Span]]:
        """The name and the positions of each moved span, over all pieces."""
        found: list[tuple[str, Span]] = []
        for number, piece in enumerate(self.pieces, 1):
            where = f" of piece {number}" if len(self.pieces) > 1 else ""
            found += [(mask_name(k) + where, span) for k, span in enumerate(piece.spans or ())]
        return found

    def document_at(self, position: int) -> str:
        """The role of the document that a position of the laid-out sample belongs to, empty between documents."""
        for document in self.documents:
            if document.segments and document.segments[0].span.start <= position < document.segments[-1].span.end:
                return document.role
        return ""


def runs(ids_T: np.ndarray, names: Names, *keys_T: np.ndarray) -> Iterator[tuple[int, int]]:
    """Divides a sequence into runs [start, end) of text or of codes that agree in all keys, and single other tokens."""
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


def covering(spans: Sequence[Span], length: int) -> np.ndarray:
    """The number of the span that each position lies in, -1 for none: int64 (T,)."""
    numbers_T = np.full(length, -1)
    for number, (start, end) in enumerate(spans):
        numbers_T[start:end] = number
    return numbers_T


# ------------------------------------------------------------------------------------------------ the page


def render_sample(sample: ShownSample) -> str:
    """The page as HTML."""
    sections = [
        ("The sample", "As it is laid out, before anything is moved.", [_strip(sample)]),
        *(_piece_section(sample, piece, number) for number, piece in enumerate(sample.pieces, 1)),
    ]
    body = "\n".join(
        f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>\n{chr(10).join(blocks)}</section>"
        for title, text, blocks in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(sample.title)}</title>
<style>{_STYLE}{_SAMPLE_STYLE}</style>
</head>
<body>
<header><h1>{escape(sample.title)}</h1></header>
<main>
{_facts(sample.facts)}
{_legend()}
{body}
</main>
</body>
</html>
"""


def write_sample_page(path: Path, sample: ShownSample) -> None:
    """Writes the page, whole or not at all."""
    page = render_sample(sample).encode("utf-8", errors="xmlcharrefreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(page)
    partial.replace(path)


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "\n".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in facts)
    return f'<figure class="table summary"><table><tbody>\n{rows}\n</tbody></table></figure>'


LEGEND: tuple[tuple[Kind, str], ...] = (
    ("text", "text"),
    ("image", "image code"),
    ("break", "<break>"),
    ("eos", "<eos>"),
    ("mask", "sentinel"),
    ("end", "<end_of_span>"),
    ("pad", "padding"),
)


def _legend() -> str:
    items = "".join(f'<li><span class="chip {kind}">{escape(name)}</span></li>' for kind, name in LEGEND)
    moved = '<li><span class="chip moved c0">moved span</span></li><li><span class="chip text off">no loss</span></li>'
    return f'<ul class="key">{items}{moved}</ul>'


# The strip of figures 8 and 9


def _strip(sample: ShownSample) -> str:
    """Segments as boxes in order, those of a document in a frame of its own, special tokens between them."""
    ids_T, parts, position = sample.laid_out.ids_T, [], 0
    for document in sample.documents:
        first = document.segments[0].span.start if document.segments else position
        parts += [_chip(sample.names, int(id_)) for id_ in ids_T[position:first]]
        boxes = []
        for segment in document.segments:
            boxes += [_chip(sample.names, int(id_)) for id_ in ids_T[max(position, first) : segment.span.start]]
            boxes.append(_box(sample, segment))
            position = segment.span.end
        parts.append(
            f'<div class="document {"query" if document.role == "query" else "found"}">'
            f"<header><b>{escape(document.role)}</b> <code>{escape(visible(document.id))}</code>"
            f"<span>{escape(document.note)}</span></header>"
            f'<div class="flow">{"".join(boxes)}</div></div>'
        )
    parts += [_chip(sample.names, int(id_)) for id_ in ids_T[position:]]
    return f'<div class="flow sample">{"".join(parts)}</div>'


def _chip(names: Names, id_: int) -> str:
    return f'<span class="chip {names.kind(id_)}">{escape(names.token(id_))}</span>'


def _box(sample: ShownSample, segment: ShownSegment) -> str:
    span = segment.span
    unit = "codes" if span.modality == "image" else "pieces"
    where = f"{span.end - span.start} {unit}, tokens {_range(span.start, span.end)}"
    content = _text_box(sample, span) if span.modality == "text" else _image_box(sample, segment)
    return f'<figure class="box {span.modality}">{content}<figcaption class="label">{where}</figcaption></figure>'


def _text_box(sample: ShownSample, span: SegmentSpan) -> str:
    """The text, with the moved spans marked."""
    ids_T, spans = sample.laid_out.ids_T[span.start : span.end], sample.spans
    number_T = covering([where for _, where in spans], len(sample.laid_out.ids_T))[span.start : span.end]
    words = []
    for start, end in runs(ids_T, sample.names, number_T):
        text, number = escape(sample.names.run(ids_T[start:end])), int(number_T[start])
        words.append(text if number < 0 else f"<mark{_colour(number)}>{_tag(spans[number][0])}{text}</mark>")
    return f'<p class="words">{"".join(words)}</p>'


def _image_box(sample: ShownSample, segment: ShownSegment) -> str:
    """The pictures, the first one with the moved codes marked, and the codes."""
    span, spans = segment.span, sample.spans
    number_T = covering([where for _, where in spans], len(sample.laid_out.ids_T))[span.start : span.end]
    pictures = []
    for place, (label, pixels_HWC) in enumerate(segment.pictures):
        overlay = _overlay(number_T, sample.grid) if place == 0 else ""
        pictures.append(
            f'<figure><div class="picture"><img class="pixelated" src="{_png_uri(pixels_HWC)}" width="{PIXELS}" '
            f'height="{PIXELS}" alt="{escape(label)}">{overlay}</div>'
            f'<figcaption class="label">{escape(label)}</figcaption></figure>'
        )
    tags = "".join(
        f"<mark{_colour(number)}>{_tag(spans[number][0])}{np.count_nonzero(number_T == number)} codes</mark> "
        for number in np.unique(number_T[number_T >= 0]).tolist()
    )
    codes = escape(sample.names.run(sample.laid_out.ids_T[span.start : span.end])) if len(number_T) else ""
    return f'<div class="pictures">{"".join(pictures)}</div><p class="codes">{codes} {tags}</p>'


def _overlay(number_T: np.ndarray, grid: int) -> str:
    """Moved codes as coloured cells over the picture: a rectangle for each row of cells of one span."""
    cells = []
    for start, end in _stretches(number_T):
        for row in range(start // grid, (end - 1) // grid + 1):
            left, right = max(start, row * grid), min(end, (row + 1) * grid)
            x = left - row * grid
            cells.append(f'<rect{_colour(int(number_T[start]))} x="{x}" y="{row}" width="{right - left}" height="1"/>')
    return f'<svg viewBox="0 0 {grid} {grid}" aria-hidden="true">{"".join(cells)}</svg>' if cells else ""


def _stretches(number_T: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs [start, end) of one span each."""
    borders = [0, *(np.flatnonzero(np.diff(number_T)) + 1).tolist(), len(number_T)]
    return ((start, end) for start, end in pairwise(borders) if start < end and number_T[start] >= 0)


def _colour(number: int) -> str:
    return f' class="moved c{number % COLOURS}"'


def _tag(name: str) -> str:
    return f'<span class="tag">{escape(name)}</span>'


def _range(start: int, end: int) -> str:
    return f"{start:,}–{end - 1:,}" if end - start > 1 else f"{start:,}"


# A piece of it in its block


def _piece_section(sample: ShownSample, piece: ShownPiece, number: int) -> tuple[str, str, list[str]]:
    whole = len(sample.pieces) == 1
    title = "As it is trained on" if whole else f"Piece {number} of {len(sample.pieces)}, as it is trained on"
    part = "" if whole else f"Tokens {_range(piece.start, piece.end)} of the sample. "
    if piece.spans is None:
        moved = "The objective changed the sample otherwise than by moving spans."
    elif piece.spans:
        moved = "Each span gives its place to a sentinel, and comes again at the end, behind the same sentinel."
    else:
        moved = "No span was drawn: it is trained on from left to right."
    blocks = [_rotation(sample, piece), _block(piece), _tokens(sample, piece)]
    return title, part + moved, blocks


@dataclass(frozen=True)
class _Bar:
    """A run of tokens as a box of the picture: its ends, and its left and right side in CSS pixels."""

    start: int
    end: int
    left: float
    right: float
    label: str
    kind: Kind


GAP, LETTER, TALL, ROW_1, ROW_2, LOW = 3, 6.6, 30, 34, 128, 172
"""Measures of the picture of a rotation, in CSS pixels: between boxes, a letter, a box, the tops of rows, in all."""


def _bars(sample: ShownSample, ids_T: np.ndarray, *keys_T: np.ndarray) -> list[_Bar]:
    """Boxes wide enough for their labels; longer runs have wider ones, but not in proportion: all are to be seen."""
    bars, left = [], 0.0
    for start, end in runs(ids_T, sample.names, *keys_T):
        kind = sample.names.kind(int(ids_T[start]))
        text = sample.names.run(ids_T[start:end])
        label = f"{end - start} codes" if kind == "image" else text if len(text) <= 24 else f"{text[:22]}…"
        right = left + max(LETTER * len(label) + 10, 8 * (end - start) ** 0.5)
        bars.append(_Bar(start, end, left, right, label, kind))
        left = right + GAP
    return bars


def _rotation(sample: ShownSample, piece: ShownPiece) -> str:
    """The piece as it is laid out over the piece as it is trained on, with a band from each span to its new place."""
    ids_T = sample.laid_out.ids_T[piece.start : piece.end]
    spans = [(start - piece.start, end - piece.start) for start, end in piece.spans or ()]
    place_T = np.array([sample.document_at(p) for p in range(piece.start, piece.end)])
    number_T = covering(spans, len(ids_T))
    above = _bars(sample, ids_T, number_T, place_T)
    source_T = np.full(len(piece.ids_T), -1) if piece.source_T is None else piece.source_T - piece.start
    moved_T = np.where(source_T >= 0, number_T[source_T], -1)
    below = _bars(sample, piece.ids_T, moved_T, piece.loss_T > 0)
    first = sum(name.startswith(mask_name(0)) for name, _ in sample.spans[: sample_offset(sample, piece)])
    offset = sample_offset(sample, piece)
    del first
    bands = _bands(above, below, number_T, moved_T, offset)
    upper = "".join(_bar(bar, ROW_1, int(number_T[bar.start]), offset, True) for bar in above)
    lower = "".join(
        _bar(bar, ROW_2, int(moved_T[bar.start]), offset, bool(piece.loss_T[bar.start] > 0)) for bar in below
    )
    width = max(above[-1].right, below[-1].right) + 2
    return (
        f'<figure><div class="scroll" role="region" tabindex="0" aria-label="The rotation">'
        f'<svg class="rotation" width="{width:.0f}" height="{LOW}" viewBox="-1 0 {width:.0f} {LOW}" role="img" '
        f'aria-label="Spans and where they went">{bands}{_brackets(above, place_T)}{upper}{lower}</svg></div></figure>'
    )
