"""What a study is: runs, evaluations of their models, and aims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from cm3leon.config import (
    Component,
    Range,
    Settings,
    choices,
    from_mapping,
    parse_values,
    split_key,
)
from cm3leon.config.values import Interval
from cm3leon.evaluate import Row
from cm3leon.evaluation.config import Aim, EvaluationConfig, named
from cm3leon.evaluation.metrics import MOST_RUNS
from cm3leon.experiment import Experiment, with_overrides
from cm3leon.records import KINDS
from cm3leon.registry import LAUNCHERS
from cm3leon.stages.stage import number_of
from cm3leon.stages.table import stages_of
from cm3leon.studies.points import Point, SweepConfig
from cm3leon.types import UserError

Kind = Literal["study", "sweep"]


@dataclass(kw_only=True)
class StudyRun(SweepConfig):
    """One run of a study, in the folder `{run}/NAME`, or a run at each point of what it sweeps, in
    `{run}/NAME-VALUE`."""

    experiment: str
    """Name of an experiment, or the path of its file, relative to the study's."""
    overrides: Annotated[dict[str, Any], Settings(Experiment)] = field(default_factory=dict)
    """Dotted keys, and the values that replace those of the experiment."""

    @property
    def logarithmic(self) -> set[str]:
        """Swept keys whose values are drawn evenly on a logarithmic scale."""
        found = set()
        for key, given in self.sweep.items():
            values = parse_values(key, given)
            if isinstance(values, Interval) and values.logarithmic:
                found.add(key)
        return found


@dataclass(kw_only=True)
class StudyEvaluation(EvaluationConfig):
    """A protocol, asked of models under settings."""

    models: dict[str, Path]
    """Run folders with a finished pretraining, by the names that they have in the result."""
    against: Literal["sweep", "compute"] = "sweep"
    """Horizontal axis of the plot: the first swept key, or the FLOPs of the model's training."""

    def check(self) -> None:
        if not self.models:
            raise UserError(
                "models is empty; give at least one run folder by a name, for example "
                "{digits: runs/digits}"
            )
        super().check()

    def needs_sweep(self) -> bool:
        """Whether its plot needs a swept key."""
        return self.against == "sweep"


@dataclass(kw_only=True)
class StudyConfig:
    """Runs, made in their order, then evaluations of their models or of those of other runs."""

    title: str
    """Heading of the report."""
    about: str = ""
    """Text below the heading."""
    name: str | None = None
    """What the report calls the study's file; null: the name with which it was first started."""
    seeds: Annotated[int, Range(ge=1, le=MOST_RUNS)] = 1
    """Seeds that every run is made with; figures are then means over the seeds,
    with their spread."""
    runs: dict[str, StudyRun] = field(default_factory=dict)
    """The runs, by name."""
    evaluations: dict[str, StudyEvaluation] = field(default_factory=dict)
    """The evaluations, by name."""
    aims: list[Aim] = field(default_factory=list)
    """Figures for the top of the report."""
    plugins: list[str] = field(default_factory=list)
    """Paths of plugins (.py files or package folders), relative to the file that names them."""
    launcher: Annotated[Component, LAUNCHERS] = field(
        default_factory=lambda: LAUNCHERS.check("here")
    )
    """Starts the runs and evaluations."""

    def check(self) -> None:
        if not (self.runs or self.evaluations):
            raise UserError(
                "runs and evaluations are both empty; a study needs at least one run or evaluation"
            )
        for aim in self.aims:
            if aim.evaluation not in self.evaluations:
                raise UserError(
                    f"aims: {aim.label}: evaluation is {aim.evaluation}, which is not known; "
                    f"{choices(aim.evaluation, self.evaluations)}"
                )


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study: the experiment of its entry at one point of the sweep, with one seed."""

    entry: str
    """Name of its entry in the study's `runs`; "" in a sweep, which has only one."""
    plan: StudyRun
    """The entry itself."""
    sections: Mapping[str, Any]
    """Sections of the entry's experiment, as its file has them."""
    overrides: dict[str, Any]
    """Dotted keys and the values that replace those of the sections: the entry's, the point's, the
    seed."""
    point: Point
    """The swept keys and their values; {} if nothing is swept."""
    copy: int = 0
    """Index of the seed: 0 for the first one."""


@dataclass
class Study:
    """A study in which every run has been checked."""

    config: StudyConfig
    folder: Path
    runs: dict[str, PlannedRun]
    """Every run by the name of its folder, in the order in which they are made."""
    written: Mapping[str, Any]
    """The mapping kept in its folder, from which the same study can be loaded."""
    kind: Kind = "study"
    _checked: dict[str, Experiment] = field(default_factory=dict, repr=False)

    @property
    def evaluations(self) -> dict[str, StudyEvaluation]:
        """The evaluations, by name."""
        return self.config.evaluations

    @property
    def file(self) -> Path:
        """The file in its folder that keeps the study's settings."""
        return self.folder / KINDS[self.kind]

    def experiment(self, name: str) -> Experiment:
        """The experiment of a run, with the launcher `here`.

        Raises:
            UserError: for an invalid experiment, or an `until` that is not one of its stages.
        """
        if name not in self._checked:
            try:
                self._checked[name] = self._read(self.runs[name])
            except UserError as error:
                where = f"sweep, point {name}" if self.kind == "sweep" else f"runs.{name}"
                raise UserError(f"{where}: {error}") from error
        return self._checked[name]

    def _read(self, run: PlannedRun) -> Experiment:
        overrides = [(split_key(key), value) for key, value in run.overrides.items()]
        mapping = with_overrides(run.sections, overrides)
        experiment = from_mapping(Experiment, mapping)
        if experiment.until:
            number_of(stages_of(experiment), experiment.until, "until")
        return replace(experiment, launcher=LAUNCHERS.check("here", "launcher"))

    def batches(self) -> list[list[str]]:
        """The runs in batches that may be made side by side:
        the points of an entry with one seed."""
        parts = groupby(self.runs, lambda name: (self.runs[name].entry, self.runs[name].copy))
        return [list(names) for _, names in parts]


def rows(name: str, evaluation: StudyEvaluation) -> list[Row]:
    """The rows of an evaluation: each model under each combination of the swept values.

    Two models and `sweep: {decoder.cfg: [1, 3]}` give four rows:

        small, cfg 1    small, cfg 3    large, cfg 1    large, cfg 3
    """
    found = []
    for model, folder in evaluation.models.items():
        for point, setting in evaluation.points(f"evaluations.{name}.setting"):
            found.append(Row(", ".join([model, *named(point)]), model, folder, setting, point))
    return found
