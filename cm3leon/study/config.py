"""What a study is: runs, evaluations of their models, and aims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cm3leon.config import (
    SHIPPED,
    Component,
    Range,
    Settings,
    choices,
    from_mapping,
    parse_lists,
    parse_override,
    settled,
)
from cm3leon.evaluate import Row
from cm3leon.evaluation.config import Aim, AskConfig, EvaluationConfig, combinations, named, shown
from cm3leon.evaluation.metrics import MOST_RUNS
from cm3leon.experiment import (
    SWEEP,
    Experiment,
    load_experiment,
    load_listed,
    typed_settings,
    with_absolute_plugins,
)
from cm3leon.registry import LAUNCHERS, discover
from cm3leon.stages.stage import number_of
from cm3leon.stages.table import stages_of
from cm3leon.study.seeds import first_runs, name_of, of_seed
from cm3leon.types import UserError

HERE = "{run}"
"""Stands for the study's folder in paths."""


@dataclass(kw_only=True)
class StudyRun:
    """One run of a study; its folder is `{run}/NAME`."""

    experiment: str
    """Name of an experiment, or the path of its file, relative to the study's."""
    overrides: Annotated[dict[str, Any], Settings(Experiment)] = field(default_factory=dict)
    """Dotted keys and the values they replace in it."""
    sweep: Annotated[dict[str, Any], Settings(Experiment, swept=True)] = field(default_factory=dict)
    """Dotted keys and what they take, a list, `1e-4,3e-4` or `range(3)`; there is a run for each combination, named
    NAME-VALUE-VALUE."""

    def check(self) -> None:
        self.sweep = parse_lists(self.sweep, SWEEP)


@dataclass(kw_only=True)
class StudyEvaluation(EvaluationConfig):
    """A protocol put to models under settings."""

    models: dict[str, Path]
    """Run folders with a finished pretraining, by the names that the result gives them."""
    against: Literal["sweep", "compute"] = "sweep"
    """What it is drawn against: the first swept key, or the FLOPs that the model was trained with."""

    def check(self) -> None:
        if not self.models:
            raise UserError("models is empty; give at least one run folder by a name")
        if self.against == "sweep":
            super().check()
        self.sweep = parse_lists(self.sweep, SWEEP)


@dataclass(kw_only=True)
class Study:
    """Runs, made in their order, then evaluations of their models, or of those of other runs."""

    title: str
    """Heading of the report."""
    about: str = ""
    """What is below it."""
    name: str | None = None
    """What the report calls the study's file; null = as it was named when the study was first started."""
    seeds: Annotated[int, Range(ge=1, le=MOST_RUNS)] = 1
    """Seeds that every run is made with; figures are then their mean, with their spread."""
    runs: dict[str, StudyRun] = field(default_factory=dict)
    """By their names."""
    evaluations: dict[str, StudyEvaluation] = field(default_factory=dict)
    """By their names."""
    aims: list[Aim] = field(default_factory=list)
    """Figures for the top of the report."""
    plugins: list[str] = field(default_factory=list)
    """Paths of plugins (.py files or package folders), relative to the file that names them."""
    launcher: Annotated[Component, LAUNCHERS] = field(
        default_factory=lambda: LAUNCHERS.check("here")
    )
    """Where its runs and evaluations are made."""

    def check(self) -> None:
        if not (self.runs or self.evaluations):
            raise UserError("runs and evaluations are both empty; a study has some of either")
        for aim in self.aims:
            if aim.evaluation not in self.evaluations:
                raise UserError(
                    f"aims: {aim.label}: evaluation is {aim.evaluation}; "
                    f"{choices(aim.evaluation, self.evaluations)}"
                )


