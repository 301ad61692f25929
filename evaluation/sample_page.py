"""One training sample as an HTML page: what the model is trained on, drawn as the paper's figures 8 and 9 draw it.

The page is one file with nothing to fetch and no script. Every string is escaped: captions and ids come from data sets
and are trusted with nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from cm3leon.evaluation.report import html_page, png_uri, write_page
from cm3leon.objectives.cm3 import Span
from cm3leon.tokenizers.document import LaidOut, SegmentSpan
from cm3leon.tokenizers.vocab import SPECIALS, Vocab
from cm3leon.types import Block

T = TypeVar("T")
Kind = Literal["text", "image", "break", "eos", "mask", "end", "pad"]
SPECIAL_KINDS: tuple[Kind, ...] = ("pad", "eos", "break", "end")
"""Kinds of the special tokens, in the order of their ids."""

COLOURS = 6
"""Spans take turns in so many colours."""
MOST_CODES, FIRST_CODES, LAST_CODES = 16, 8, 3
"""A longer run of codes is abbreviated to its first and last ones."""
UNFOLDED = 8
"""A longer run of codes is folded in the table of tokens."""
PIXELS = 112
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
        kind = self.vocab.kind(id_)
        if kind == "special":
            return SPECIAL_KINDS[id_]
        return kind if kind in ("text", "image") else "mask"

    def token(self, id_: int) -> str:
        """One token: a special token's name, a code's number, or a piece with its spaces visible."""
        match self.kind(id_):
            case "text":
                return visible(self.piece(id_)).replace(" ", "␣")
            case "image":
                return str(self.vocab.image_codes(np.array(id_)))
            case "mask":
                return mask_name(int(self.vocab.sentinel_numbers(np.array(id_))))
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
    def tail(self) -> int:
        """Where its moved spans begin, each between its sentinel and `<end_of_span>`; its length if there are none."""
        return len(self.ids_T) - sum(end - start + 2 for start, end in self.spans or ())

    @property
    def loss_T(self) -> np.ndarray:
        """The weight of each of its tokens as a target; the first one is none."""
        weight_T = self.block.weight_T[self.block.sample_T == self.number]
        return np.concatenate([[0], weight_T[:-1]]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class ShownSample:
    """All there is to see of a training sample.

    `left_out` are the ids of retrieved documents that its block has no room for; `grid` is the side of an image, in
    codes.
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
            where = f" of piece {number}" if len(self.pieces) > 1 else ""
            found += [(mask_name(k) + where, span) for k, span in enumerate(piece.spans or ())]
        return found

    @cached_property
    def span_numbers(self) -> np.ndarray:
        """Which of `spans` each position of the laid-out sample lies in, -1 for none: int64 (T,)."""
        numbers_T = np.full(len(self.laid_out.ids_T), -1)
        for number, (_, (start, end)) in enumerate(self.spans):
            numbers_T[start:end] = number
        return numbers_T

    def moved(self, piece: ShownPiece) -> np.ndarray:
        """Which of `spans` each token of a piece belongs to, sentinels included, -1 for none: int64 (T,)."""
        if piece.source_T is None:
            return np.full(len(piece.ids_T), -1)
        before = sum(len(other.spans or ()) for other in self.pieces if other.start < piece.start)
        numbers_T = np.where(piece.source_T >= 0, self.span_numbers[piece.source_T], -1)
        masks_T = self.names.vocab.is_sentinel(piece.ids_T)
        numbers_T[masks_T] = before + self.names.vocab.sentinel_numbers(piece.ids_T[masks_T])
        return numbers_T

    def document_at(self, position: int) -> str:
        """The role of the document that a position of the laid-out sample belongs to, empty between documents."""
        for document in self.documents:
            if (
                document.segments
                and document.segments[0].span.start <= position < document.segments[-1].span.end
            ):
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


# ------------------------------------------------------------------------------------------------ the page


def render_sample(sample: ShownSample, facts: Sequence[tuple[str, str]]) -> str:
    """The page as HTML; `facts` are the rows of its first table."""
    sections = [
        ("The sample", "As it is laid out, before anything is moved.", [_strip(sample)]),
        *(_piece_section(sample, piece, number) for number, piece in enumerate(sample.pieces, 1)),
    ]
    body = "\n".join(
        f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>\n{chr(10).join(blocks)}</section>"
        for title, text, blocks in sections
    )
    return html_page(
        sample.title,
        f"""<header><h1>{escape(sample.title)}</h1></header>
<main>
{_facts(facts)}
{_legend()}
{body}
</main>""",
        style=_SAMPLE_STYLE,
    )


