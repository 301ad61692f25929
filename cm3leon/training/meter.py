"""What is written down of a training: means of figures, rates, and events, in JSON lines and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cm3leon.io import read_log, write_json_lines
from cm3leon.training.distributed import Ranks

Figure = Tensor | float | tuple[Tensor | float, Tensor | float]
"""What is recorded of a micro-batch: a number, or (total, count), averaged over everything that is counted."""

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
        """The means since the last reading; a figure is left out that is never finite, or never of anything.

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
        """Sums and time since the last reading, for a meter of a later process; waits for the device."""
        totals = self._totals()
        self._values = {name: [pair] for name, pair in totals.items()}
        return {"seconds": time.perf_counter() - self._start, "sums": totals}

    def load(self, states: Sequence[MeterState]) -> None:
        """Goes on from the states of all ranks, the same for all, on as many ranks or another number of them."""
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
            # One after the other, so that a sum that goes on from a state is the same to the last bit.
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


class TrainingLog:
    """The files of a training that people read: `log.jsonl`, `events.jsonl`, `validation.jsonl`, TensorBoard,
    and the progress bar.

    On all ranks but the first it writes nothing.

    Args:
        step: where the training goes on; records and events after it are of a run that was killed, and are cut off.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, *, title: str, step: int, first: int, last: int
    ) -> None:
        self._folder = folder
        self._writes = ranks.first
        self.writer: Any = None
        self.records: list[Record] = []
        self._unwritten: dict[str, str] = {}
        self._validated: set[int] = set()
        if self._writes:
            self.records = _cut(folder / "log.jsonl", step)
            _cut(folder / "events.jsonl", step)
            validations = _cut(folder / "validation.jsonl", step)
            self._validated = {record["step"] for record in validations}
            self.writer = _Board(folder / "tensorboard", step)
        self._progress = tqdm(
            total=last - first,
            initial=step - first,
            desc=title,
            unit="step",
            mininterval=2.0,
            dynamic_ncols=True,
            disable=not self._writes,
        )

    def record(self, record: Record) -> None:
        """Writes down a record of figures under its `step`."""
        if not self._writes:
            return
        self.records.append(record)
        self._append("log.jsonl", record)
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])
        if "loss" in record:
            self._progress.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)

    def validation(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes down figures of documents that are not trained on."""
        if self._writes and figures:
            self._append("validation.jsonl", {"step": step, **figures})
            for name, value in figures.items():
                self.writer.add_scalar(f"validation/{name}", value, step)

    def has_validation(self, step: int) -> bool:
        """Whether the figures of a step are written down, on the first rank."""
        return step in self._validated

    def _append(self, name: str, record: Record) -> None:
        """Adds a line to a file; lines that the disk refuses are kept, and written with a later one."""
        self._unwritten[name] = self._unwritten.get(name, "") + json.dumps(record) + "\n"
        self._write()

    def _write(self) -> None:
        for name, text in list(self._unwritten.items()):
            file = self._folder / name
            length = file.stat().st_size if file.exists() else 0
            try:
                with file.open("a") as lines:
                    lines.write(text)
                del self._unwritten[name]
            except OSError as error:
                with suppress(OSError):
                    os.truncate(file, length)  # without the part of a line that had room
                tqdm.write(f"      {file}: {error.strerror}; the training goes on, and tries again")

    def event(self, step: int, kind: str, **details: Any) -> None:
        """Writes down what happened at a step, and says it above the progress bar."""
        if self._writes:
            self._append("events.jsonl", {"step": step, "event": kind, **details})
            said = ", ".join(f"{name} {_short(value)}" for name, value in details.items())
            tqdm.write(f"      step {step}: {kind}: {said}")

    def advance(self) -> None:
        """Counts a step."""
        self._progress.update()

    def close(self) -> None:
        """Closes the files."""
        self._progress.close()
        self._write()
        if self.writer:
            self.writer.close()


def _cut(file: Path, step: int) -> list[Record]:
    """The lines of a file up to a step; what comes after them is cut off."""
    kept = [record for record in read_log(file, {"step": int}) if record["step"] <= step]
    write_json_lines(file, kept)
    return kept


class _Board:
    """A TensorBoard writer that a full disk does not stop: what it cannot write is left out, which is said once."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._failed = folder, False
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._writer, name)

        def guarded(*args: Any, **options: Any) -> None:
            try:
                if not self._failed:
                    method(*args, **options)
            except OSError as error:
                self._failed = True
                tqdm.write(
                    f"      {self._folder}: {error.strerror}; TensorBoard is left out from here on"
                )

        return guarded


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) > 5:
        return f"{', '.join(map(str, value[:5]))} and {len(value) - 5} more"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def gpu_memory(device: torch.device) -> dict[str, float]:
    """The most memory that tensors took on a GPU since the last call, in GB (1e9 bytes); nothing on a CPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"peak_memory_gb": peak / 1e9}
