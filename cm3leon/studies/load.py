"""Studies and sweeps, read from their files and the command line; every run is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cm3leon.config import (
    SHIPPED,
    Choice,
    Override,
    Word,
    choices,
    from_mapping,
    parse_override,
    parse_word,
    settled,
    split_key,
    to_mapping,
    typed_value,
)
from cm3leon.evaluation.config import AskConfig, shown
from cm3leon.experiment import (
    SEEDS,
    SWEEP,
    Experiment,
    experiment_name,
    is_study,
    load_listed,
    load_mapping,
    load_plugins,
    overrides_of,
    split_setting,
    with_absolute_plugins,
    with_overrides,
)
from cm3leon.registry import discover
from cm3leon.studies.config import PlannedRun, Study, StudyConfig, StudyRun, rows
from cm3leon.studies.points import (
    ExperimentSweep,
    SweepConfig,
    named_points,
    values_of,
)
from cm3leon.studies.seeds import first_runs, name_of, of_seed
from cm3leon.types import UserError

HERE = "{run}"
"""Stands for the study's folder in paths."""
_OF_SWEEP = [field.name for field in fields(SweepConfig)]


def load_study(
    name_or_path: str,
    words: Sequence[str],
    folder: Path,
    *,
    trusted_plugins: Sequence[str] | None = None,
) -> Study:
    """Find a study, apply `key=value` words, and check it with the experiment of every run.

    `runs.NAME.key=value` replaces a value in the experiment of a run, `runs.*.key=value` in that of
    each. `{run}` stands for the folder. An experiment that is a single run becomes a study of that
    run, for words like `seeds=3`.

    Args:
        trusted_plugins: all plugins that may be loaded, see `load_plugins`; None trusts the file
            that is named.

    Raises:
        UserError: for a mistake in its file, in the words, or in one of its experiments.
        PluginError: for a plugin that fails to import.
    """
    single = not is_study(name_or_path)
    overrides = _of_single(name_or_path, words) if single else list(map(parse_override, words))
    discover()

    # Words are about the study itself, or about the experiment of one run or of all.
    own: list[Override] = []
    of_runs: list[Override] = []
    for override in overrides:
        if _of_run(override):
            path, value = override
            of_runs.append((path[1:], _with_folder(value, folder)))
        else:
            own.append(override)

    # The file as it is with the study's own words.
    if single:
        file = Path()
        mapping = with_overrides(_single(name_or_path), own)
    else:
        file, mapping = load_listed(name_or_path, SHIPPED, own)
    mapping = with_absolute_plugins(_with_folder(mapping, folder), Path.cwd())
    if trusted_plugins is not None:
        named = mapping.get("plugins", [])
        mapping["plugins"] = load_plugins(named, trusted_plugins, f"{name_or_path}: plugins")
    discover(mapping.get("plugins", []))

    # The command line may have given the whole section; what is not one is refused below.
    evaluations = mapping.get("evaluations")
    if isinstance(evaluations, Word):
        evaluations = mapping["evaluations"] = parse_word(evaluations, "evaluations")
    for evaluation in evaluations.values() if isinstance(evaluations, dict) else ():
        if isinstance(evaluation, dict) and "setting" in evaluation:
            evaluation["setting"] = settled(AskConfig, evaluation["setting"])
    # The file in the study's folder keeps the name with which the study was first started.
    if mapping.get("name") is None:
        mapping["name"] = name_or_path
    config = from_mapping(StudyConfig, mapping)

    # Only now is it known which runs there are.
    for (name, *_), _ in of_runs:
        if name not in (*config.runs, "*"):
            raise UserError(f"runs.{name} is not a run of this study; {choices(name, config.runs)}")

    # Plan each entry; a swept one becomes a run for every point.
    runs: dict[str, PlannedRun] = {}
    for name, plan in config.runs.items():
        if plan.experiment.endswith((".yaml", ".yml")):
            plan.experiment = str((file.parent / plan.experiment).resolve())
        try:
            found = _planned(name, plan, of_runs, trusted_plugins)
        except UserError as error:
            raise UserError(f"runs.{name}: {error}") from error
        for each in found:
            if each in runs:
                raise UserError(f"runs: two runs are named {each}; give one of them another name")
        runs |= found

    for run in runs.values():
        if config.seeds > 1 and "seed" in run.point:
            raise UserError(
                f"{SEEDS} is {config.seeds}, and runs.{run.entry}.sweep has seeds too; leave one of "
                "them out"
            )

    # Check every experiment before any seed is copied.
    study = Study(config, folder, runs, {})
    for name in runs:
        study.experiment(name)
    study.runs |= _copies(study)
    study.written = to_mapping(config)
    _check_rows(config)
    return study


