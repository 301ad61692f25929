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
    """Name of a stage that is split across workers; a study needs none."""
    part: str = ""
    """Worker k, from 0, of n, as k/n; by default the job's own number in its SLURM array."""


def main(options: Options) -> None:
    """Make one worker's share.

    Raises:
        UserError: for a mistake in the settings, a stage that cannot be split across workers, or
            one that needs an unfinished stage.
    """
    share = _share(options.part)
    if options.is_study:
        # Of a study, workers share the items that its models are asked.
        from cm3leon.studies import load_study, run_study

        study = load_study(options.experiment, options.overrides, options.folder)
        if not study.evaluations:
            raise UserError(
                "this study asks its models nothing, so there is nothing to share; `part` of one "
                "of its runs is experiment=NAME run=FOLDER stage=STAGE"
            )
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
    """`k/n` as numbers; by default those of this job in its SLURM array.

    Raises:
        UserError: for a text of another form, or no text outside of an array.
    """
    if not text and "SLURM_ARRAY_TASK_ID" in os.environ:
        number, first, count = (
            int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "COUNT")
        )
        text = f"{number - first}/{count}"  # --array=8-15 counts from 8
    if not text:
        raise UserError(
            "`part` needs the worker's number: part=k/n for worker k, from 0, of n, "
            "for example part=0/8 (jobs of a SLURM array, such as --array=0-7, need none)"
        )

    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise UserError(
            f"part is {text}; write part=k/n for worker k, from 0, of n, for example part=0/8"
        )
    return int(k), int(n)
