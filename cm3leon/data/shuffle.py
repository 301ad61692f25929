"""Shuffled order as a pure function without a table, and the endless stream of rows built on it."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any, TypeVar

import numpy as np

Number = TypeVar("Number", int, np.ndarray)
"""An int, or an array (B,) of uint64: one body of code serves both, as arithmetic on the latter is modulo 2^64."""

FEW = 256
ROUNDS, ROUNDS_OF_FEW = 8, 24
"""Rounds of the permutation: the orders of a handful of items are equally likely only after more."""

_LOW_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUND_KEYS = [number * _GOLDEN & _LOW_64 for number in range(1, ROUNDS_OF_FEW + 1)]


def shuffled(seed: int, position: int, count: int) -> int:
    """The item at a position of an endless stream over `count` items: every epoch is a new permutation of them.

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
    keys_B = _mix(epochs_B + np.uint64(mixed(seed)))
    items_B = _permuted(keys_B, items_B, count)
    while (outside_B := items_B >= count).any():
        items_B[outside_B] = _permuted(keys_B[outside_B], items_B[outside_B], count)
    return items_B.astype(np.int64)


def mixed(*numbers: int) -> int:
    """64 bits that look random, a function of the numbers and their order: a seed made of seeds."""
    key = 0
    for number in numbers:
        key = _mix((key + number) & _LOW_64)
    return key


def wrapped(seed: int, bits: int = 64) -> int:
    """A seed of so many bits (64 for torch, 31 for FAISS): the number itself where it fits, modulo 2^bits else.

    Whatever is computed from an experiment's seed (of 64 bits) passes through it on its way to a library.
    """
    return seed % (1 << bits)


def _permuted(key: Number, place: Number, count: int) -> Number:
    """A keyed permutation of [0, rows * columns), the least such rectangle of nearly equal sides that holds `count`.

    A Feistel network: column and row take turns in being shifted by a random function of the other one. What lands
    at `count` or beyond is to be permuted again, until it does not (cycle walking): rarely, as that is less than one
    row of the rectangle.
    """
    columns = isqrt(count - 1) + 1
    rows = -(-count // columns)
    row, column = place // columns, place % columns
    rounds = ROUNDS_OF_FEW if count <= FEW else ROUNDS
    for odd, even in zip(_ROUND_KEYS[:rounds:2], _ROUND_KEYS[1:rounds:2], strict=True):
        row = (row + _mix((key + column + odd) & _LOW_64) % rows) % rows
        column = (column + _mix((key + row + even) & _LOW_64) % columns) % columns
    return row * columns + column


def _mix(x: Number) -> Number:
    """The output function of SplitMix64: a bijection of 64 bits in which each bit depends on all others."""
    x = (x + _GOLDEN) & _LOW_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _LOW_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _LOW_64
    return x ^ (x >> 31)


class RowStream:
    """Endless batches of `batch_size` items out of `count`, shuffled; the place of the next one is the whole state.

    Args:
        make: numbers of the items (B,) -> batch.
    """

    def __init__(
        self, count: int, make: Callable[[np.ndarray], Any], *, batch_size: int, seed: int
    ) -> None:
        self._count = count
        self._make = make
        self._batch_size = batch_size
        self._seed = seed
        self._position = 0

    def next(self) -> Any:
        """The next batch."""
        positions_B = np.arange(self._position, self._position + self._batch_size)
        self._position += self._batch_size
        return self._make(shuffled_array(self._seed, positions_B, self._count))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._position = int(state["position"])