def load_sweep(
    name_or_path: str,
    words: Sequence[str],
    folder: Path,
    *,
    until: str | None = None,
    trusted_plugins: Sequence[str] | None = None,
) -> Study:
    """Find a swept experiment, apply `key=value` words, and make it a study of one run.

    Raises:
        UserError: for a mistake in its file, in the words, in the values, or at a point.
    """
    mapping = load_mapping(name_or_path, words, trusted_plugins=trusted_plugins)
    if until:
        mapping["until"] = until

    # The file of the sweep keeps the name, for commands that continue or collect it.
    if mapping.get("sweep_of") is None:
        mapping["sweep_of"] = name_or_path
    if isinstance(mapping[SWEEP], Word):
        mapping[SWEEP] = parse_word(mapping[SWEEP], SWEEP)

    # What says the sweep stands beside the sections of the experiment.
    own: dict[str, Any] = {}
    sections: dict[str, Any] = {}
    for key, value in mapping.items():
        if key.startswith(SWEEP):
            own[key] = value
        else:
            sections[key] = value
    swept = from_mapping(ExperimentSweep, own)

    # Swept values are read from `own` again: their types are those of their keys.
    settings: dict[str, Any] = {SWEEP: own[SWEEP]}
    for key in _OF_SWEEP:
        if key != SWEEP:
            settings[key] = getattr(swept, key)
    plan = StudyRun(experiment=str(swept.sweep_of), **settings)
    runs = _points("", plan, sections, sections, {}, {})
    mapping[SWEEP] = plan.sweep

    title = folder.absolute().name
    about = f"A sweep of {swept.sweep_of} over {', '.join(plan.sweep)}"
    config = StudyConfig(title=title, about=about, name=swept.sweep_of, runs={"": plan})
    study = Study(config, folder.absolute(), runs, mapping, "sweep")
    for name in runs:
        study.experiment(name)
    launcher = from_mapping(Experiment, sections).launcher
    config.launcher = launcher
    return study


# -------------------------------------------------------------------------------------------- parts


def _single(name_or_path: str) -> dict[str, Any]:
    """The study whose only run is an experiment. Raises UserError for a sweep."""
    _, sections = load_listed(name_or_path, SHIPPED, ())
    if SWEEP in sections:
        raise UserError(
            f"{SEEDS}: {name_or_path} is a sweep, whose points have their seeds from "
            "sweep.seed=0,1,2"
        )

    # The study's file lies in its folder, from where a relative path would lead nowhere.
    name, experiment = experiment_name(name_or_path), name_or_path
    if experiment != name:
        experiment = str(Path(experiment).expanduser().resolve())
    study: dict[str, Any] = {
        "title": f"Seeds of {name}",
        "about": f"The experiment {name}, made and evaluated once for each seed.",
        "runs": {name: {"experiment": experiment}},
    }
    # A launcher may be a plugin's.
    for key in ("launcher", "plugins"):
        if key in sections:
            study[key] = sections[key]
    return study


def _of_single(name_or_path: str, words: Sequence[str]) -> list[Override]:
    """The words for a single run as the study of that run takes them: `training.steps=9` as
    `runs.NAME.training.steps=9`."""
    name, overrides = experiment_name(name_or_path), []
    for path, value in overrides_of(words):
        if path[0] in (SEEDS, "launcher", "plugins", "runs"):
            overrides.append((path, value))
        if path[0] not in (SEEDS, "launcher", "runs"):
            overrides.append((("runs", name, *path), value))
    return overrides


