"""Print the end of a job's log, and with follow=true what is added to it.

python -m cm3leon.run logs run=runs/corpus follow=true
python -m cm3leon.run logs run=runs/corpus job=pretraining lines=200
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cm3leon.commands.words import RunOptions
from cm3leon.config import NonNegativeInt, PositiveInt, choices
from cm3leon.launch.follow import WAITING, State, states
from cm3leon.launch.jobs import Launch, Submitted, newest_launch
from cm3leon.types import UserError


@dataclass(kw_only=True)
class Options(RunOptions):
    """Options of the command logs."""

    job: str | None = None
    """Name of the job; null = the one that runs, or ran last."""
    number: NonNegativeInt | None = None
    """Which element of an array; null = the one that runs, or ran last."""
    lines: PositiveInt = 40
    """How many of the last lines are printed."""
    follow: bool = False
    """Whether to print what is added, until the job has ended."""


def main(options: Options) -> None:
    """Print the end of a job's log.

    Raises:
        UserError: for a job that was not launched, or has printed nothing yet.
    """
    launch = newest_launch(options.run.absolute())
    found = states(launch)
    job = _chosen(found, options)
    if not options.follow and not (job.log and job.log.is_file()):
        state = dict(found)[job]
        raise UserError(
            f"job {job.job} has printed nothing yet, it is {state.word} {state.more}".rstrip()
        )

    texts = _end(job, options.lines)
    if options.follow:
        texts = followed(job, launch, options.lines)
    for text in texts:
        # A progress bar's carriage returns stay: each begins a write of its own.
        for part in re.split(r"(?=\r)", text):
            print(part, end="", flush=True)


def _chosen(found: Sequence[tuple[Submitted, State]], options: Options) -> Submitted:
    """The job that the options name; of several, one that runs, else the last one with a log.

    Raises:
        UserError: for a name or a number that no job has.
    """
    names = list(dict.fromkeys(each.job for each, _ in found))
    if options.job is not None and options.job not in names:
        raise UserError(
            f"job is {options.job}, which was not launched; {choices(options.job, names)}"
        )
    fit = []
    for each, state in found:
        if options.job in (None, each.job) and options.number in (None, each.number):
            fit.append((each, state))
    if not fit:
        # Each job counts its own commands, so several jobs have the same numbers.
        numbers = sorted({each.number for each, _ in found if options.job in (None, each.job)})
        allowed = " or ".join(map(str, numbers))
        if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            allowed = f"one from {numbers[0]} to {numbers[-1]}"
        raise UserError(f"number is {options.number}, which no job has; choose {allowed}")

    running = [each for each, state in fit if state.word in ("running", "ending")]
    printed = [each for each, _ in fit if each.log and each.log.is_file()]
    return [*running, *reversed(printed), fit[0][0]][0]


def _end(each: Submitted, lines: int) -> Iterator[str]:
    assert each.log is not None
    with each.log.open(errors="replace", newline="") as file:
        yield from deque(file, maxlen=lines)


def followed(each: Submitted, launch: Launch, lines: int, seconds: float = 1.0) -> Iterator[str]:
    """The last lines of a log, then what is added to it, until the job has ended.

    Args:
        seconds: between two looks at the file.
    """
    # A job that waits has no log yet.
    while each.log is None or not each.log.is_file():
        if dict(states(launch))[each].word not in WAITING:
            return
        time.sleep(seconds)

    yield from _end(each, lines)
    with each.log.open(errors="replace", newline="") as file:
        file.seek(0, os.SEEK_END)
        ended = False
        while True:
            text = file.read()
            if text:
                yield text
            elif ended:
                return
            else:
                # Read once more after the end was seen: the job may have printed in between.
                ended = dict(states(launch))[each].word not in WAITING
                if not ended:
                    time.sleep(seconds)
