"""Weighted mixtures of sources: at which position of the endless stream of samples which document
stands."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from cm3leon.data.shuffle import shuffled
from cm3leon.seeds import mixed
from cm3leon.types import UserError


def sampling_rates(
    counts: Sequence[int], shares: Sequence[float] | None, most: float = 3.0, least: float = 0.3
) -> list[float]:
    """How often an epoch of a mixture passes through each source, so that each has its share (paper
    section E.1).

    No source is repeated more than `most` times, nor cut below `least` of it. A small source of 100
    documents and a large one of 900, to be mixed evenly, are passed through 3 times (not 5) and
    0.56 times.

    Args:
        counts: documents of each source.
        shares: of the mixture, in any unit; None takes each source once.

    Raises:
        UserError: for an empty source, or shares that are not one for each source, negative or all
            zero.
    """
    if shares is None:
        return [1.0] * len(counts)
    if len(shares) != len(counts) or min(shares, default=0) < 0 or sum(shares) == 0:
        raise UserError(
            f"the mixture's shares are {list(shares)}; they must be {len(counts)} numbers >= 0, not all of them 0"
        )
    if 0 in counts:
        raise UserError(f"source {list(counts).index(0)} of the mixture is empty; leave it out")
    total = sum(counts) / sum(shares)
    return [
        min(max(share * total / count, least), most)
        for count, share in zip(counts, shares, strict=True)
    ]


class Mixture:
    """Sources mixed: a pure function from a position of the endless stream to (source, row, epoch
    of the source).

    An epoch of the mixture has round(rate * count) places of each source, in an order that is
    shuffled anew every epoch. A source's places are passed through its rows one permutation after
    the other: a row comes back only once all others have been, so that after any number of epochs
    each row of a source was there equally often, or once more. `epoch` counts these passes.

    Args:
        counts: rows of each source.
        rates: passes through each source in an epoch of the mixture.

    Raises:
        UserError: if an epoch would hold nothing.
    """

    def __init__(self, counts: Sequence[int], rates: Sequence[float], seed: int) -> None:
        self.counts = np.array(counts, np.int64)
        self.places = np.array(
            [round(rate * count) for count, rate in zip(counts, rates, strict=True)], np.int64
        )
        self._ends = np.cumsum(self.places).tolist()
        self._seed = seed
        self._seeds = [mixed(seed, source) for source in range(len(counts))]
        if not len(self):
            raise UserError(
                f"an epoch of the mixture is empty: its sources have {list(counts)} rows at {list(rates)}"
            )

    def __len__(self) -> int:
        """Positions of an epoch of the mixture."""
        return self._ends[-1] if self._ends else 0

    def at(self, position: int) -> tuple[int, int, int]:
        """(source, row, epoch) of one position."""
        place = shuffled(self._seed, position, len(self))
        source = bisect_right(self._ends, place)
        count, places = int(self.counts[source]), int(self.places[source])
        first = self._ends[source] - places
        ordinal = position // len(self) * places + place - first
        return source, shuffled(self._seeds[source], ordinal, count), ordinal // count
