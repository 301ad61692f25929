"""Shuffled order as a pure function without a table, and the endless stream of rows built on it.

Ten items, shuffled with seed 0; each epoch is a permutation of its own:

    position    0 1 2 3 4 5 6 7 8 9 | 10 11 12 13 14 15 16 17 18 19
    item        4 1 8 0 3 5 9 6 2 7 |  6  2  0  8  1  5  7  4  9  3
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import numpy as np

from cm3leon.seeds import GOLDEN, LOW_64, Number, mixed, split_mix
from cm3leon.types import UserError

FEW = 256
ROUNDS, ROUNDS_OF_FEW = 8, 24
"""Rounds of the permutation. With only a few items it takes more rounds until all orders are
equally likely."""

_ROUND_KEYS = [number * GOLDEN & LOW_64 for number in range(1, ROUNDS_OF_FEW + 1)]


def shuffled(seed: int, position: int, count: int) -> int:
    """The item at a position of an endless stream over `count` items. Every epoch is a new
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
    """The items (B,), int64, at each of the positions (B,), as by `shuffled`."""
    epochs_B, items_B = np.divmod(positions_B.astype(np.uint64), np.uint64(count))
    keys_B = split_mix(epochs_B + np.uint64(mixed(seed)))
    items_B = _permuted(keys_B, items_B, count)
    while (outside_B := items_B >= count).any():
        items_B[outside_B] = _permuted(keys_B[outside_B], items_B[outside_B], count)
    return items_B.astype(np.int64)


def _permuted(key: Number, place: Number, count: int) -> Number:
    """A keyed permutation of [0, rows * columns), the smallest rectangle of nearly equal sides that
    holds `count` items.

    It is a Feistel network: row and column take turns in being shifted by a random function of the
    other. An item that lands at `count` or beyond is permuted again until it does not (cycle
    walking). That is rare, since less than one row of the rectangle lies beyond.
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
    """The start and the end of a rank's items in a batch. Raises UserError for a batch that cannot
    be divided evenly among the ranks."""
    rank, ranks = share
    if batch_size % ranks:
        raise UserError(f"batch_size is {batch_size}; it must be a multiple of the {ranks} ranks")
    own = batch_size // ranks
    return rank * own, (rank + 1) * own


class RowStream:
    """Endless batches of `batch_size` items out of `count`, shuffled. The position of the next batch
    is the whole state.

    Args:
        make: builds a batch from the indices of its items (B,).
        share: (rank, ranks); each rank has a consecutive part of the batch.

    Raises:
        UserError: for a batch that cannot be divided evenly among the ranks.
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
        """Return the next batch."""
        positions_B = self._position + np.arange(*self._own)
        self._position += self._batch_size
        return self._make(shuffled_array(self._seed, positions_B, self._count))

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self._position = int(state["position"])