def write_sample_page(path: Path, sample: ShownSample, facts: Sequence[tuple[str, str]]) -> None:
    """Writes the page, whole or not at all."""
    write_page(path, render_sample(sample, facts))


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>'
        for key, value in facts
    )
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
    items = "".join(
        f'<li><span class="chip {kind}">{escape(name)}</span></li>' for kind, name in LEGEND
    )
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
            boxes += [
                _chip(sample.names, int(id_))
                for id_ in ids_T[max(position, first) : segment.span.start]
            ]
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


def _chip(names: Names, id_: int, mark: str = "") -> str:
    return f'<span class="chip {names.kind(id_)}{mark}">{escape(names.token(id_))}</span>'


def _box(sample: ShownSample, segment: ShownSegment) -> str:
    span = segment.span
    count = span.end - span.start
    share = (
        _codes(count)
        if span.modality == "image"
        else f"{count:,} {'piece' if count == 1 else 'pieces'}"
    )
    where = f"{share}, {'token' if count == 1 else 'tokens'} {_range(span.start, span.end)}"
    content = _text_box(sample, span) if span.modality == "text" else _image_box(sample, segment)
    return f'<figure class="box {span.modality}">{content}<figcaption class="label">{where}</figcaption></figure>'


def _text_box(sample: ShownSample, span: SegmentSpan) -> str:
    """The text, with the moved spans marked."""
    ids_T, spans = sample.laid_out.ids_T[span.start : span.end], sample.spans
    number_T = sample.span_numbers[span.start : span.end]
    words = []
    for start, end in runs(ids_T, sample.names, number_T):
        text, number = escape(sample.names.run(ids_T[start:end])), int(number_T[start])
        words.append(
            text if number < 0 else f"<mark{_colour(number)}>{_tag(spans[number][0])}{text}</mark>"
        )
    return f'<p class="words">{"".join(words)}</p>'


def _image_box(sample: ShownSample, segment: ShownSegment) -> str:
    """The pictures, the first one with the moved codes marked, and the codes."""
    span, spans = segment.span, sample.spans
    number_T = sample.span_numbers[span.start : span.end]
    pictures = []
    for place, (label, pixels_HWC) in enumerate(segment.pictures):
        overlay = _overlay(number_T, sample.grid) if place == 0 else ""
        pictures.append(
            f'<figure><div class="picture"><img class="pixelated" src="{png_uri(pixels_HWC)}" width="{PIXELS}" '
            f'height="{PIXELS}" alt="{escape(label)}">{overlay}</div>'
            f'<figcaption class="label">{escape(label)}</figcaption></figure>'
        )
    tags = "".join(
        f"<mark{_colour(number)}>{_tag(spans[number][0])}{_codes(int((number_T == number).sum()))}</mark> "
        for number in np.unique(number_T[number_T >= 0]).tolist()
    )
    codes = (
        escape(sample.names.run(sample.laid_out.ids_T[span.start : span.end]))
        if len(number_T)
        else ""
    )
    return f'<div class="pictures">{"".join(pictures)}</div><p class="codes">{codes}</p><p class="codes">{tags}</p>'


