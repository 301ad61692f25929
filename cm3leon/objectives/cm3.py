"""The CM3 objective: spans of a sample are moved behind it,
and generated there with context from both sides.

The sample `<eos> a red dog <break> I7 I2 I9 I4 <eos>` with the span "red dog" becomes

    <eos> a <mask:0> <break> I7 I2 I9 I4 <eos> <mask:0> red dog <end_of_span>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cm3leon.config import NonNegativeFloat, Probability
from cm3leon.objectives.base import Corrupted, Objective, cut
from cm3leon.registry import OBJECTIVES
from cm3leon.tokenizers.document import LaidOut, SegmentSpan
from cm3leon.tokenizers.vocab import Vocab

Span = tuple[int, int]
"""Positions [start, end) of a sample."""

EXTRA = 3
"""Tokens that a span adds: its sentinel twice, and `<end_of_span>`."""


@OBJECTIVES.register("cm3")
class CM3(Objective):
    """Causally masked modelling (paper section 2.3): rotated spans, no loss on sentinels."""

    @dataclass(kw_only=True)
    class Config:
        """How spans are drawn, and what the loss counts."""

        mean_spans: NonNegativeFloat = 1.0
        """Mean of the Poisson distribution of the number of spans;
        zero spans leave the sample as it is."""
        placement: Literal["segment", "block"] = "segment"
        """segment: choose the query or a retrieved document (half each), a segment of it, and a
        span inside. block: two draws over the whole sample, clipped to the segment that they
        overlap most (the literal form, which hardly ever masks a caption)."""
        whole_segment: Probability = 0.3
        """Placement segment: probability that a span is its whole segment."""
        retrieved_weight: NonNegativeFloat = 1.0
        """Weight of retrieved documents' tokens in the loss (RA-CM3 used 0.1, CM3Leon 1)."""

    config: Config

    def corrupt(self, sample: LaidOut, rng: np.random.Generator, max_tokens: int) -> Corrupted:
        return self._rotated(sample, self.draw_spans(sample, rng, max_tokens))

    def take(
        self, sample: LaidOut, start: int, room: int, rng: np.random.Generator
    ) -> tuple[Corrupted, int]:
        left = len(sample.ids_T) - start

        # A sample that fits is not cut for the sake of a span, and a piece keeps at least one
        # token of the sample.
        spare = room - left if left <= room else room - 1
        count = min(self._draw_count(rng), spare // EXTRA)
        piece = cut(sample, start, start + min(left, room - EXTRA * count))
        spans = self._draw_apart(piece, count, rng)

        # Overlapping spans were dropped, which makes room for more of the sample.
        end = start + min(left, room - EXTRA * len(spans))
        return self._rotated(cut(sample, start, end), spans), end

    def draw_spans(self, sample: LaidOut, rng: np.random.Generator, max_tokens: int) -> list[Span]:
        """Draw spans that do not overlap, in order, each inside one segment;
        they fit `max_tokens`."""
        room = (max_tokens - len(sample.ids_T)) // EXTRA
        return self._draw_apart(sample, min(self._draw_count(rng), room), rng)

    def _draw_count(self, rng: np.random.Generator) -> int:
        return min(int(rng.poisson(self.config.mean_spans)), self.vocab.sentinels - 1)

    def _draw_apart(self, sample: LaidOut, count: int, rng: np.random.Generator) -> list[Span]:
        """Draw at most `count` spans; one that overlaps an earlier one is dropped."""
        segments = [segment for segment in sample.segments if segment.end > segment.start]
        spans: list[Span] = []
        for _ in range(count if segments else 0):
            draw = self._in_segment if self.config.placement == "segment" else self._in_block
            start, end = draw(segments, rng)
            if start < end and all(end <= s or e <= start for s, e in spans):
                spans.append((start, end))
        return sorted(spans)

    def _rotated(self, sample: LaidOut, spans: Sequence[Span]) -> Corrupted:
        weight_T = self._weights(sample)
        if not spans:
            return Corrupted(sample.ids_T, weight_T)

        # Weights move with their tokens. Sentinels are no targets: where a span begins is drawn
        # at random, so there is nothing to learn; that a span ends is learned.
        ids_T, source_T = rotate(sample.ids_T, spans, self.vocab)
        weight_T = np.where(source_T >= 0, weight_T[source_T], np.float32(1))
        weight_T[self.vocab.is_sentinel(ids_T)] = 0
        return Corrupted(ids_T, weight_T)

    def _weights(self, sample: LaidOut) -> np.ndarray:
        """Weights (T,) of a sample's tokens in the loss."""
        weight_T = np.ones(len(sample.ids_T), dtype=np.float32)
        for segment in sample.segments:
            if not segment.is_query:
                weight_T[segment.start : segment.end] = self.config.retrieved_weight
        return weight_T

    def _in_segment(self, segments: Sequence[SegmentSpan], rng: np.random.Generator) -> Span:
        query = [segment for segment in segments if segment.is_query]
        retrieved = [segment for segment in segments if not segment.is_query]
        part = (query, retrieved)[int(rng.integers(2))] or query or retrieved
        segment = part[int(rng.integers(len(part)))]
        if rng.random() < self.config.whole_segment:
            return segment.start, segment.end

        # Two different boundaries between its tokens.
        boundaries = rng.choice(segment.end - segment.start + 1, size=2, replace=False)
        start, end = np.sort(boundaries).tolist()
        return segment.start + start, segment.start + end

    def _in_block(self, segments: Sequence[SegmentSpan], rng: np.random.Generator) -> Span:
        start, end = sorted(rng.integers(segments[-1].end + 1, size=2).tolist())
        overlaps = [(max(start, segment.start), min(end, segment.end)) for segment in segments]
        return max(overlaps, key=lambda overlap: overlap[1] - overlap[0])


def rotate(ids_T: np.ndarray, spans: Sequence[Span], vocab: Vocab) -> tuple[np.ndarray, np.ndarray]:
    """Move spans, given in order, behind the sample.

    With the span [1, 3) of five tokens a b c d e, M the sentinel and E the end of a span:

        ids     a  M  d  e  M  b  c  E
        source  0 -1  3  4 -1  1  2 -1

    Returns:
        the rotated ids, `EXTRA` longer for each span, and for each of them its position in the
        sample, -1 for the tokens that the rotation adds.
    """
    # One array of positions orders everything; an added token t stands in it as -1 - t.
    kept: list[np.ndarray] = []
    moved: list[np.ndarray] = []
    position = 0
    for number, (start, end) in enumerate(spans):
        added = -1 - vocab.sentinel(number)
        kept += [np.arange(position, start), np.array([added])]
        moved += [np.array([added]), np.arange(start, end), np.array([-1 - vocab.end_of_span])]
        position = end
    order_T = np.concatenate([*kept, np.arange(position, len(ids_T)), *moved]).astype(np.int64)

    source_T = np.maximum(order_T, -1)
    return np.where(order_T >= 0, ids_T[source_T], -1 - order_T), source_T
