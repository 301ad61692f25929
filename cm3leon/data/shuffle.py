"""Shuffled order as a pure function without a table, and the endless stream of rows built on it."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import numpy as np

from cm3leon.seeds import GOLDEN, LOW_64, Number, mixed, split_mix
from cm3leon.types import UserError

FEW = 256
ROUNDS, ROUNDS_OF_FEW = 8, 24
"""Rounds of the permutation: the orders of a handful of items are equally likely only after
more."""

_ROUND_KEYS = [number * GOLDEN & LOW_64 for number in range(1, ROUNDS_OF_FEW + 1)]


def shuffled(seed: int, position: int, count: int) -> int:
    """The item at a position of an endless stream over `count` items: every epoch is a new
    permutation of them.

    Takes microseconds and no memory, for any count below 2^62.
    """
    epoch, place = divmod(position, count)
    key = mixed(seed, epoch)
    item = _permuted(key, place, count)
    while item >= count:
        item = _permuted(key, item, count)
    return item


def shuffled_array(seed: int, positions_B: np.ndarray, count: int) -> np.ndarray:
    """`shuffled` of each of the positions (B,): items (B,), int64."""
    epochs_B, items_B = np.divmod(positions_B.astype(np.uint64), np.uint64(count))
    keys_B = split_mix(epochs_B + np.uint64(mixed(seed)))
    items_B = _permuted(keys_B, items_B, count)
    while (outside_B := items_B >= count).any():
        items_B[outside_B] = _permuted(keys_B[outside_B], items_B[outside_B], count)
    return items_B.astype(np.int64)


def _permuted(key: Number, place: Number, count: int) -> Number:
    """A keyed permutation of [0, rows * columns), the least such rectangle of nearly equal sides
    that holds `count`.

    A Feistel network: column and row take turns in being shifted by a random function of the other
    one. What lands at `count` or beyond is to be permuted again, until it does not (cycle walking):
    rarely, as that is less than one row of the rectangle.
    """
    columns = isqrt(count - 1) + 1
    rows = -(-count // columns)
    row, column = place // columns, place % columns
    rounds = ROUNDS_OF_FEW if count <= FEW else ROUNDS
    for odd, even in zip(_ROUND_KEYS[:rounds:2], _ROUND_KEYS[1:rounds:2], strict=True):
        row = (row + split_mix((key + column + odd) & LOW_64) % rows) % rows
        column = (column + split_mix((key + row + even) & LOW_64) % columns) % columns
    return row * columns + column


def own_slots(batch_size: int, share: tuple[int, int]) -> tuple[int, int]:
    """The first and the end of a rank's items in a batch. Raises UserError for a batch that the
    ranks cannot share."""
    rank, ranks = share
    if batch_size % ranks:
        raise UserError(f"batch_size is {batch_size}; it must be a multiple of the {ranks} ranks")
    own = batch_size // ranks
    return rank * own, (rank + 1) * own


class RowStream:
    """Endless batches of `batch_size` items out of `count`, shuffled; the place of the next one is
    the whole state.

    Args:
        make: numbers of the items (B,) -> batch.
        share: (rank, ranks) that have a part of each batch, one after the other.

    Raises:
        UserError: for a batch that the ranks cannot share.
    """

    def __init__(
        self,
        count: int,
        make: Callable[[np.ndarray], Any],
        *,
        batch_size: int,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._count = count
        self._make = make
        self._batch_size = batch_size
        self._own = own_slots(batch_size, share)
        self._seed = seed
        self._position = 0

    def next(self) -> Any:
        """The next batch."""
        positions_B = self._position + np.arange(*self._own)
        self._position += self._batch_size
        return self._make(shuffled_array(self._seed, positions_B, self._count))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._position = int(state["position"])
