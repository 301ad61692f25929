"""Base class of the tasks: a prompt for a document, and the document completed by the answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cm3leon.config import PositiveInt
from cm3leon.objectives.cm3 import Span, rotate
from cm3leon.tokenizers.document import lay_out
from cm3leon.tokenizers.layout import Grid
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Modality, Prompt, Sample, TokenDocument, TokenSegment, UserError


class Task:
    """Base of the tasks on documents of one text and one image."""

    retrieves_by: Modality
    """Modality of the query that documents are retrieved by."""
    answers_in: Modality
    """Modality of the answer."""
    guided: bool = False
    """Whether its prompts have an unconditional stream."""
    asked_again: bool = False
    """Whether a prompt has many right answers,
    so that it is worth asking again with another seed."""

    def __init__(self, config: Any, *, vocab: Vocab, grid: Grid) -> None:
        self.config = config
        self.vocab = vocab
        self.grid = grid
        self.image_tokens = vocab.layout.image_length(grid)

    def image_prompt(
        self,
        ids_T: np.ndarray,
        unconditional_T: np.ndarray | None = None,
        partial_T: np.ndarray | None = None,
    ) -> Prompt:
        """The prompt for a whole image behind `ids_T`, with its other streams."""
        return Prompt(
            ids_T,
            "image",
            self.image_tokens,
            self.vocab.layout.end,
            unconditional_T,
            partial_T,
            closed=self.vocab.layout.row_ends(self.grid[1], 0, self.image_tokens),
        )

    @property
    def fresh_image(self) -> TokenSegment:
        """The image that is asked for, without codes yet."""
        return TokenSegment("image", np.empty(0, np.int64), grid=self.grid)

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        """The prompt for the task's answer to `query`, with retrieved documents before it."""
        raise NotImplementedError

    def complete(self, query: TokenDocument, answer_T: np.ndarray) -> TokenDocument:
        """The query with the answer in its position."""
        raise NotImplementedError

    def shortened(self, query: TokenDocument) -> TokenDocument | None:
        """The query with less context, for a prompt that is too long;
        None if all of it is needed."""
        return None

    def keeps_given(self, query: TokenDocument, completed: TokenDocument) -> bool:
        """Whether a completed document has what the prompt gave, unchanged."""
        given: Modality = "image" if self.answers_in == "text" else "text"
        return np.array_equal(required(query, given).ids_T, required(completed, given).ids_T)


class TextOfImage(Task):
    """Base of the tasks that are asked about an image, and answered in text."""

    retrieves_by: Modality = "image"
    answers_in: Modality = "text"

    @dataclass(kw_only=True)
    class Config:
        """How long an answer may be."""

        max_tokens: PositiveInt = 64
        """An answer is cut at this many tokens."""

    config: Config

    def complete(self, query: TokenDocument, answer_T: np.ndarray) -> TokenDocument:
        return with_segment(query, "text", answer_T)


def infilling_prompt(
    sample: Sample,
    modality: Modality,
    span: Span,
    vocab: Vocab,
    *,
    length: int,
    closed: tuple[int, ...] = (),
) -> Prompt:
    """The prompt for a span of the query's segment of a modality, in the form that CM3 trains.

    The span [start, end) counts from the segment's start. "a red dog" with the span "red dog"
    becomes `<eos> a <mask:0> <break> I7 I2 I9 I4 <eos> <mask:0>`, and the answer ends in
    `<end_of_span>`.

    Args:
        length: most tokens of the answer.
        closed: which of them close a row of codes.
    """
    laid_out = lay_out(sample, vocab)
    segment = next(s for s in laid_out.segments if s.is_query and s.modality == modality)
    start, end = segment.start + span[0], segment.start + span[1]

    # The rotated sample ends in the span's tokens and `<end_of_span>`, which are the answer.
    rotated_T, _ = rotate(laid_out.ids_T, [(start, end)], vocab)
    asked_T = rotated_T[: len(rotated_T) - (end - start) - 1]
    return Prompt(asked_T, modality, length, vocab.end_of_span, closed=closed)


def masked(
    document: TokenDocument, indices: Collection[int], vocab: Vocab, *, first: int = 0
) -> TokenDocument:
    """The document with a sentinel for each of these segments, as training masks whole segments.

    Args:
        indices: of the segments.
        first: number of the first sentinel; the others follow it.

    Raises:
        UserError: for more masks than there are sentinels left.
    """
    if first + len(indices) > vocab.sentinels:
        raise UserError(
            f"document {document.id}: {first} spans and {len(indices)} masked segments need a "
            f"sentinel each, but the vocabulary has {vocab.sentinels}; mask fewer of them"
        )
    segments = list(document.segments)
    for number, index in enumerate(sorted(indices), first):
        old = segments[index]
        # As in training, an image keeps the size that stands in front of it.
        grid = old.grid
        if not grid and old.modality == "image":
            grid = vocab.layout.grid_of(old.ids_T)
        segments[index] = replace(old, ids_T=np.array([vocab.sentinel(number)]), grid=grid)
    return replace(document, segments=tuple(segments))


def without_conditions(
    query: TokenDocument, modality: Modality, vocab: Vocab, *, spans: int = 0
) -> TokenDocument | None:
    """What the unconditional stream sees of a query whose answer is of this modality.

    Every segment of the other modality is masked whole: the texts if codes are asked for, the
    images if words are. Spans that are asked for keep their sentinels, from `<mask:0>` on, in both
    streams; the masks use the numbers behind them. None if there is nothing to mask: no segment of
    the other modality, or only empty ones.

    Args:
        spans: number of spans that are asked for.
    """
    indices = []
    for index, segment in enumerate(query.segments):
        if segment.modality != modality and len(segment.ids_T):
            indices.append(index)
    if not indices:
        return None
    return masked(query, indices, vocab, first=spans)


def required(document: TokenDocument, modality: Modality) -> TokenSegment:
    """The document's segment of this modality. Raises UserError without one."""
    segment = document.segment(modality)
    if segment is None:
        raise UserError(f"document {document.id} has no {modality}, which this task needs")
    return segment


def with_segment(document: TokenDocument, modality: Modality, ids_T: np.ndarray) -> TokenDocument:
    """The document with other ids in its first segment of this modality; a new text comes first,
    a new image last."""
    old = document.segment(modality)
    new = TokenSegment(modality, ids_T)
    if old is not None:
        segments = [new if segment is old else segment for segment in document.segments]
        return replace(document, segments=tuple(segments))
    if modality == "text":
        return replace(document, segments=(new, *document.segments))
    return replace(document, segments=(*document.segments, new))
