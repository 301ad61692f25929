"""The measurements in their order, each in a process of its own with a time limit.

Run as a module, this file is one of these processes: `python -m cm3leon.doctor.parts NAME SIZE
FILE` appends a line of JSON to the file for each figure, as soon as it is measured. So an error, a
kernel that leaves the GPU unusable, a lack of memory or the limit costs the figures that were still
to come, and no others:

    doctor ─┬─ process "hardware"  60 s    4 lines, done
            ├─ process "layers"   200 s    2 lines, killed at its limit
            └─ ...                         starts with a GPU in order
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from cm3leon.doctor import attention, data, hardware, images, training
from cm3leon.doctor.figures import Figure, reason
from cm3leon.registry import discover
from cm3leon.training.device import best_device

TESTS = Path(__file__).parents[2] / "tests"
TESTS_LIMIT = 170
"""Seconds. This is below the limit of their part: that one would end the part, but not its
tests."""


@dataclass(frozen=True)
class Part:
    """One measurement."""

    name: str
    measure: Callable[[torch.device, bool], Iterator[Figure]]
    """(device, whether at full size) -> its figures, each as soon as it is measured."""
    limit: int
    """Seconds that it may take."""


def gpu_tests(device: torch.device, full: bool) -> Iterator[Figure]:
    """Run the tests marked `gpu`, if the tests lie beside the package, as in a clone."""
    lacks = ""
    if device.type != "cuda":
        lacks = "no GPU"
    elif not TESTS.is_dir():
        lacks = "no tests beside the package"
    if lacks:
        yield Figure("tests", "pytest -m gpu", None, "failed", lacks)
        return

    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=line", str(TESTS)],
            cwd=TESTS.parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=TESTS_LIMIT,
        )
    except subprocess.TimeoutExpired:
        yield Figure("tests", "pytest -m gpu", None, "failed", f"not done after {TESTS_LIMIT} s")
        return

    # The last line is pytest's summary. Codes above 1 mean that pytest itself did not work.
    lines = done.stdout.strip().splitlines()
    failed = [line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
    summary = done.stderr.strip()[-200:]
    if lines:
        summary = lines[-1]
    note = "; ".join([summary, *failed])
    count = len(failed) if done.returncode in (0, 1) else None
    yield Figure("tests", "pytest -m gpu", count, "failed", note)


PARTS = (
    Part("hardware", hardware.measure, 60),
    Part("layers", training.measure_layers, 200),
    Part("images, bf16", partial(images.measure, weights="bf16"), 240),
    Part("images, fp8", partial(images.measure, weights="fp8"), 180),
    Part("attention", attention.measure, 80),
    Part("training", training.measure, 160),
    Part("images, int8", partial(images.measure, weights="int8"), 180),
    Part("corpus", data.measure, 80),
    Part("index", data.measure_index, 90),
    Part("tests", gpu_tests, 200),
)
"""Their limits add up to less than 25 minutes."""


def measured(device: torch.device, *, full: bool) -> Iterator[Figure]:
    """All figures, part by part; prints each part as it begins and ends."""
    for number, part in enumerate(PARTS, 1):
        print(f"[{number}/{len(PARTS)}] {part.name} ...", flush=True)
        start = time.monotonic()
        figures = in_process(part, full=full)
        yield from figures
        missing = sum(figure.value is None for figure in figures)
        without = f", {missing} without a value" if missing else ""
        taken = time.monotonic() - start
        print(f"      {len(figures)} figures in {taken:.0f} s{without}", flush=True)


def in_process(part: Part, *, full: bool) -> list[Figure]:
    """Run a part as a process, and return its figures.

    If it ended early, the last figure has no value, and the reason as its note.
    """
    size = "full" if full else "small"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.jsonl"
        path.touch()
        ended = ""
        command = [sys.executable, "-m", "cm3leon.doctor.parts", part.name, size, str(path)]
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=part.limit,
                check=False,
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
                ended = f"ended with code {done.returncode}: {last}"
        except subprocess.TimeoutExpired:
            ended = f"stopped at its limit of {part.limit} s"
        lines = path.read_text().splitlines()

    # The last line may be half written if the process was killed.
    figures = [Figure(**json.loads(line)) for line in lines if line.endswith("}")]
    if ended:
        figures.append(Figure(part.name, f"{part.name}: the rest", None, "", ended))
    return figures


def main(name: str, size: str, path: str) -> None:
    """Measure one part in this process."""
    discover()
    part = next(each for each in PARTS if each.name == name)
    device = best_device()
    with Path(path).open("a") as file:
        try:
            for figure in part.measure(device, size == "full"):
                print(json.dumps(asdict(figure)), file=file, flush=True)
        except Exception as error:  # that the part did not catch; the figures so far stay
            rest = Figure(part.name, f"{part.name}: the rest", None, "", reason(error))
            print(json.dumps(asdict(rest)), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
