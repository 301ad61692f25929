"""What runs inside a job of SLURM: a command in submitit's process,
and a look at its end by the batch script."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import DelayedSubmission, UncompletedJobError

from cm3leon.launch.jobs import Launch
from cm3leon.launch.journal import ENDED, outcome, progress, read_events, write_event
from cm3leon.types import AGAIN

STOPPED = 1
"""Exit code of a job that is not started again."""


@dataclass(frozen=True)
class SlurmTask:
    """A command as submitit calls it, in each process of the job's step;
    the first keeps the journal.

    The training notes submitit's signal and ends with a checkpoint of all ranks; only then does the
    first one go submitit's way to `checkpoint` and to the queue. A stage without checkpoints goes
    there at once: its files are its progress.
    """

    command: tuple[str, ...]
    journal: Path

    def __call__(self) -> None:
        first = JobEnvironment().global_rank == 0
        if first:
            write_event(self.journal, "started", at=progress(self.command), job=job_id())
        try:
            code = run(self.command)
            if code == AGAIN and first:
                self.queue_again()
        except (
            UncompletedJobError
        ) as error:  # submitit's handler, wherever its signal came, has refused to requeue
            why = (
                str(error)
                .partition("because: ")[2]
                .rstrip(".")
                .replace("timed-out", "reached its time limit")
            )
            write_event(self.journal, "stopped", at=progress(self.command), why=f"it {why}")
            raise SystemExit(STOPPED) from error
        if code == 0 and first:
            write_event(self.journal, "done")
        elif code and (
            first or code != AGAIN
        ):  # of those that make room, only the first one's end counts
            raise SystemExit(code)

    def queue_again(self) -> None:
        """Hands over to submitit's handler of its signal, which ends the process,
        if SLURM means the job to go on.

        It does not where the job is cancelled or over its time,
        or where SLURM puts it back into the queue itself.
        """
        if is_running(job_id()):
            number = JobEnvironment._usr_sig()
            signal.getsignal(number)(number, None)  # type: ignore[operator, misc]  # a handler, not None
        write_event(self.journal, "again", at=progress(self.command))

    def checkpoint(self) -> DelayedSubmission:
        """What submitit starts next time: the same,
        which goes on from what it finds in the run folder."""
        write_event(self.journal, "again", at=progress(self.command))
        return DelayedSubmission(self)


def run(command: tuple[str, ...]) -> int:
    """Exit code of `python -m cm3leon.run` with these arguments, in this process;
    raises what that lets through."""
    before, sys.argv = sys.argv, ["cm3leon.run", *command]
    try:
        runpy.run_module("cm3leon.run", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before
    return 0


def job_id() -> str:
    """The id by which `scontrol` knows this job, an array's element by its own."""
    return os.environ["SLURM_JOB_ID"]


def is_running(job: str) -> bool:
    """Whether SLURM means the job to go on: not for one that is cancelled, being requeued,
    or over its time."""
    answer = subprocess.run(
        ["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=False
    )
    return bool(re.search(r"\bJobState=RUNNING\b", answer.stdout))


def after_step(launch: Launch, job: str, number: int, max_deaths: int, code: int) -> int:
    """What the batch script does when its step has ended with a code that is not 0.
    Returns its own exit code.

    A step that was killed could not say so itself. It is queued again,
    unless it died at the same place too often.
    """
    journal, command = launch.journal(job, number), launch.read()["commands"][job][number]
    events = read_events(journal)
    if events and events[-1]["event"] in ("again", *ENDED):
        return code
    event, details = outcome(code, progress(command), events, max_deaths)
    write_event(journal, event, **details)
    if event == "died" and is_running(job_id()):
        subprocess.run(["scontrol", "requeue", job_id()], check=False)
    elif event == "stopped":
        print(f"cm3leon: {details['why']}; it is not started again", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(after_step(Launch(Path(sys.argv[1])), sys.argv[2], *map(int, sys.argv[3:6])))
