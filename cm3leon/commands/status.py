"""Say how far a run is: its stages, or its jobs.

    python -m cm3leon.run status run=runs/corpus

Jobs keep journals in the run folder. squeue and scontrol are asked about jobs that could not write
theirs; sacct is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from cm3leon.commands.words import RunOptions
from cm3leon.launch.follow import as_text, states
from cm3leon.launch.jobs import launches
from cm3leon.launch.standing import standing
from cm3leon.terminal import printable
from cm3leon.types import UserError


@dataclass(kw_only=True)
class Options(RunOptions):
    """Options of the command status."""


def main(options: Options) -> None:
    """Print the state of a run's jobs or, if it was started without jobs, of its stages.

    Raises:
        UserError: for a folder in which nothing was started.
    """
    folder = options.run.absolute()
    jobs = launches(folder)
    lines = list(as_text(states(jobs[-1]))) if jobs else standing(folder)
    if not lines:
        raise UserError(
            f"run: nothing was begun in {folder}; give the run= of a run that was started"
        )
    print("\n".join(map(printable, lines)))
