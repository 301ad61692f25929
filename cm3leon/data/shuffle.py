"""Shuffled order as a pure function, and the endless stream of rows built on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np


def shuffled(seed: int, position: int, count: int) -> int:
    """The item at a position of an endless stream over `count` items: every epoch is a new permutation of them."""
    epoch, place = divmod(position, count)
    return int(_permutation(seed, epoch, count)[place])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


class RowStream:
    """Endless batches of `batch_size` items out of `count`, shuffled; the place of the next one is the whole state.

    Args:
        make: numbers of the items (B,) -> batch.
    """

    def __init__(self, count: int, make: Callable[[np.ndarray], Any], *, batch_size: int, seed: int) -> None:
        self._count = count
        self._make = make
        self._batch_size = batch_size
        self._seed = seed
        self._position = 0

    def next(self) -> Any:
        """The next batch."""
        positions = range(self._position, self._position + self._batch_size)
        self._position += self._batch_size
        return self._make(np.array([shuffled(self._seed, position, self._count) for position in positions]))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._position = int(state["position"])
