"""Which points share stages: those whose stages before pretraining read the same.

A sweep over `training.learning_rate` and `seed`, where the seed changes the tokenizers too:

    learning_rate=0.001,seed=0   learning_rate=0.003,seed=0     share the folder shared,seed=0
    learning_rate=0.001,seed=1   learning_rate=0.003,seed=1     share the folder shared,seed=1
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cm3leon.digests import remembered
from cm3leon.experiment import Experiment
from cm3leon.io import digest_of
from cm3leon.registry import SOURCES
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.running import DIGESTS
from cm3leon.stages.stage import Stage, number_of
from cm3leon.stages.table import stages_of
from cm3leon.studies.config import Study
from cm3leon.studies.points import point_name, short_names
from cm3leon.studies.seeds import name_of
from cm3leon.types import UserError


@dataclass(frozen=True)
class Group:
    """Points made of the same tokenizers, tokens, vectors and neighbours."""

    name: str
    """Name of the folder of what they share: `shared`, with the values that they have in common and
    other points have not."""
    points: tuple[str, ...]
    pretraining: bool
    """Whether they share their pretraining too."""


def groups_of(study: Study, names: Sequence[str]) -> list[Group]:
    """Group the points of an entry by what their stages read before pretraining."""
    alike: dict[str, list[str]] = {}
    trained: dict[str, set[str]] = {}
    corpora: dict[str, str | None] = {}
    with remembered(study.folder / DIGESTS):
        for name in names:
            experiment = study.experiment(name)
            # What a corpus holds is read once for all points of it.
            data = repr(experiment.data)
            if data not in corpora:
                corpora[data] = _fingerprint(experiment)
            run = RunFolder(
                experiment, study.folder, torch.device("cpu"), corpus_fingerprint=corpora[data]
            )

            # Digests of all that the stages up to pretraining depend on.
            stages = stages_of(experiment)
            last = number_of(stages, "pretraining", "until")
            inputs = [_inputs(stage, run) for stage in stages[: last + 1]]
            before = digest_of("".join(inputs[:-1]))
            alike.setdefault(before, []).append(name)
            trained.setdefault(before, set()).add(inputs[-1])

    first = study.runs[names[0]]
    points = {name: study.runs[name].point for name in names}
    short = short_names(list(first.plan.sweep))
    prefix = ",".join(filter(None, [first.entry, "shared"]))
    groups: dict[str, Group] = {}
    for before, members in alike.items():
        # Named by the values that all members have, and some other point has not.
        common = {}
        for key, value in points[members[0]].items():
            shared = all(points[name][key] == value for name in members)
            if shared and any(point[key] != value for point in points.values()):
                common[key] = value
        folder = name_of(",".join(filter(None, [prefix, point_name(common, short)])), first.copy)

        # Groups may differ only in what several keys make together; then the digest tells them
        # apart.
        if folder in groups:
            folder = f"{folder},{before[:8]}"
        groups[folder] = Group(folder, tuple(members), len(trained[before]) == 1)
    return list(groups.values())


def _fingerprint(experiment: Experiment) -> str | None:
    """The fingerprint of the corpus; None if it cannot be told,
    which the stages that read it report."""
    try:
        return SOURCES.build(experiment.data).fingerprint()
    except UserError:
        return None


def _inputs(stage: Stage[RunFolder], run: RunFolder) -> str:
    """What a stage depends on, as text; or why that cannot be told, which its point will report."""
    try:
        return json.dumps([stage.name, stage.inputs(run)], sort_keys=True)
    except UserError as error:
        return str(error)
