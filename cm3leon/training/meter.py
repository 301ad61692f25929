"""Means and rates of what a training measures, between two records."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm3leon.training.distributed import Ranks

Figure = Tensor | float | tuple[Tensor | float, Tensor | float]
"""What is recorded of a micro-batch: a number, or (total, count),
averaged over everything that is counted."""

Record = dict[str, Any]

MeterState = dict[str, Any]
"""`seconds`, and `sums` with the total and count of each figure, of one rank; JSON."""

COUNTS = ("tokens", "images", "flops")
"""Figures that are recorded as a rate a second of all ranks together."""


class Meter:
    """Means of figures between two records: over micro-batches, steps and ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._values: dict[str, list[Figure]] = {}
        self._start = time.perf_counter()

    def add(self, figures: Mapping[str, Figure]) -> None:
        """Takes in the figures of a micro-batch; nothing waits for the device here."""
        for name, value in figures.items():
            self._values.setdefault(name, []).append(value)

    def read(self) -> dict[str, float]:
        """The means since the last reading; a figure is left out that is never finite,
        or never of anything.

        The ranks have to have the same figures.
        """
        seconds = time.perf_counter() - self._start
        totals = self._totals()
        names = list(totals)
        summed = self._ranks.sum([number for pair in totals.values() for number in pair])
        result = {}
        for name, total, count in zip(names, summed[::2], summed[1::2], strict=True):
            if name in COUNTS:
                result[f"{name}_per_second"] = total / seconds
            elif count:
                result[name] = total / count
        self._values = {}
        self._start = time.perf_counter()
        return result

    def state(self) -> MeterState:
        """Sums and time since the last reading, for a meter of a later process;
        waits for the device."""
        totals = self._totals()
        self._values = {name: [pair] for name, pair in totals.items()}
        return {"seconds": time.perf_counter() - self._start, "sums": totals}

    def load(self, states: Sequence[MeterState]) -> None:
        """Goes on from the states of all ranks, the same for all,
        on as many ranks or another number of them."""
        if not states:
            return
        self._start = time.perf_counter() - states[0]["seconds"]
        if len(states) == self._ranks.count:
            sums = states[self._ranks.rank]["sums"]
        else:
            # The first rank takes over everything; the others have to have the same figures.
            counted = float(self._ranks.first)
            whole = {
                name: np.sum([state["sums"][name] for state in states], axis=0)
                for name in states[0]["sums"]
            }
            sums = {name: (counted * pair).tolist() for name, pair in whole.items()}
        self._values = {name: [(total, count)] for name, (total, count) in sums.items()}

    def _totals(self) -> dict[str, tuple[float, float]]:
        """Sum and count, by figure, of the values that are finite."""
        pairs = [
            (name, value if isinstance(value, tuple) else (value, 1.0))
            for name, values in self._values.items()
            for value in values
        ]
        numbers = _read([number for _, pair in pairs for number in pair])
        totals = dict.fromkeys(self._values, (0.0, 0.0))
        for (name, _), total, count in zip(pairs, numbers[::2], numbers[1::2], strict=True):
            # One after the other, so that a sum that goes on
            # from a state is the same to the last bit.
            if math.isfinite(total):
                before = totals[name]
                totals[name] = before[0] + total, before[1] + count
        return totals

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside is not counted in rates."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def _read(values: Sequence[Tensor | float]) -> list[float]:
    """The values as numbers; those on a device come from it together."""
    there = [value for value in values if isinstance(value, Tensor)]
    if not there:
        return [float(value) for value in values]
    read = iter(torch.stack([value.detach().double().reshape(()) for value in there]).tolist())
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]


def gpu_memory(device: torch.device) -> dict[str, float]:
    """The most memory that tensors took on a GPU since the last call, in GB (1e9 bytes);
    nothing on a CPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_memory_gb": peak / 1e9}
