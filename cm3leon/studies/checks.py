"""Checks of a study before its first run starts.

A mistake that the last evaluation would find after hours is found here: runs that it reads from and
that neither exist nor are made before, stages that they do not make, and files of protocols that
are missing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from cm3leon.config import Component, choices
from cm3leon.experiment import Experiment
from cm3leon.records import MARKER
from cm3leon.stages.evaluation import check_protocol, named_runs
from cm3leon.stages.opening import CONFIG
from cm3leon.stages.table import stages_of
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
    made: dict[str, Sequence[str]] = {}
    mistakes: list[str] = []
    for name, run in study.runs.items():
        if name not in wanted:
            continue
        # Points of an entry, and copies with other seeds, have their settings at the same place.
        experiment = study.experiment(name)
        of_entry = f"runs.{run.entry}." if run.entry else ""
        stages = _stages(experiment)
        for where, folder, stage in _of_run(experiment, stages):
            mistakes += _mistakes(study, made, of_entry + where, folder, stage)

        # Its own evaluations may also name the run itself, which is made before they are asked.
        made[name] = stages
        asked = experiment.evaluations if "evaluation" in stages else {}
        for each, evaluation in asked.items():
            where = f"{of_entry}evaluations.{each}"
            for key, folder, stage in named_runs(evaluation):
                mistakes += _mistakes(study, made, f"{where}.setting.{key}", folder, stage)
            mistakes += _of_protocol(f"{where}.protocol", evaluation.protocol)

    for name in study.evaluations:
        if name in wanted:
            for where, folder, stage in _of_evaluation(study, name):
                mistakes += _mistakes(study, made, f"evaluations.{name}.{where}", folder, stage)
            protocol = study.evaluations[name].protocol
            mistakes += _of_protocol(f"evaluations.{name}.protocol", protocol)
    refuse(mistakes)


def _stages(experiment: Experiment) -> Sequence[str]:
    """The names of the stages that a run makes."""
    names = [stage.name for stage in stages_of(experiment)]
    return names[: names.index(experiment.until) + 1] if experiment.until else names


def _of_protocol(where: str, protocol: Component) -> Sequence[str]:
    """What is wrong with the files of a protocol."""
    try:
        check_protocol(where, protocol)
    except UserError as error:
        return sentences_of(error)
    return ()


def _of_run(experiment: Experiment, stages: Collection[str]) -> Iterator[Named]:
    """The other runs that a run reads from in the stages that it makes."""
    shards, start = experiment.shards, experiment.training.start
    if shards.tokenizers is not None:
        yield "shards.tokenizers", shards.tokenizers, "image_tokenizer"
    if shards.bank is not None:
        yield "shards.bank", shards.bank, "index"
    if "pretraining" not in stages:
        return
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
    study: Study, made: Mapping[str, Sequence[str]], where: str, folder: Path, stage: str
) -> Iterator[str]:
    """What is wrong with a folder, if something is.

    Args:
        made: the runs of the study that are made before the folder is read, with their stages.
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
        if stage and stage not in made[name]:
            yield (
                f"{where}: {folder} does not become {what}, as that run makes only "
                f"{', '.join(made[name])}"
            )
    elif name in study.runs:
        yield f"{where}: {folder} is not {what} by then; put {name} further up in runs"
    else:
        known = choices(name, study.runs)
        yield f"{where}: {folder} is not {what}, nor is {name} a run of this study; {known}"
