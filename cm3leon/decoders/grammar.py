"""What may come next: grammars over modalities, as generators that are sent each token.

A grammar yields what the next token may be, is sent that token, and returns where the answer ends.
A model never closes an image early or puts codes into a text, because nothing else is ever drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cm3leon.tokenizers.layout import Grid
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Modality


@dataclass(frozen=True)
class Allowed:
    """The ids [low, high) without those in `closed`."""

    low: int
    high: int
    closed: tuple[int, ...] = ()
    modality: Modality = "text"
    """Which decoder draws."""

    @property
    def forced(self) -> int | None:
        """The one id that it can be, None where there is a choice."""
        return self.low if self.high == self.low + 1 else None


Grammar = Generator[Allowed, int, Any]
NewGrammar = Callable[[], Grammar]


def exactly(token: int, modality: Modality = "text") -> Allowed:
    """That token alone."""
    return Allowed(token, token + 1, modality=modality)


def a_code(vocab: Vocab) -> Allowed:
    """Any image code."""
    return Allowed(*vocab.id_range("image"), modality="image")


def text_or(vocab: Vocab, *ends: int) -> Allowed:
    """Any piece of text, or one of the special tokens `ends`."""
    first, end = vocab.id_range("text")
    return Allowed(0, end, tuple(token for token in range(first) if token not in ends))


def one_of(*tokens: int) -> Allowed:
    """Any of some special tokens."""
    return Allowed(
        min(tokens),
        max(tokens) + 1,
        tuple(token for token in range(min(tokens), max(tokens)) if token not in tokens),
    )


def image(vocab: Vocab, tokens: int, closed: Collection[int] = ()) -> Grammar:
    """Exactly that many tokens: codes, and at the places `closed` what closes their row."""
    row_close = vocab.layout.row_close
    for place in range(tokens):
        if row_close is not None and place in closed:
            yield exactly(row_close, "image")
        else:
            yield a_code(vocab)


def in_order(tokens: Sequence[int]) -> Grammar:
    """Exactly those tokens."""
    for token in tokens:
        yield exactly(token)


def text(vocab: Vocab, max_tokens: int, *ends: int) -> Generator[Allowed, int, int | None]:
    """At most that many tokens of text; one of `ends` ends it, is the last token then,
    and is returned."""
    for _ in range(max_tokens):
        token = yield text_or(vocab, *ends)
        if token in ends:
            return token
    return None


@dataclass(frozen=True)
class Gap:
    """A span that is asked for: exactly `length` tokens of an image,
    or at most `length` pieces of text."""

    modality: Modality
    length: int
    closed: tuple[int, ...] = ()
    """Tokens of an image's span that close a row."""


def infilling(vocab: Vocab, gaps: Sequence[Gap]) -> Grammar:
    """The spans one after the other, as the CM3 objective trains them.

    Each ends in `<end_of_span>`, and the next one begins with its sentinel. The prompt ends with
    `<mask:0>`; behind the last span of codes nothing is asked for.
    """
    for number, gap in enumerate(gaps):
        if number:
            yield exactly(vocab.sentinel(number))
        if gap.modality == "image":
            yield from image(vocab, gap.length, gap.closed)
            ended = False
        else:
            ended = (yield from text(vocab, gap.length, vocab.end_of_span)) is not None
        if not ended and number < len(gaps) - 1:
            yield exactly(vocab.end_of_span)


def interleaved(
    vocab: Vocab, *, first: Modality, grid: Grid, text_length: int, segments: int
) -> Grammar:
    """Text and images in turn, each image of that many rows and columns,
    until a sample's end or that many segments.

    By the paper's layout a text ends in `<break>`, and an image follows, or in `<eos>`; an image is
    followed by `<break>` and text, or by `<eos>`. Where nothing stands between an image and a text,
    the text may be empty.
    """
    layout, end = vocab.layout, vocab.layout.end
    tokens = layout.image_length(grid)
    closed = layout.row_ends(grid[1], 0, tokens)
    opening = (*layout.before_an_image, *layout.sizes.get(grid, ()))
    modality = first
    for number in range(segments):
        last = number == segments - 1
        if modality == "text":
            ends = (end,) if last else (end, opening[0])
            ended = yield from text(vocab, text_length, *ends)
            if ended is None:
                ended = yield exactly(ends[-1])
            if ended != end:
                yield from in_order(opening[1:])
        else:
            yield from image(vocab, tokens, closed)
            yield from in_order(layout.image_close)
            between = layout.between_segments
            ended = None
            if last or between:
                ended = yield exactly(end) if last else one_of(end, between[0])
                yield from in_order(between[1:] if ended != end else ())
        if ended == end:
            return
        modality = "image" if modality == "text" else "text"


def segments_of(tokens: Sequence[int], vocab: Vocab) -> Iterator[tuple[Modality, list[int]]]:
    """An answer as runs of text and of an image's tokens; special tokens and sentinels part them
    and are left out.

    So is a size that is written as text in front of an image.
    """
    run: list[int] = []
    current: Modality | None = None
    opens, opened = vocab.layout.image_open[-1:], False
    for token in [*tokens, vocab.eos]:
        if current == "image" and token == vocab.layout.row_close:
            run.append(token)
            continue
        kind = vocab.kind(token)
        modality: Modality | None = kind if kind in ("text", "image") else None
        opened = token in opens or (opened and modality == "text")
        if opened:
            modality = None
        if modality != current or modality is None:
            if current is not None and run:
                yield current, run
            run, current = [], modality
        if modality is not None:
            run.append(token)
