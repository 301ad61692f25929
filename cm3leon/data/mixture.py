"""Weighted mixtures of sources: which document stands at a position of the endless stream.

For example two sources, A with 3 rows and B with 1, of which an epoch takes A once and B twice. With
seed 0 the stream begins

    position           0  1  2  3  4  |  5  6  7  8  9         epochs of 3 + 2 positions
    source             A  B  A  A  B  |  A  A  A  B  B         shuffled anew in each
    row                0  0  2  1  0  |  0  1  2  0  0         each source by permutations of its
    epoch of source    0  1  0  0  0  |  1  1  1  3  2         rows, which this counts

Nothing of this is stored: `Mixture.at` computes a column of the table from the position alone.
"""

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
    """Passes through each source in an epoch of the mixture, so that each source has its share
    (paper section E.1).

    No source is passed through more than `most` times or less than `least` times. For example a
    small source of 100 documents and a large one of 900, mixed evenly, are passed through 3 times
    (not 5) and 0.56 times.

    Args:
        counts: documents of each source.
        shares: shares of the mixture, in any unit; None passes through each source once.

    Raises:
        UserError: for an empty source, for another number of shares than of sources, and for
            shares that are negative or all zero.
    """
    if shares is None:
        return [1.0] * len(counts)
    if len(shares) != len(counts) or min(shares, default=0) < 0 or sum(shares) == 0:
        raise UserError(
            f"the mixture's shares are {list(shares)}; they must be {len(counts)} numbers >= 0, "
            "not all of them 0"
        )
    if 0 in counts:
        raise UserError(f"source {list(counts).index(0)} of the mixture is empty; leave it out")

    total = sum(counts) / sum(shares)
    return [
        min(max(share * total / count, least), most)
        for count, share in zip(counts, shares, strict=True)
    ]


class Mixture:
    """A mixture of sources: a pure function from a position of the endless stream to (source, row,
    epoch of the source).

    An epoch of the mixture has round(rate * count) positions of each source, in an order that is
    shuffled anew every epoch. The positions of a source, one epoch after the other, run through
    permutations of its rows, so that after any number of epochs each row of a source has come
    equally often, or once more. The source's epoch counts these permutations.

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

        # Sources of equal size are shuffled differently.
        self._seeds = [mixed(seed, source) for source in range(len(counts))]
        if not len(self):
            raise UserError(
                f"an epoch of the mixture is empty: its sources have {list(counts)} documents, "
                f"taken {list(rates)} times each; raise a share or give more documents"
            )

    def __len__(self) -> int:
        """Number of positions in an epoch of the mixture."""
        return self._ends[-1] if self._ends else 0

    def at(self, position: int) -> tuple[int, int, int]:
        """Return (source, row, epoch of the source) of a position."""
        place = shuffled(self._seed, position, len(self))
        source = bisect_right(self._ends, place)
        count, places = int(self.counts[source]), int(self.places[source])
        first = self._ends[source] - places

        # How many documents of this source come before this one, over all epochs.
        ordinal = position // len(self) * places + place - first
        return source, shuffled(self._seeds[source], ordinal, count), ordinal // count
