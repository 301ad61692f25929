"""A study as jobs: its runs one after the other, then what they are asked.

A study with a run `base`, a sweep `lr` of three points that share their tokens, and an evaluation
that the launcher makes in 4 parts; arrows point to the jobs that wait:

    base -> lr.shared0 -> lr.points (array of 3) -> answers (array of 4) -> measuring
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cm3leon.config import to_mapping
from cm3leon.launch.jobs import Job
from cm3leon.launch.runs import experiment_jobs, frozen_file, with_redo, with_until
from cm3leon.registry import LAUNCHERS
from cm3leon.stages.pipeline import first_unfinished
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.stage import number_of, redo_of
from cm3leon.stages.table import stages_of
from cm3leon.studies.config import Study
from cm3leon.studies.point import outcome_of, prepare_point
from cm3leon.studies.seeds import name_of
from cm3leon.studies.sharing import Group, groups_of

ANSWERS, MEASURING, COLLECTING = "answers", "measuring", "collect"


def study_jobs(study: Study, *, until: str | None = None, redo: Collection[str] = ()) -> list[Job]:
    """The jobs of what a study lacks: runs and points, the answers as an array, the measuring."""
    names, folder = list(study.runs), study.folder.absolute()
    wanted = names
    if until in names:
        wanted = names[: names.index(until) + 1]

    # Runs wait for the ones before them, as they may start from their weights.
    jobs: list[Job] = []
    for whole in study.batches():
        batch = [name for name in whole if name in wanted]
        if study.runs[whole[0]].plan.sweep:
            before = jobs[-1].name if jobs else None
            jobs += point_jobs(study, whole, unfinished(study, batch), redo, before)
            continue
        for name in batch:
            experiment = replace(study.experiment(name), launcher=study.config.launcher)
            added = experiment_jobs(experiment, folder / name, redo=redo, name=name)
            if jobs:
                added[0] = replace(added[0], after=(jobs[-1].name,))
            jobs += added

    if until in names:
        return jobs
    if study.config.evaluations:
        return [*jobs, *_answer_jobs(study, jobs, until)]

    # Without evaluations only the table is missing; it shows failed runs too.
    command = ("collect", f"run={folder}", *_plugin_words(study))
    after = (jobs[-1].name,) if jobs else ()
    return [*jobs, Job(COLLECTING, (command,), after=after, always=True, together=False)]


def unfinished(study: Study, names: Sequence[str]) -> list[str]:
    """The points that are not finished with their present settings."""
    found = []
    for name in names:
        outcome = outcome_of(study.experiment(name), study.folder / name)
        if outcome.get("state") != "finished":
            found.append(name)
    return found


def point_jobs(
    study: Study,
    batch: Sequence[str],
    missing: Sequence[str],
    redo: Collection[str] = (),
    before: str | None = None,
) -> list[Job]:
    """The jobs of an entry's missing points: the stages that several share, then an array.

    Args:
        batch: all points of the entry with one seed.
        before: name of the job that they wait for.
    """
    if not missing:
        return []
    folder, run = study.folder.absolute(), study.runs[batch[0]]
    title = ""
    if run.entry:
        title = f"{name_of(run.entry, run.copy)}."
    jobs: list[Job] = []
    commands = {}
    after = [before] if before else []

    for number, group in enumerate(groups_of(study, batch)):
        wanted, bare = [], []
        for name in group.points:
            if name in missing:
                wanted.append(name)
                if not _has_own_stages(study, name):
                    bare.append(name)

        # Stages are shared if two or more points need them. A point that has stages of its own
        # does not.
        if len(bare) > 1:
            shared = _shared_jobs(study, group, f"{title}shared{number}", redo)
            if shared and before:
                shared[0] = replace(shared[0], after=(before,))
            jobs += shared
            if shared:
                after.append(shared[-1].name)

        for name in wanted:
            experiment = study.experiment(name)
            prepare_point(experiment, folder / name)
            words = (f"run={folder / name}", f"shared={folder / group.name}")
            own = redo_of(stages_of(experiment), redo)
            commands[name] = ("point", *words, *with_redo(own), *_plugin_words(study, name))

    # The points start even if a shared stage failed: each can make it, and reports what is wrong.
    tries = {"max_deaths": 1 + run.plan.sweep_retries}
    ordered = tuple(commands[name] for name in missing)
    return [*jobs, Job(f"{title}points", ordered, tries, tuple(after), always=before is None)]


# -------------------------------------------------------------------------------------------- parts


def _answer_jobs(study: Study, runs: Sequence[Job], until: str | None) -> list[Job]:
    """The answers as an array if the launcher makes them in parts,
    and the job that measures them."""
    folder, launcher = study.folder.absolute(), LAUNCHERS.build(study.config.launcher)
    file = _frozen_study(study)
    words = (f"experiment={file}", f"run={folder}", "launcher=here")
    parts = launcher.parts(ANSWERS)
    command, resources = with_until(words, until), launcher.resources(MEASURING)

    # Jobs wait for the one before them, so the last run is the only one to wait for.
    after: tuple[str, ...] = ()
    if runs:
        after = (runs[-1].name,)

    # In one part, the job that measures also answers.
    if parts == 1:
        return [Job(MEASURING, (command,), resources, after)]
    commands = []
    for k in range(parts):
        commands.append(("part", f"part={k}/{parts}", *words))
    return [
        Job(ANSWERS, tuple(commands), launcher.resources(ANSWERS), after, together=False),
        Job(MEASURING, (command,), resources, (ANSWERS,), together=False),
    ]


def _frozen_study(study: Study) -> Path:
    """Write the study to a file whose experiments are files too, which nothing changes later."""
    folder, runs = study.folder.absolute(), {}
    for run in study.runs.values():
        if run.entry not in runs:
            file = frozen_file(run.sections, folder / run.entry)
            runs[run.entry] = replace(run.plan, experiment=str(file))
    return frozen_file(to_mapping(replace(study.config, runs=runs)), folder)


def _has_own_stages(study: Study, name: str) -> bool:
    """Whether the first stage of a point lies in its own folder,
    not behind a link to shared stages."""
    first = study.folder / name / stages_of(study.experiment(name))[0].name
    return first.is_dir() and not first.is_symlink()


def _plugin_words(study: Study, name: str | None = None) -> tuple[str, ...]:
    """Arguments that name the plugins to a job: whoever starts a study has named them, so its jobs
    may load them.

    Args:
        name: the run of the job; None for a job that reads all runs.
    """
    plugins = dict.fromkeys(study.config.plugins)
    for run in [name] if name else study.runs:
        plugins |= dict.fromkeys(study.experiment(run).plugins)
    return (f"plugins={json.dumps(list(plugins))}",) if plugins else ()


def _shared_jobs(study: Study, group: Group, title: str, redo: Collection[str]) -> list[Job]:
    """The jobs of the stages that points share; [] if they are made,
    or the points stop before them."""
    experiment = study.experiment(group.points[0])
    folder = study.folder.absolute() / group.name
    stages = stages_of(experiment)
    until = "pretraining" if group.pretraining else "neighbours"
    last = number_of(stages, until, "until")
    if experiment.until and number_of(stages, experiment.until, "until") <= last:
        return []

    shared = RunFolder(experiment, folder, torch.device("cpu"))
    missing, _ = first_unfinished(stages[: last + 1], shared, folder)
    if missing is None:
        return []
    placed = replace(experiment, launcher=study.config.launcher)
    return experiment_jobs(placed, folder, until=until, redo=redo, name=title)
