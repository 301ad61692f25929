"""End the jobs of a run, which goes on later from its checkpoints.

python -m cm3leon.run cancel run=runs/corpus
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from cm3leon.commands.words import RunOptions
from cm3leon.launch import cluster
from cm3leon.launch.follow import WAITING, states
from cm3leon.launch.jobs import newest_launch


@dataclass(kw_only=True)
class Options(RunOptions):
    """Options of the command cancel."""


def main(options: Options) -> None:
    """End a run's jobs. A running job writes a checkpoint first, a waiting one is withdrawn.

    Raises:
        UserError: for a folder from which no jobs were launched.
    """
    folder = options.run.absolute()
    launch = newest_launch(folder)
    waiting = [each for each, state in states(launch) if state.word in WAITING]

    # The elements of an array, 17_0, 17_1, ..., end together with the job 17.
    ids = list(dict.fromkeys(each.id.partition("_")[0] for each in waiting))
    if launch.read()["launcher"] == "slurm":
        cluster.cancel(ids)
    else:
        for id_ in ids:
            os.kill(int(id_), signal.SIGTERM)

    said = f"cancelled {', '.join(ids)}" if ids else "no job is running or waiting"
    print(
        f"{said}; to continue from the last checkpoint in {folder}, give the same command as before"
    )
