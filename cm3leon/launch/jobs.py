"""What is launched: commands in jobs, one after the other or side by side.

A run folder keeps each submission:

    launch/1/jobs.json            what was given to the launcher, and the ids of the jobs
    launch/1/code/                the copy of the code that they run
    launch/1/jobs/                what they print
    launch/1/journal/NAME-0.jsonl what became of command 0 of job NAME (`journal.py`)
    launch/4f1c09ab77d2.yaml      the settings that they read
"""

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
"""Arguments of `python -m cm3leon.run`. Those of a job name their own `run=`,
and have `launcher=here`."""

ROOM = 100_000_000
"""Bytes that a disk must have free before a run starts on it."""


@dataclass(frozen=True)
class Job:
    """One command, or several that run side by side as the elements of an array."""

    name: str
    """Letters, digits, `-`, `_` and `.`; different from other jobs of the submission."""
    commands: tuple[Command, ...]
    resources: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the launcher that differ for this job, such as `{"timeout_min": 60}`."""
    after: tuple[str, ...] = ()
    """Names of jobs that must succeed before this one starts."""
    together: bool = True
    """Whether a command runs in all processes that the launcher starts, as one training; otherwise
    it runs in one process."""
    always: bool = False
    """Whether it starts even if the jobs before it failed."""


@dataclass(frozen=True)
class Submitted:
    """A command that was given to a launcher."""

    job: str
    """Name of its job."""
    number: int
    """Index among the job's commands."""
    id: str
    """SLURM's id, `123` or `123_4`; on this machine, the id of the process that runs it."""
    log: Path | None
    """What its first process prints; None if that goes to the terminal."""
    code: int | None = None
    """Exit code, if the launcher waits for the end; otherwise None."""


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
        """What the jobs print, and submitit's files."""
        return self.folder / "jobs"

    @property
    def number(self) -> int:
        """1 for the first submission of a run folder."""
        return int(self.folder.name)

    def journal(self, job: str, number: int | str) -> Path:
        """The journal of a command."""
        return self.folder / "journal" / f"{job}-{number}.jsonl"

    def write(
        self, launcher: str, jobs: Sequence[Job], submitted: Sequence[Submitted] = ()
    ) -> None:
        """Record what is given to a launcher, before and after it has accepted it."""
        recorded = [{**asdict(each), "log": each.log and str(each.log)} for each in submitted]
        content = {
            "time": round(time.time()),
            "launcher": launcher,
            "command": sys.argv,
            "after": {job.name: job.after for job in jobs},
            "commands": {job.name: job.commands for job in jobs},
            "submitted": recorded,
        }
        write_json(self.folder / "jobs.json", content)

    def read(self) -> dict[str, Any]:
        """What `write` wrote, with `submitted` as `Submitted`."""
        file = self.folder / "jobs.json"
        content = read_json(file, {"commands": {str: [[str]]}, "submitted": [dict]})
        submitted = []
        for each in content["submitted"]:
            submitted.append(Submitted(**{**each, "log": each["log"] and Path(each["log"])}))
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
    """Make the folder of a new submission, with a copy of the code.

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

        names = [path.name for path in (folder / "launch").glob("*")]
        numbers = [int(name) for name in names if name.isdecimal()]
        launch = Launch(folder / "launch" / str(max(numbers, default=0) + 1))
        snapshot(launch.code)
        launch.logs.mkdir()
        launch.journal("", 0).parent.mkdir()
    except OSError as error:
        raise UserError(
            f"run: {error.filename or folder} cannot be written: {error.strerror}"
        ) from error
    return launch


def check_jobs(jobs: Sequence[Job]) -> None:
    """Raise UserError for jobs with invalid or repeated names,
    or that wait for jobs not before them."""
    known: list[str] = []
    for job in jobs:
        if not re.fullmatch(r"[\w.-]+", job.name) or job.name in known:
            raise UserError(
                f"job {job.name}: its name must be of letters, digits, -, _ and . only, and no "
                "other job may have it"
            )
        for name in job.after:
            if name not in known:
                raise UserError(
                    f"job {job.name} is after {name}, which is not a job before it; "
                    f"{choices(name, known)}"
                )
        known.append(job.name)


def submit(jobs: Sequence[Job], folder: Path, launcher: Component) -> list[Submitted]:
    """Give jobs to a launcher, each after those that it waits for;
    their output goes to `folder/launch`.

    A launcher that waits returns when all have ended;
    commands whose predecessors failed are left out.

    Raises:
        UserError: for what is known to be impossible; nothing is queued then.
    """
    check_jobs(jobs)
    return LAUNCHERS.build(launcher).launch(jobs, folder)
