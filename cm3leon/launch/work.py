"""What runs inside a SLURM job: a command in submitit's process, and the batch script's look at its
end."""

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
FAILED = 1
"""Exit code of a bug, as Python has it."""


@dataclass(frozen=True)
class SlurmTask:
    """A command as submitit calls it, in each process of the job's step;
    the first keeps the journal.

    A training notes submitit's signal and ends with a checkpoint of all ranks; only then does the
    first rank call submitit's handler, which calls `checkpoint` and requeues the job. A stage
    without checkpoints calls it at once: its files are its progress.
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
        except UncompletedJobError as error:
            # submitit's handler has refused to requeue, wherever its signal arrived.
            reason = str(error).partition("because: ")[2].rstrip(".")
            why = f"it {reason.replace('timed-out', 'reached its time limit')}"
            write_event(self.journal, "stopped", at=progress(self.command), why=why)
            raise SystemExit(STOPPED) from error

        if code == 0 and first:
            write_event(self.journal, "done")
        elif code and (first or code != AGAIN):
            # Of ranks that were asked to stop, only the end of the first one counts.
            raise SystemExit(code)

    def queue_again(self) -> None:
        """Call submitit's handler of its signal, which ends the process,
        if SLURM lets the job continue.

        It does not if the job is cancelled or over its time limit, or if SLURM requeues it itself.
        """
        if is_running(job_id()):
            number = JobEnvironment._usr_sig()
            signal.getsignal(number)(number, None)  # type: ignore[operator, misc]  # a handler, not None
        write_event(self.journal, "again", at=progress(self.command))

    def checkpoint(self) -> DelayedSubmission:
        """What submitit starts next time: the same command, which continues from the run folder."""
        write_event(self.journal, "again", at=progress(self.command))
        return DelayedSubmission(self)


def run(command: tuple[str, ...]) -> int:
    """Exit code of `python -m cm3leon.run` with these arguments, in this process.

    The traceback of a bug is printed with its secrets masked. submitit would write it as it is into
    a file of the run folder.

    Raises:
        UncompletedJobError: from submitit's handler, if it does not requeue the job.
    """
    before, sys.argv = sys.argv, ["cm3leon.run", *command]
    try:
        runpy.run_module("cm3leon.run", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except UncompletedJobError:
        raise
    except Exception:
        sys.excepthook(*sys.exc_info())
        return FAILED
    finally:
        sys.argv = before
    return 0


def job_id() -> str:
    """The id by which `scontrol` knows this job; elements of an array have their own."""
    return os.environ["SLURM_JOB_ID"]


def is_running(job: str) -> bool:
    """Whether SLURM lets the job continue: not if it is cancelled, requeued,
    or over its time limit."""
    answer = subprocess.run(
        ["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=False
    )
    return bool(re.search(r"\bJobState=RUNNING\b", answer.stdout))


def after_step(launch: Launch, job: str, number: int, max_deaths: int, code: int) -> int:
    """What the batch script does when its step failed; returns its own exit code.

    A step that was killed could not write its journal. It is queued again, unless it died too often
    at the same point.
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
