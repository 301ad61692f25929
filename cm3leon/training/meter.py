"""Means and rates of what a training measures, between two records."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm3leon.training.distributed import Ranks

Figure = Tensor | float | tuple[Tensor | float, Tensor | float]
"""A figure of a micro-batch: a number, or (total, count),
which is averaged over everything counted."""

Record = dict[str, Any]

MeterState = dict[str, Any]
"""State of one rank as JSON: `seconds`, and `sums` with the total and count of each figure."""

COUNTS = ("tokens", "images", "flops")
"""Figures that are recorded as rates per second, of all ranks together."""


class Meter:
    """Means of figures between two records: over micro-batches, steps and ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._values: dict[str, list[Figure]] = {}
        self._start = time.perf_counter()

    def add(self, figures: Mapping[str, Figure]) -> None:
        """Add the figures of a micro-batch, without waiting for the device."""
        for name, value in figures.items():
            self._values.setdefault(name, []).append(value)

    def read(self) -> dict[str, float]:
        """The means since the last reading, without figures
        that were never finite or never counted.

        All ranks must have the same figures.
        """
        seconds = time.perf_counter() - self._start
        totals = self._totals()

        # One sum over the ranks for all totals and counts.
        summed = self._ranks.sum(list(chain.from_iterable(totals.values())))
        result = {}
        for name, total, count in zip(totals, summed[::2], summed[1::2], strict=True):
            if name in COUNTS:
                result[f"{name}_per_second"] = total / seconds
            elif count:
                result[name] = total / count
        self._values = {}
        self._start = time.perf_counter()
        return result

    def state(self) -> MeterState:
        """Sums and time since the last reading, for the meter of a later process;
        waits for the device."""
        totals = self._totals()
        self._values = {name: [pair] for name, pair in totals.items()}
        return {"seconds": time.perf_counter() - self._start, "sums": totals}

    def load(self, states: Sequence[MeterState]) -> None:
        """Continue from the states of all ranks, which may now be another number of ranks.

        Args:
            states: of all ranks, the same on each.
        """
        if not states:
            return
        self._start = time.perf_counter() - states[0]["seconds"]
        if len(states) == self._ranks.count:
            sums = states[self._ranks.rank]["sums"]
        else:
            # The first rank takes over everything. The others need the same figures, with zeros.
            counted = float(self._ranks.first)
            sums = {}
            for name in states[0]["sums"]:
                whole = np.sum([state["sums"][name] for state in states], axis=0)
                sums[name] = (counted * whole).tolist()
        self._values = {name: [(total, count)] for name, (total, count) in sums.items()}

    def _totals(self) -> dict[str, tuple[float, float]]:
        """Sum and count of the finite values, by figure."""
        # Read all values from the device together.
        names: list[str] = []
        values: list[Tensor | float] = []
        for name, figures in self._values.items():
            for figure in figures:
                names.append(name)
                values += figure if isinstance(figure, tuple) else (figure, 1.0)
        numbers = _read(values)

        # Summed in order, so that a sum that continues from a state is the same to the last bit.
        totals = dict.fromkeys(self._values, (0.0, 0.0))
        for name, total, count in zip(names, numbers[::2], numbers[1::2], strict=True):
            if math.isfinite(total):
                before = totals[name]
                totals[name] = before[0] + total, before[1] + count
        return totals

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the rates."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def _read(values: Sequence[Tensor | float]) -> list[float]:
    """The values as numbers; those on a device are copied from it together."""
    there = [value for value in values if isinstance(value, Tensor)]
    if not there:
        return [float(value) for value in values]
    read = iter(torch.stack([value.detach().double().reshape(()) for value in there]).tolist())
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]


def gpu_memory(device: torch.device) -> dict[str, float]:
    """The most memory that tensors took on a GPU since the last call, in GB (1e9 bytes);
    {} on a CPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_memory_gb": peak / 1e9}
