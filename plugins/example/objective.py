"""Fill-in-the-middle (Bavarian et al. 2022, arXiv 2207.14255): the middle of a document is learned
last.

With the middle "dog <break> I7", and the prefix or the suffix first, the sample
`<eos> a red dog <break> I7 I2 I9 I4 <eos>` becomes

    <eos> <mask:0> a red <mask:1> I2 I9 I4 <mask:2> dog <break> I7 <eos>
    <eos> <mask:0> <mask:1> I2 I9 I4 <mask:2> a red dog <break> I7 <eos>
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cm3leon.config import Probability
from cm3leon.objectives.base import Corrupted, Objective, cut
from cm3leon.registry import OBJECTIVES
from cm3leon.tokenizers.document import LaidOut
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import UserError

PREFIX, SUFFIX, MIDDLE = 0, 1, 2
"""The sentinels that open the three parts; the last part ends with the sample's <eos>."""
EXTRA = 3
"""Number of tokens that the objective adds to a sample."""

Range = tuple[int, int]
"""The positions [start, end) of a part of a sample."""


@OBJECTIVES.register("fill_in_the_middle")
class FillInTheMiddle(Objective):
    """Next-token prediction on samples whose query document is rearranged so that its middle comes
    last."""

    @dataclass(kw_only=True)
    class Config:
        """How many samples are rearranged, and in which order."""

        rate: Probability = 0.5
        """Share of the samples that is rearranged; in the paper, up to 0.9 cost nothing in ordinary
        prediction."""
        suffix_first: Probability = 0.5
        """Share of the rearranged samples that begin with the suffix, so that prefix and middle are
        one run of text."""

    config: Config

    def __init__(self, config: Config, *, vocab: Vocab) -> None:
        super().__init__(config, vocab=vocab)
        if vocab.sentinels < EXTRA:
            raise UserError(
                f"sentinels is {vocab.sentinels}; the objective fill_in_the_middle needs {EXTRA}"
            )

    def corrupt(self, sample: LaidOut, rng: np.random.Generator, max_tokens: int) -> Corrupted:
        fits = len(sample.ids_T) + EXTRA <= max_tokens
        if fits and rng.random() < self.config.rate:
            return self._rearranged(sample, rng)
        return _as_it_is(sample)

    def take(
        self, sample: LaidOut, start: int, room: int, rng: np.random.Generator
    ) -> tuple[Corrupted, int]:
        if room <= EXTRA or rng.random() >= self.config.rate:
            end = min(start + room, len(sample.ids_T))
            return _as_it_is(cut(sample, start, end)), end
        end = min(start + room - EXTRA, len(sample.ids_T))
        return self._rearranged(cut(sample, start, end), rng), end

    def _rearranged(self, sample: LaidOut, rng: np.random.Generator) -> Corrupted:
        """Move a middle drawn at random to the end of the query document."""
        query = [segment for segment in sample.segments if segment.is_query]
        if not query:  # the sample is a piece that ends before the query document
            return _as_it_is(sample)

        document = query[0].start, query[-1].end
        start, end = np.sort(rng.integers(document[0], document[1] + 1, size=2)).tolist()
        suffix_first = rng.random() < self.config.suffix_first
        ids_T = rearrange(
            sample.ids_T, document, (start, end), self.vocab, suffix_first=suffix_first
        )

        # The sentinels say which part follows, so they are no targets themselves.
        return Corrupted(
            ids_T, np.where(self.vocab.is_sentinel(ids_T), np.float32(0), np.float32(1))
        )


def rearrange(
    ids_T: np.ndarray, document: Range, middle: Range, vocab: Vocab, *, suffix_first: bool = False
) -> np.ndarray:
    """Move the middle of a document behind the rest of it: a sample (T,) becomes (T + 3,)."""
    first, last = document
    start, end = middle
    prefix, suffix = ids_T[first:start], ids_T[end:last]
    opened = [[vocab.sentinel(number)] for number in (PREFIX, SUFFIX, MIDDLE)]
    if suffix_first:
        parts = [*opened[:2], suffix, opened[MIDDLE], prefix]
    else:
        parts = [opened[PREFIX], prefix, opened[SUFFIX], suffix, opened[MIDDLE]]
    return np.concatenate([ids_T[:first], *parts, ids_T[start:end], ids_T[last:]]).astype(np.int64)


def _as_it_is(sample: LaidOut) -> Corrupted:
    """A sample that is trained on unchanged."""
    return Corrupted(sample.ids_T, np.ones(len(sample.ids_T), dtype=np.float32))