def load_study(
    name_or_path: str, words: Sequence[str], folder: Path, shipped: Path = SHIPPED
) -> Study:
    """Finds a study, applies `key=value` words, and checks it with every experiment of its runs.

    `runs.NAME.key=value` replaces a value in the experiment of a run, and `runs.*.key=value` in that of each.
    `{run}` in it stands for the folder.

    Raises:
        UserError: for a mistake in its file, in the words, or in one of its experiments.
        PluginError: for a plugin that fails to import.
    """
    overrides = [parse_override(word) for word in words]
    discover()
    file, mapping = load_listed(
        name_or_path, shipped, [override for override in overrides if not _of_run(override)]
    )
    mapping = with_absolute_plugins(_with_folder(mapping, folder), Path.cwd())
    discover(mapping.get("plugins", []))
    for evaluation in mapping.get("evaluations", {}).values():
        if isinstance(evaluation, dict) and "setting" in evaluation:
            evaluation["setting"] = settled(AskConfig, evaluation["setting"])
    # The study's own file, written into its folder, keeps the name that it was first started by.
    if mapping.get("name") is None:
        mapping["name"] = name_or_path
    study = from_mapping(Study, mapping)
    of_runs = [(path[1:], value) for path, value in overrides if _of_run((path, value))]
    for (name, *_), _ in of_runs:
        if name not in (*study.runs, "*"):
            raise UserError(f"runs.{name} is not a run of this study; {choices(name, study.runs)}")
    study.runs = {
        name: run
        for first, plan in study.runs.items()
        for name, run in _swept_runs(first, plan, of_runs)
    }
    for run in study.runs.values():
        if run.experiment.endswith((".yaml", ".yml")):
            run.experiment = str((file.parent / run.experiment).resolve())
    for name, run in study.runs.items():
        run.overrides = typed_settings(run.experiment, run.overrides)
        load_run(study, name)
    study.runs |= _copies(study, folder)
    named = {
        name: [row.name for row in rows(name, each)] for name, each in study.evaluations.items()
    }
    for aim in study.aims:
        if aim.row not in named[aim.evaluation]:
            raise UserError(
                f"aims: {aim.label}: row is {aim.row}, which {aim.evaluation} has not; "
                f"{choices(aim.row, named[aim.evaluation])}"
            )
    return study


def load_run(study: Study, name: str) -> Experiment:
    """The experiment of a run. Raises UserError for one that is not valid, or whose `until` is none of its stages."""
    run = study.runs[name]
    try:
        experiment = load_experiment(run.experiment, settings=run.overrides)
        if experiment.until:
            number_of(stages_of(experiment), experiment.until, "until")
        return experiment
    except UserError as error:
        raise UserError(f"runs.{name}: {error}") from error


def rows(name: str, evaluation: StudyEvaluation) -> list[Row]:
    """The rows of an evaluation: each model under each combination of what is swept."""
    return [
        Row(", ".join([model, *named(point)]), model, folder, setting, point)
        for model, folder in evaluation.models.items()
        for point, setting in evaluation.points(f"evaluations.{name}.setting")
    ]


# ------------------------------------------------------------------------------------------------ parts


def _of_run(override: tuple[Any, Any]) -> bool:
    """Whether an override is of the experiment of a run, not of what a study says of it."""
    path = override[0]
    return path[0] == "runs" and len(path) > 2 and path[2] != SWEEP


def _swept_runs(
    first: str, plan: StudyRun, overrides: Sequence[Any]
) -> Iterator[tuple[str, StudyRun]]:
    """The runs of a plan, with what the command line says of it, or of all."""
    said = {".".join(path[1:]): value for path, value in overrides if path[0] in (first, "*")}
    for point in combinations(plan.sweep):
        name = "-".join([first, *map(shown, point.values())])
        yield (
            name,
            StudyRun(experiment=plan.experiment, overrides={**plan.overrides, **point, **said}),
        )


def _copies(study: Study, folder: Path) -> dict[str, StudyRun]:
    """The runs of all seeds but the first, of those that the study does not have yet."""
    names, copies = first_runs(study.runs), {}
    for seed in range(1, study.seeds):
        for name in names:
            if name_of(name, seed) not in study.runs:
                first = study.runs[name]
                overrides = of_seed(first.overrides, names, folder, seed)
                overrides["seed"] = load_run(study, name).seed + seed
                copies[name_of(name, seed)] = StudyRun(
                    experiment=first.experiment, overrides=overrides
                )
    return copies


def _with_folder(content: Any, folder: Path) -> Any:
    """The content with the study's folder in all its paths."""
    if isinstance(content, str):
        return type(content)(content.replace(HERE, str(folder)))
    if isinstance(content, Mapping):
        return {
            _with_folder(key, folder): _with_folder(value, folder) for key, value in content.items()
        }
    return (
        [_with_folder(each, folder) for each in content] if isinstance(content, list) else content
    )
