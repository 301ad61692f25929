"""Check what a machine has and lacks, and with measure=true how fast it is.

    python -m cm3leon.run doctor
    python -m cm3leon.run doctor folder=/scratch/me/runs measure=true out=doctor

Each line is good, a warning, or wrong, and says what to do. The exit code is 1 if something is
wrong. With measure=true it also measures matrix products, attention, training, drawing images and
making a corpus, within 25 minutes on one GPU and at small sizes on a CPU, and writes doctor.html
and doctor.json. docs/first_hour.md explains how to read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cm3leon.doctor.figures import Figure
    from cm3leon.doctor.findings import Finding


@dataclass(kw_only=True)
class Options:
    """Options of the command doctor."""

    folder: Path = Path("runs")
    """Where runs will be. Its file system is checked, or that of the nearest folder above it that
    exists."""
    measure: bool = False
    """Whether to measure as well."""
    out: Path | None = None
    """Folder for doctor.html and doctor.json; null = doctor/ with measure=true, else no files."""


def main(options: Options) -> int:
    """Print the findings and the measurements; returns 1 if a finding is wrong."""
    import torch

    from cm3leon.doctor.files import look_at_files
    from cm3leon.doctor.findings import lines
    from cm3leon.doctor.machine import look_at_machine
    from cm3leon.doctor.nccl import look_at_nccl
    from cm3leon.doctor.page import PAGE, write
    from cm3leon.doctor.parts import measured
    from cm3leon.registry import discover
    from cm3leon.terminal import printable
    from cm3leon.training.device import best_device

    discover()
    device = best_device()
    findings: list[Finding] = []
    figures: list[Figure] = []

    # Each finding is printed as soon as it is known: some take seconds, such as NCCL's.
    found: list[Iterable[Finding]] = [
        look_at_machine(device),
        look_at_files(options.folder),
        [look_at_nccl(torch.cuda.device_count())],
    ]
    for findings_of_one in found:
        for finding in findings_of_one:
            findings.append(finding)
            print("\n".join(map(printable, lines(finding))), flush=True)

    # The page is written after each measurement, so that an interruption leaves what was measured.
    out = options.out
    if out is None and options.measure:
        out = Path("doctor")
    if out is not None:
        write(out, findings, figures, device)
    if options.measure:
        assert out is not None
        print()
        for figure in measured(device, full=device.type == "cuda"):
            figures.append(figure)
            write(out, findings, figures, device)
    if out is not None:
        print(f"\n{out / PAGE}")
    return int(any(finding.verdict == "wrong" for finding in findings))
