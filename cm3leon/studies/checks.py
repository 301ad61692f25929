"""Checks of a study before its first run starts.

A mistake that the last evaluation would find after hours is found here: runs that it reads from and
that neither exist nor are made before, and files of protocols that are missing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from cm3leon.config import choices
from cm3leon.experiment import Experiment
from cm3leon.records import MARKER
from cm3leon.stages.evaluation import check_protocol
from cm3leon.stages.opening import CONFIG
from cm3leon.studies.config import Study, rows
from cm3leon.types import UserError, refuse, sentences_of

Named = tuple[str, Path, str]
"""A setting, the run folder that it names, and the stage which that run must have finished; "" for
none."""


def check_study(study: Study, wanted: Sequence[str]) -> None:
    """Check what the wanted runs and evaluations read from.

    Raises:
        UserError: naming all mistakes.
    """
    made: list[str] = []
    mistakes: list[str] = []
    for name in study.runs:
        if name in wanted:
            for where, folder, stage in _of_run(study.experiment(name)):
                mistakes += _mistakes(study, made, f"runs.{name}.{where}", folder, stage)
            made.append(name)
    for name in study.evaluations:
        if name in wanted:
            for where, folder, stage in _of_evaluation(study, name):
                mistakes += _mistakes(study, made, f"evaluations.{name}.{where}", folder, stage)
            try:
                check_protocol(f"evaluations.{name}.protocol", study.evaluations[name].protocol)
            except UserError as error:
                mistakes += sentences_of(error)
    refuse(mistakes)


def _of_run(experiment: Experiment) -> Iterator[Named]:
    """The other runs that a run reads from."""
    shards, start = experiment.shards, experiment.training.start
    if shards.tokenizers is not None:
        yield "shards.tokenizers", shards.tokenizers, "text_tokenizer"
    if shards.bank is not None:
        yield "shards.bank", shards.bank, "index"
    for folder in shards.mix:
        yield "shards.mix", Path(folder), "neighbours"
    if start is not None:
        yield "training.start", start, "pretraining"


def _of_evaluation(study: Study, name: str) -> Iterator[Named]:
    """The runs that an evaluation asks, retrieves from and ranks by."""
    for row in rows(name, study.evaluations[name]):
        # A checkpoint can be asked before the training has ended.
        stage = "pretraining" if row.setting.checkpoint is None else ""
        yield f"models.{row.model}", row.folder, stage
        if row.setting.bank is not None:
            yield "setting.bank", row.setting.bank, "index"
        if row.setting.ranker is not None:
            yield "setting.ranker", row.setting.ranker, "retriever"


def _mistakes(
    study: Study, made: Collection[str], where: str, folder: Path, stage: str
) -> Iterator[str]:
    """What is wrong with a folder, if something is.

    Args:
        made: the runs of the study that are made before the folder is read.
    """
    needed = folder / stage / MARKER if stage else folder / CONFIG
    if needed.is_file():
        return

    # A folder inside the study's is one of its runs, or a run that it does not make.
    what = f"the folder of a run with a finished {stage}" if stage else "a run folder"
    here, study_folder = folder.absolute(), study.folder.absolute()
    if study_folder not in here.parents:
        yield f"{where}: {folder} is not {what}: {needed} is missing"
        return
    name = here.relative_to(study_folder).parts[0]
    if name in made:
        return
    if name in study.runs:
        yield f"{where}: {folder} is not {what} by then; put {name} further up in runs"
    else:
        known = choices(name, study.runs)
        yield f"{where}: {folder} is not {what}, nor is {name} a run of this study; {known}"