def _planned(
    entry: str,
    plan: StudyRun,
    words: Sequence[Override],
    trusted_plugins: Sequence[str] | None,
) -> dict[str, PlannedRun]:
    """The runs of an entry, with what the command line says of it or of all runs."""
    said: dict[str, Any] = {}
    for path, value in words:
        if path[0] in (entry, "*"):
            said = _later(said, {".".join(path[1:]): value})
    given = _later(plan.overrides, said)

    # The whole is read first: it may name plugins, without which the file alone makes no sense.
    whole = load_mapping(plan.experiment, settings=given, trusted_plugins=trusted_plugins)
    sections = load_mapping(plan.experiment, trusted_plugins=trusted_plugins)

    # A value is typed by the sections as those before it have left them.
    typed, before = {}, sections
    for key, value in given.items():
        typed[key] = typed_value(Experiment, before, split_setting(key), value)
        before = with_overrides(before, [(split_key(key), typed[key])])
    if "plugins" in typed:
        typed["plugins"] = whole["plugins"]  # absolute, as the study's file lies elsewhere
    plan.overrides = typed
    return _points(entry, plan, whole, sections, typed, {key: typed[key] for key in said})


def _later(overrides: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """Both, those of `last` behind the others: the name of a component replaces what stands
    before it."""
    return {key: value for key, value in overrides.items() if key not in last} | dict(last)


def _points(
    entry: str,
    plan: StudyRun,
    whole: Mapping[str, Any],
    sections: Mapping[str, Any],
    overrides: Mapping[str, Any],
    last: Mapping[str, Any],
) -> dict[str, PlannedRun]:
    """The runs of an entry by name: `NAME-VALUE-VALUE`, or `KEY=VALUE,KEY=VALUE` in a sweep.

    Args:
        whole: the sections with the overrides, by which swept values are read.
        last: overrides that take precedence over the values of a point.
    """

    def name_of_point(point: Mapping[str, Any]) -> str:
        return "-".join([entry, *map(shown, point.values())])

    values = values_of(plan.sweep, whole)
    points = named_points(plan, values, name_of_point if entry else None)

    # Keep the values as they were read, so that the written file means the same as the command.
    for key, of in values.items():
        if isinstance(of, Choice):
            plan.sweep[key] = list(of.values)
        else:
            plan.sweep[key] = str(plan.sweep[key])

    runs = {}
    for name, point in points.items():
        settings = _later(_later(overrides, point), last)
        runs[name] = PlannedRun(entry, plan, sections, settings, point)
    return runs


def _of_run(override: Override) -> bool:
    """Whether an override is about the experiment of a run, not about the study."""
    path = override[0]
    return path[0] == "runs" and len(path) > 2 and path[2] not in _OF_SWEEP


def _copies(study: Study) -> dict[str, PlannedRun]:
    """The runs of all seeds but the first, except those that the study already has."""
    names, copies = first_runs(study.runs), {}
    for seed in range(1, study.config.seeds):
        for name in names:
            if name_of(name, seed) not in study.runs:
                first = study.runs[name]
                overrides = of_seed(first.overrides, names, study.folder, seed)
                overrides["seed"] = study.experiment(name).seed + seed
                copies[name_of(name, seed)] = replace(first, overrides=overrides, copy=seed)
    return copies


def _check_rows(config: StudyConfig) -> None:
    """Raise UserError for a setting or sweep that no row can be made of, or an aim of no row."""
    named = {}
    for name, evaluation in config.evaluations.items():
        named[name] = [row.name for row in rows(name, evaluation)]

    for aim in config.aims:
        names = named[aim.evaluation]
        if aim.row not in names:
            raise UserError(
                f"aims: {aim.label}: row is {aim.row}, which {aim.evaluation} does not have; "
                f"{choices(aim.row, names)}"
            )


def _with_folder(content: Any, folder: Path) -> Any:
    """Put the study's folder into all paths of some content of a file."""
    if isinstance(content, str):
        return type(content)(content.replace(HERE, str(folder)))
    if isinstance(content, list):
        return [_with_folder(each, folder) for each in content]
    if isinstance(content, Mapping):
        replaced = {}
        for key, value in content.items():
            replaced[_with_folder(key, folder)] = _with_folder(value, folder)
        return replaced
    return content
