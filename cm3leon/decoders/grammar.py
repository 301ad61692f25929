"""Grammars: which tokens may come next, as generators that are sent each token.

A grammar yields the tokens that are allowed next, is sent the chosen one, and returns where the
answer ends. Nothing else is ever drawn, so a model cannot close an image early or put codes into a
text. A text of at most 3 pieces, then the image that it describes:

    yields text or <break>   is sent a      yields text or <break>   is sent dog
    yields text or <break>   is sent <break>                         (the text ends)
    yields codes, 16 times                                           (an image of 16 codes)
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
    """The modality whose decoder draws the token."""

    @property
    def forced(self) -> int | None:
        """The only id that is allowed; None if there is a choice."""
        return self.low if self.high == self.low + 1 else None


Grammar = Generator[Allowed, int, Any]
NewGrammar = Callable[[], Grammar]


def exactly(token: int, modality: Modality = "text") -> Allowed:
    """Only this token."""
    return Allowed(token, token + 1, modality=modality)


def a_code(vocab: Vocab) -> Allowed:
    """Any image code."""
    return Allowed(*vocab.id_range("image"), modality="image")


def text_or(vocab: Vocab, *ends: int) -> Allowed:
    """Any piece of text, or one of the special tokens `ends`."""
    first, end = vocab.id_range("text")
    return Allowed(0, end, tuple(token for token in range(first) if token not in ends))


def one_of(*tokens: int) -> Allowed:
    """Any of these special tokens."""
    low, high = min(tokens), max(tokens) + 1
    return Allowed(low, high, tuple(token for token in range(low, high) if token not in tokens))


def image(vocab: Vocab, tokens: int, closed: Collection[int] = ()) -> Grammar:
    """Exactly this many tokens: codes, and at the indices in `closed` the token that ends a row."""
    row_close = vocab.layout.row_close
    for index in range(tokens):
        if row_close is not None and index in closed:
            yield exactly(row_close, "image")
        else:
            yield a_code(vocab)


def in_order(tokens: Sequence[int]) -> Grammar:
    """Exactly these tokens."""
    for token in tokens:
        yield exactly(token)


def text(vocab: Vocab, max_tokens: int, *ends: int) -> Generator[Allowed, int, int | None]:
    """At most `max_tokens` tokens of text. One of `ends` ends it, as the last token,
    and is returned."""
    for _ in range(max_tokens):
        token = yield text_or(vocab, *ends)
        if token in ends:
            return token
    return None


@dataclass(frozen=True)
class Gap:
    """A span to fill in: exactly `length` tokens of an image,
    or at most `length` pieces of text."""

    modality: Modality
    length: int
    closed: tuple[int, ...] = ()
    """Indices in an image's span at which a row is closed."""


def infilling(vocab: Vocab, gaps: Sequence[Gap]) -> Grammar:
    """The spans one after the other, as the CM3 objective trains them.

    Each ends in `<end_of_span>`, and the next one begins with its sentinel. The prompt ends with
    `<mask:0>`; nothing follows the last span of codes.

        <mask:0> | red dog <end_of_span> <mask:1> I7 I2        two spans, a text and two codes
        prompt   | answer
    """
    for number, gap in enumerate(gaps):
        if number:
            yield exactly(vocab.sentinel(number))
        if gap.modality == "image":
            yield from image(vocab, gap.length, gap.closed)
            ended = False
        else:
            ended = (yield from text(vocab, gap.length, vocab.end_of_span)) is not None
        # An image's span, and a text that was cut at its length, are closed for the model.
        if not ended and number < len(gaps) - 1:
            yield exactly(vocab.end_of_span)


def interleaved(
    vocab: Vocab, *, first: Modality, grid: Grid, text_length: int, segments: int
) -> Grammar:
    """Text and images in turn, each image of these rows and columns, until a sample ends or has
    `segments` segments.

    In the paper's layout a text ends in `<break>`, and an image follows, or in `<eos>`; an image is
    followed by `<break>` and text, or by `<eos>`. In a layout with nothing between an image and a
    text, the text may be empty.
    """
    layout, end = vocab.layout, vocab.layout.end
    tokens = layout.image_length(grid)
    closed = layout.row_ends(grid[1], 0, tokens)
    opening = (*layout.before_an_image, *layout.sizes.get(grid, ()))
    modality = first

    for number in range(segments):
        last = number == segments - 1
        if modality == "text":
            # A text ends the sample, or opens the next image with its first token.
            ends = (end,) if last else (end, opening[0])
            ended = yield from text(vocab, text_length, *ends)
            if ended is None:
                ended = yield exactly(ends[-1])
            if ended != end:
                yield from in_order(opening[1:])
        else:
            yield from image(vocab, tokens, closed)
            yield from in_order(layout.image_close)

            # Behind an image the sample ends, or what separates it from the next text follows.
            between = layout.between_segments
            ended = None
            if last:
                ended = yield exactly(end)
            elif between:
                ended = yield one_of(end, between[0])
                if ended != end:
                    yield from in_order(between[1:])

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
        # The end of a row belongs to its image.
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
