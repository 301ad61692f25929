"""Say where a run stands: its stages, or its jobs.

    python -m cm3leon.run status run=runs/corpus

Of jobs, it reads the journals that they keep in the run folder, and asks squeue and scontrol for those that cannot
speak; sacct is not needed.
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
    """Prints where the jobs of a run stand, or, of one that was made without jobs, its stages.

    Raises:
        UserError: for a folder in which nothing was begun.
    """
    folder = options.run.absolute()
    jobs = launches(folder)
    lines = list(as_text(states(jobs[-1]))) if jobs else standing(folder)
    if not lines:
        raise UserError(
            f"run: nothing was begun in {folder}; give the run= of a run that was started"
        )
    print("\n".join(map(printable, lines)))
