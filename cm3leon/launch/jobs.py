"""What is launched: commands in jobs, one after the other or side by side."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cm3leon.config import Component, choices
from cm3leon.io import read_json, write_json
from cm3leon.provenance import snapshot
from cm3leon.registry import LAUNCHERS
from cm3leon.types import UserError

Command = tuple[str, ...]
"""Arguments of `python -m cm3leon.run`;
those of a job name their own `run=` and have `launcher=here`."""

ROOM = 100_000_000
"""Bytes that a disk must have free for a run to be begun on it."""


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
    """Whether a command runs on all processes that the launcher starts, as one training;
    else it is one process."""
    always: bool = False
    """Whether it starts when those before it have ended, however they did."""


@dataclass(frozen=True)
class Submitted:
    """A command that was given to a launcher."""

    job: str
    """Name of its job."""
    number: int
    """Place among the job's commands, from 0."""
    id: str
    """What SLURM calls it, `123` or `123_4`; the id of the process that looks after it, on this
    machine."""
    log: Path | None
    """What it prints, on the first process; None where that goes to the terminal."""
    code: int | None = None
    """Exit code, where the launcher waits for the end; None where it does not."""


@dataclass(frozen=True)
class Launch:
    """One submission: the folder `launch/NUMBER` of a run folder,
    with all that its jobs read and write."""

    folder: Path

    @property
    def code(self) -> Path:
        """The copy of the code that the jobs run."""
        return self.folder / "code"

    @property
    def logs(self) -> Path:
        """What the jobs print, and what submitit keeps of them."""
        return self.folder / "jobs"

    @property
    def number(self) -> int:
        """1 for the first submission of a run folder."""
        return int(self.folder.name)

    def journal(self, job: str, number: int | str) -> Path:
        """Where a command writes down what becomes of it."""
        return self.folder / "journal" / f"{job}-{number}.jsonl"

    def write(
        self, launcher: str, jobs: Sequence[Job], submitted: Sequence[Submitted] = ()
    ) -> None:
        """Writes down what is given to a launcher, before and after it has taken it."""
        content = {
            "time": round(time.time()),
            "launcher": launcher,
            "command": sys.argv,
            "after": {job.name: job.after for job in jobs},
            "commands": {job.name: job.commands for job in jobs},
            "submitted": [
                {**asdict(each), "log": each.log and str(each.log)} for each in submitted
            ],
        }
        write_json(self.folder / "jobs.json", content)

    def read(self) -> dict[str, Any]:
        """What `write` wrote, with `submitted` as such."""
        content = read_json(
            self.folder / "jobs.json", {"commands": {str: [[str]]}, "submitted": [dict]}
        )
        submitted = [
            Submitted(**{**each, "log": each["log"] and Path(each["log"])})
            for each in content["submitted"]
        ]
        return {**content, "submitted": submitted}


def launches(folder: Path) -> list[Launch]:
    """The submissions of a run folder, the oldest first."""
    found = [Launch(path.parent) for path in (folder / "launch").glob("*/jobs.json")]
    return sorted(found, key=lambda launch: launch.number)


def newest_launch(folder: Path) -> Launch:
    """The last submission of a run folder.

    Raises:
        UserError: for a folder that nothing was launched in.
    """
    found = launches(folder)
    if not found:
        raise UserError(
            f"run: nothing was launched in {folder}; give the run= of a run with launcher=slurm or "
            "local"
        )
    return found[-1]


def begin_launch(folder: Path) -> Launch:
    """A new submission with its copy of the code.

    Raises:
        UserError: for a run folder that cannot be written, or whose disk is full.
    """
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < ROOM:
            raise UserError(
                f"run: the disk of {folder} is full, {free / 1e6:.0f} MB are left; choose another "
                "run="
            )
        numbers = [
            int(path.name) for path in (folder / "launch").glob("*") if path.name.isdecimal()
        ]
        launch = Launch(folder / "launch" / str(max(numbers, default=0) + 1))
        snapshot(launch.code)
        launch.logs.mkdir()
        launch.journal("", 0).parent.mkdir()
    except OSError as error:
        raise UserError(
            f"run: {error.filename or folder} cannot be written, {error.strerror}"
        ) from error
    return launch


def check_jobs(jobs: Sequence[Job]) -> None:
    """Raises UserError for jobs whose names are not fit for file names, are taken,
    or are not there to wait for."""
    known: list[str] = []
    for job in jobs:
        if not re.fullmatch(r"[\w.-]+", job.name) or job.name in known:
            raise UserError(
                f"job {job.name}: its name must be of letters, digits, -, _ and ., and no other "
                "job's"
            )
        for name in job.after:
            if name not in known:
                raise UserError(
                    f"job {job.name} is after {name}, which is no job before it; "
                    f"{choices(name, known)}"
                )
        known.append(job.name)


def submit(jobs: Sequence[Job], folder: Path, launcher: Component) -> list[Submitted]:
    """Gives jobs to a launcher, each after those that it depends on;
    what they print goes to files in `folder/launch`.

    A launcher that waits returns when all have ended;
    commands whose predecessors failed are left out of the answer.

    Raises:
        UserError: for what can be known to be impossible: nothing is queued then.
    """
    check_jobs(jobs)
    return LAUNCHERS.build(launcher).launch(jobs, folder)
