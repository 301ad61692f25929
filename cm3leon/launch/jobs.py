"""What is launched: commands in jobs, one after the other or side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cm3leon.config import Component
from cm3leon.registry import LAUNCHERS

Command = tuple[str, ...]
"""Arguments of `python -m cm3leon.run`; those of a job name their own `run=` and have `launcher=here`."""


@dataclass(frozen=True)
class Job:
    """One command, or several that run side by side as the elements of an array."""

    name: str
    """Of letters, digits, `-`, `_` and `.`; one of its kind in a submission."""
    commands: tuple[Command, ...]
    resources: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the launcher that are other ones for this job: `{"timeout_min": 60}`."""
    after: tuple[str, ...] = ()
    """Names of jobs that have to succeed before this one starts."""
    together: bool = True
    """Whether a command runs on all processes that the launcher starts, as one training; else it is one process."""


@dataclass(frozen=True)
class Submitted:
    """A command that was given to a launcher."""

    job: str
    """Name of its job."""
    number: int
    """Place among the job's commands, from 0."""
    id: str
    """What SLURM calls it, `123` or `123_4`; the id of the process that looks after it, on this machine."""
    log: Path
    """What it prints, on the first process."""
    code: int | None = None
    """Exit code, where the launcher waits for the end; None where it does not."""


def submit(jobs: Sequence[Job], folder: Path, launcher: Component) -> list[Submitted]:
    """Gives jobs to a launcher, each after those that it depends on; what they print goes to files in `folder/launch`.

    A launcher that waits returns when all have ended; commands whose predecessors failed are left out of the answer.

    Raises:
        UserError: for what can be known to be impossible: nothing is queued then.
    """
    return LAUNCHERS.build(launcher).launch(jobs, folder)