def _overlay(number_T: np.ndarray, grid: int) -> str:
    """Moved codes as coloured cells over the picture: a rectangle for each row of cells of one span."""
    cells = []
    for start, end in _stretches(number_T):
        for row in range(start // grid, (end - 1) // grid + 1):
            left, right = max(start, row * grid), min(end, (row + 1) * grid)
            x = left - row * grid
            cells.append(
                f'<rect{_colour(int(number_T[start]))} x="{x}" y="{row}" width="{right - left}" height="1"/>'
            )
    return (
        f'<svg viewBox="0 0 {grid} {grid}" aria-hidden="true">{"".join(cells)}</svg>'
        if cells
        else ""
    )


def _stretches(number_T: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs [start, end) of one span each."""
    borders = [0, *(np.flatnonzero(np.diff(number_T)) + 1).tolist(), len(number_T)]
    return (
        (start, end) for start, end in pairwise(borders) if start < end and number_T[start] >= 0
    )


def _codes(count: int) -> str:
    return f"{count:,} {'code' if count == 1 else 'codes'}"


def _colour(number: int) -> str:
    return f' class="moved c{number % COLOURS}"'


def _tag(name: str) -> str:
    return f'<span class="tag">{escape(name)}</span>'


def _range(start: int, end: int) -> str:
    return f"{start:,}–{end - 1:,}" if end - start > 1 else f"{start:,}"


# A piece of it in its block


def _piece_section(
    sample: ShownSample, piece: ShownPiece, number: int
) -> tuple[str, str, list[str]]:
    whole = len(sample.pieces) == 1
    title = (
        "As it is trained on"
        if whole
        else f"Piece {number} of {len(sample.pieces)}, as it is trained on"
    )
    part = "" if whole else f"Tokens {_range(piece.start, piece.end)} of the sample. "
    if piece.spans is None:
        moved = "The objective changed the sample otherwise than by moving spans."
    elif piece.spans:
        moved = (
            "Each span gives its place to a sentinel and is generated at the end, behind the same sentinel: above the "
            "laid-out tokens, below what stays of them, and what comes behind."
        )
    else:
        moved = "No span was drawn: it is trained on from left to right."
    blocks = [_rotation(sample, piece), _block(piece), _tokens(sample, piece)]
    return title, part + moved, blocks


@dataclass(frozen=True)
class _Bar:
    """A run of tokens as a box of the picture: its ends, its left and right side in CSS pixels, and its span."""

    start: int
    end: int
    left: float
    right: float
    label: str
    kind: Kind
    span: int


GAP, LETTER, TALL, ROWS = 3, 6.7, 28, (34, 106, 178)
"""The picture of a rotation, in CSS pixels: between boxes, a letter, the height of a box, the tops of its rows."""


def _bars(names: Names, ids_T: np.ndarray, span_T: np.ndarray, *keys_T: np.ndarray) -> list[_Bar]:
    """Boxes wide enough for their labels; longer runs have wider ones, not in proportion: all of it is to be seen."""
    bars, left = [], 0.0
    for start, end in runs(ids_T, names, span_T, *keys_T):
        kind = names.kind(int(ids_T[start]))
        text = names.run(ids_T[start:end])
        label = (
            _codes(end - start) if kind == "image" else text if len(text) <= 17 else f"{text[:16]}…"
        )
        right = left + max(LETTER * len(label) + 10, 3 * (end - start) ** 0.5)
        bars.append(_Bar(start, end, left, right, label, kind, int(span_T[start])))
        left = right + GAP
    return bars


def _rotation(sample: ShownSample, piece: ShownPiece) -> str:
    """Three rows: the piece as it is laid out, what stays of it, and the moved spans; bands lead from row to row."""
    start, end, tail = piece.start, piece.end, piece.tail
    role_T = np.array([sample.document_at(position) for position in range(start, end)])
    moved_T, has_loss_T = sample.moved(piece), piece.loss_T > 0
    above = _bars(
        sample.names, sample.laid_out.ids_T[start:end], sample.span_numbers[start:end], role_T
    )
    stays = _bars(sample.names, piece.ids_T[:tail], moved_T[:tail], has_loss_T[:tail])
    behind = _bars(sample.names, piece.ids_T[tail:], moved_T[tail:], has_loss_T[tail:])
    shapes = [
        _bracket(role, [bar for bar in above if role_T[bar.start] == role])
        for role in _in_order(role_T)
        if role
    ]
    for span in _in_order(bar.span for bar in above if bar.span >= 0):
        shapes.append(_band(above, stays, span, ROWS[0]) + _band(stays, behind, span, ROWS[1]))
    shapes += [_bar(bar, ROWS[0]) for bar in above]
    if behind:
        shapes += [_bar(bar, ROWS[1], has_loss=bool(has_loss_T[bar.start])) for bar in stays]
        shapes += [
            _bar(bar, ROWS[2], has_loss=bool(has_loss_T[tail + bar.start])) for bar in behind
        ]
    width = max(bars[-1].right for bars in (above, stays, behind) if bars) + 2
    height = ROWS[2 if behind else 0] + TALL + 2
    return (
        '<figure class="scroll" role="region" tabindex="0" aria-label="The rotation">'
        f'<svg class="rotation" width="{width:.0f}" height="{height}" viewBox="-1 0 {width:.0f} {height}" role="img" '
        f'aria-label="Spans, and where they went">{"".join(shapes)}</svg></figure>'
    )


def _in_order(items: Iterable[T]) -> list[T]:
    """The different ones, as they come."""
    return list(dict.fromkeys(items))


def _bar(bar: _Bar, top: int, *, has_loss: bool = True) -> str:
    """A run as a box with its label."""
    names = [
        bar.kind,
        *([f"moved c{bar.span % COLOURS}"] if bar.span >= 0 else []),
        *([] if has_loss else ["off"]),
    ]
    middle = (bar.left + bar.right) / 2
    return (
        f'<g class="{" ".join(names)}"><rect x="{bar.left:.1f}" y="{top}" width="{bar.right - bar.left:.1f}" '
        f'height="{TALL}" rx="3"/><text x="{middle:.1f}" y="{top + TALL / 2 + 4:.0f}">{escape(bar.label)}</text></g>'
    )


def _band(upper: Sequence[_Bar], lower: Sequence[_Bar], span: int, row: int) -> str:
    """From the boxes of a span in one row to those in the next."""
    top, bottom = row + TALL, row + ROWS[1] - ROWS[0]
    middle = (top + bottom) / 2
    (a, b), (c, d) = (
        (bars[0].left, bars[-1].right)
        for bars in ([x for x in y if x.span == span] for y in (upper, lower))
    )
    return (
        f'<path class="band c{span % COLOURS}" d="M{a:.1f} {top}C{a:.1f} {middle} {c:.1f} {middle} {c:.1f} {bottom}'
        f'H{d:.1f}C{d:.1f} {middle} {b:.1f} {middle} {b:.1f} {top}Z"/>'
    )


def _bracket(role: str, bars: Sequence[_Bar]) -> str:
    left, right = bars[0].left, bars[-1].right
    return (
        f'<g class="bracket"><path d="M{left:.1f} {ROWS[0] - 6}v-5H{right:.1f}v5"/>'
        f'<text x="{(left + right) / 2:.1f}" y="{ROWS[0] - 16}">{escape(role)}</text></g>'
    )


def _block(piece: ShownPiece) -> str:
    """The block as a bar of its samples, and a table of them."""
    seq_len, start = len(piece.block.ids_T), 0
    bars, rows = [], []
    for number, companion in enumerate(piece.samples):
        name = "this sample" if number == piece.number else f"sample {companion.name}"
        tokens, where = companion.tokens, _range(start, start + companion.tokens)
        mine = ' class="mine"' if number == piece.number else ""
        bars.append(
            f'<div{mine} style="flex:{tokens}" title="{escape(name)}: {where}">{escape(companion.name)}</div>'
        )
        rows.append(
            f'<tr{mine}><th scope="row">{number}</th><td>{escape(name)}</td>'
            f"<td><code>{escape(visible(companion.query))}</code></td>"
            f'<td class="number">{tokens:,}</td><td class="number">{where}</td></tr>'
        )
        start += tokens
    if start < seq_len:
        bars.append(f'<div class="rest" style="flex:{seq_len - start}" title="padding"></div>')
        rows.append(
            f'<tr><th scope="row">–</th><td>padding</td><td></td><td class="number">{seq_len - start:,}</td>'
            f'<td class="number">{_range(start, seq_len)}</td></tr>'
        )
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("in block", "sample", "query", "tokens", "positions")
    )
    return (
        f"<h3>Its block: row {piece.lane} of the batch of step {piece.step:,}</h3>"
        f'<div class="block" aria-hidden="true">{"".join(bars)}</div>'
        f'<figure class="table scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</figure>"
    )


# Its tokens

COLUMNS = (
    ("position", "its place in the block"),
    ("id", "of the vocabulary"),
    ("token", "the input"),
    ("target", "the token to predict from here on"),
    ("weight", "of the target in the loss"),
    ("sample", "number in the block: attention stays within"),
    ("position id", "that the model gets"),
    ("was at", "place in the laid-out sample"),
    ("document", "that it belongs to"),
)


def _tokens(sample: ShownSample, piece: ShownPiece) -> str:
    """All tokens of the piece with what the model is given of each; long runs of codes are folded."""
    ids_T, moved_T, loss_T = piece.ids_T, sample.moved(piece), piece.loss_T
    tables = []
    for start, end, folded in _folds(ids_T, sample.names, moved_T, loss_T):
        rows = "\n".join(_row(sample, piece, t, int(moved_T[t])) for t in range(start, end))
        table = f'<table class="tokens">{_COLGROUP}<tbody>\n{rows}\n</tbody></table>'
        if folded:
            free = "" if loss_T[start] > 0 else ", no loss"
            span = (
                f"<mark{_colour(int(moved_T[start]))}>moved</mark> " if moved_T[start] >= 0 else ""
            )
            words = escape(sample.names.run(ids_T[start:end]))
            where = _range(piece.first + start, piece.first + end)
            table = (
                f"<details><summary>{span}{where}: {_codes(end - start)}{free} "
                f"<code>{words}</code></summary>{table}</details>"
            )
        tables.append(table)
    head = "".join(f'<th scope="col" title="{about}">{name}</th>' for name, about in COLUMNS)
    return (
        f"<h3>Token by token</h3><p>A target whose weight is 0 is grey: nothing is learned from it.</p>"
        f'<div class="scroll all" role="region" tabindex="0" aria-label="Tokens">'
        f'<table class="tokens head">{_COLGROUP}<thead><tr>{head}</tr></thead></table>{"".join(tables)}</div>'
    )


_COLGROUP = (
    "<colgroup>"
    + "".join(f'<col class="k{number}"/>' for number in range(len(COLUMNS)))
    + "</colgroup>"
)


def _folds(ids_T: np.ndarray, names: Names, *keys_T: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """Divides the tokens into long runs of codes, which are folded, and what lies between these."""
    begin = 0
    for start, end in runs(ids_T, names, *keys_T):
        if names.kind(int(ids_T[start])) == "image" and end - start > UNFOLDED:
            if begin < start:
                yield begin, start, False
            yield start, end, True
            begin = end
    if begin < len(ids_T):
        yield begin, len(ids_T), False


def _row(sample: ShownSample, piece: ShownPiece, t: int, moved: int) -> str:
    names, block, at = sample.names, piece.block, piece.first + t
    id_, target, weight = int(block.ids_T[at]), int(block.target_T[at]), float(block.weight_T[at])
    source = -1 if piece.source_T is None else int(piece.source_T[t])
    was = f"{source:,}" if source >= 0 else "added" if piece.source_T is not None else "–"
    mark = f" moved c{moved % COLOURS}" if moved >= 0 else ""
    off = "" if weight > 0 else ' class="off"'
    return (
        f"<tr><td>{at}</td><td>{id_}</td><td>{_chip(names, id_, mark)}</td>"
        f"<td{off}>{_chip(names, target)}</td><td{off}>{weight:g}</td>"
        f"<td>{int(block.sample_T[at])}</td><td>{int(block.position_T[at])}</td><td>{was}</td>"
        f"<td>{escape(sample.document_at(source))}</td></tr>"
    )


_SAMPLE_STYLE = """
:root {
  --text: #e9eef6; --image: #e6f1e8; --break: #ece9e2; --eos: #dedad0; --end: #f3e3d6;
  --c0: #c2410c; --c1: #2563eb; --c2: #7c3aed; --c3: #0f766e; --c4: #be185d; --c5: #a16207;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --text: #26303f; --image: #223329; --break: #33322e; --eos: #44423c; --end: #45362b;
    --c0: #fb923c; --c1: #7aa7ff; --c2: #b79bff; --c3: #4fc7b8; --c4: #f47fb6; --c5: #e0b341;
  }
}
html { font: 15px/1.5 var(--sans); }
body { max-width: 96rem; padding-top: 2.5rem; }
h1 { font: 500 2rem/1.2 var(--serif); max-width: none; }
h2 { font: 500 1.5rem/1.2 var(--serif); }
h3 { font: 600 1rem/1.3 var(--sans); margin: 2rem 0 0.6rem; }
section { padding-top: 2.5rem; }
section > figure { margin: 1rem 0; }
section > p { max-width: 60rem; }
code { font: 0.88em/1.4 var(--mono); }
.summary { margin: 1.5rem 0 1rem; }
.summary th { color: var(--quiet); white-space: nowrap; }
.summary th, .summary td { padding: 0.3rem 1.1rem 0.3rem 0 !important; }
.key { display: flex; flex-wrap: wrap; gap: 0.5rem; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.chip { display: inline-block; font: 0.8rem/1.5 var(--mono); padding: 0 0.35rem; border-radius: 3px; white-space: pre; }
.chip, .words, .codes, td code { unicode-bidi: isolate; }
.chip.text { background: var(--text); } .chip.image { background: var(--image); }
.chip.break { background: var(--break); } .chip.eos, .chip.pad { background: var(--eos); }
.chip.end { background: var(--end); }
.chip.mask { border: 1px solid var(--c, var(--quiet)); color: var(--c, inherit); font-weight: 600; }
.chip.moved:not(.mask), mark.moved { background: color-mix(in srgb, var(--c) 22%, var(--paper)); color: inherit; }
.chip.moved, mark.moved { box-shadow: inset 0 -2px var(--c); }
mark { padding: 0.05rem 0.15rem; border-radius: 2px; }
.off { opacity: 0.45; }
.tag { font: 600 0.68rem/1 var(--mono); color: var(--c); margin-right: 0.3rem; vertical-align: 0.35em; }

.flow { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem; }
.document { border: 1px solid var(--rule); border-radius: 6px; padding: 0.6rem 0.7rem; background: var(--tint); }
.document.query { border: 2px solid var(--ink); background: var(--paper); }
.document header { font-size: 0.85rem; margin-bottom: 0.5rem; }
.document header span { display: block; color: var(--quiet); font-size: 0.8rem; }
.box { border-radius: 4px; padding: 0.5rem 0.6rem; max-width: 100%; }
.box.text { background: var(--text); max-width: 17rem; }
.box > .label { max-width: none; }
.box.image { background: var(--image); width: min-content; min-width: 15rem; }
.words { font: 1.05rem/1.5 var(--serif); margin: 0; white-space: pre-wrap; }
.codes { font: 0.74rem/1.5 var(--mono); margin: 0.4rem 0 0; max-width: 34rem; }
.pictures { gap: 0.6rem; margin: 0; flex-wrap: nowrap; }
.picture { position: relative; width: max-content; }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.picture rect { fill: var(--c); fill-opacity: 0.5; }
.picture + .label { max-width: 112px; }

.scroll { overflow-x: auto; }
.rotation { display: block; }
.rotation text { font: 11px var(--mono); text-anchor: middle; fill: var(--ink); white-space: pre; }
.rotation rect { fill: var(--eos); }
.rotation .text rect { fill: var(--text); } .rotation .image rect { fill: var(--image); }
.rotation .break rect { fill: var(--break); } .rotation .end rect { fill: var(--end); }
.rotation .moved rect { fill: color-mix(in srgb, var(--c) 30%, var(--paper)); stroke: var(--c); }
.rotation .mask rect { fill: var(--paper); }
.rotation .band { fill: var(--c); fill-opacity: 0.16; stroke: var(--c); stroke-opacity: 0.5; }
.rotation .bracket path { fill: none; stroke: var(--quiet); }
.rotation .bracket text { fill: var(--quiet); font-family: var(--sans); }

.block { display: flex; gap: 2px; height: 2rem; font: 0.75rem/2rem var(--mono); text-align: center; }
.block div { background: var(--eos); min-width: 0; overflow: hidden; white-space: nowrap; border-radius: 3px; }
.block .mine { background: var(--ink); color: var(--paper); font-weight: 600; }
.block .rest { background: none; border: 1px dashed var(--rule); }
tr.mine > * { font-weight: 600 !important; }
.table th, .table td { padding-block: 0.25rem; }

.all { max-height: 40rem; overflow-y: auto; border-block: 1.5px solid var(--ink); }
.tokens { table-layout: fixed; width: 66rem; font: 0.8rem/1.45 var(--mono); }
.tokens th, .tokens td { text-align: left; font-weight: 400; padding: 0.05rem 0.6rem; }
.tokens th, .tokens td { overflow: hidden; white-space: pre; }
.tokens td:nth-child(-n+2), .tokens td:nth-child(n+5):nth-child(-n+8) { font-variant-numeric: tabular-nums; }
.tokens.head { position: sticky; top: 0; background: var(--paper); z-index: 1; border-bottom: 1px solid var(--ink); }
.tokens.head th { font: 600 0.8rem/2 var(--sans); }
.tokens .k2, .tokens .k3 { width: 11rem; } .tokens .k8 { width: 9rem; }
.tokens tbody tr:hover { background: var(--tint); }
details { border-block: 1px solid var(--rule); }
summary { font: 0.8rem/1.9 var(--sans); padding-left: 0.6rem; cursor: pointer; }
summary code { color: var(--quiet); }
@media (max-width: 40rem) {
  html { font-size: 15px; }
  h1 { font-size: 1.6rem; }
  .document, .flow > .box { max-width: 100%; min-width: 0; }
  .box.text { max-width: 100%; }
  .box.image { width: auto; min-width: 0; }
  .pictures { flex-wrap: wrap; }
  .key .chip { white-space: normal; }
  .summary th { white-space: normal; min-width: 5rem; }
}
@media print { .all { max-height: none; } }
"""
