"""Make a worker's share of the shards of a stage, or of a study's answers.

python -m cm3leon.run part stage=tokens part=0/8 experiment=corpus data.path=tars run=runs/tars
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from cm3leon.commands.words import ExperimentRunOptions, RedoOptions
from cm3leon.types import UserError


@dataclass(kw_only=True)
class Options(ExperimentRunOptions, RedoOptions):
    """Options of the command part."""

    stage: str = ""
    """Name of a stage that workers share; a study needs none."""
    part: str = ""
    """Worker k, from 0, of n, as k/n; in a job of a SLURM array its number there, if nothing is said."""


def main(options: Options) -> None:
    """Makes the share.

    Raises:
        UserError: for a mistake in the settings, or a stage that cannot be shared or whose turn has not come.
    """
    share = _share(options.part)
    if options.is_study:
        from cm3leon.studies import load_study, run_study

        study = load_study(options.experiment, options.overrides, options.folder)
        run_study(study, asked=share)
        return
    from cm3leon.experiment import load_experiment
    from cm3leon.stages.running import run_stage_part

    if not options.stage:
        raise UserError("`part` needs a stage: stage=NAME, for example stage=tokens")
    experiment = load_experiment(options.experiment, options.overrides)
    redo = options.stages_to_redo
    run_stage_part(experiment, options.folder, options.stage, share, redo=redo)


def _share(text: str) -> tuple[int, int]:
    """`k/n` as numbers; in a job of a SLURM array, its place there if nothing is said."""
    if not text and "SLURM_ARRAY_TASK_ID" in os.environ:
        number, first, count = (
            int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "COUNT")
        )
        text = f"{number - first}/{count}"
    if not text:
        raise UserError(
            "`part` needs the worker's number: part=k/n for worker k, from 0, of n, for example part=0/8 "
            "(in a SLURM array --array=0-7 nothing need be said)"
        )
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise UserError(
            f"part is {text}; write part=k/n for worker k, from 0, of n, for example part=0/8"
        )
    return int(k), int(n)
