"""A sweep is run: what its points share, then the points that are not finished, then the table of their figures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cm3leon.config import (
    Choice,
    Component,
    Interval,
    Word,
    dump_yaml,
    from_mapping,
    parse_word,
    to_mapping,
)
from cm3leon.digests import remembered
from cm3leon.evaluation.origin import Origin
from cm3leon.evaluation.report import write_page
from cm3leon.experiment import SWEEP, Experiment, load_experiment, load_mapping
from cm3leon.io import digest_of, read_json, write_json, write_text
from cm3leon.launch.follow import refuse_twice
from cm3leon.launch.jobs import Job
from cm3leon.launch.runs import experiment_jobs, launched
from cm3leon.paths import naming, writing
from cm3leon.provenance import machines, record
from cm3leon.records import MARKER
from cm3leon.registry import LAUNCHERS
from cm3leon.stages.pipeline import first_unfinished
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.running import DIGESTS, run_experiment
from cm3leon.stages.stage import Stage, check_redo, number_of
from cm3leon.stages.table import stages_of
from cm3leon.sweep.points import (
    Point,
    SweepConfig,
    experiment_at,
    named_points,
    point_name,
    short_names,
    values_of,
)
from cm3leon.sweep.report import sweep_report
from cm3leon.sweep.results import Result, as_csv, best, check_best, read_figures
from cm3leon.terminal import command_line
from cm3leon.training.distributed import current_rank
from cm3leon.types import Again, UserError

SWEEP_FILE, TABLE, REPORT = "sweep.yaml", "sweep.csv", "report.html"
POINT_FILE = "point.yaml"
"""In the folder of a point: its experiment, which its job reads."""
OUTCOME = "outcome.json"
"""In the folder of a point whose run has ended: its `state`, the digest of the `config` it ran with, the `error`."""


@dataclass(frozen=True)
class Sweep:
    """A sweep whose every point has been checked."""

    folder: Path
    config: SweepConfig
    mapping: Mapping[str, Any]
    """The sections as they are written, from which the same sweep can be loaded again."""
    points: Mapping[str, Point]
    experiments: Mapping[str, Experiment]
    """Those of the points, each to be run where it is started."""
    launcher: Component
    redo: tuple[str, ...] = ()
    """Stages that the points may make anew although they are expensive."""
    logarithmic: frozenset[str] = frozenset()
    """Keys whose values are drawn evenly on a logarithmic scale."""


def load_sweep(
    name_or_path: str,
    words: Sequence[str],
    folder: Path,
    *,
    until: str | None = None,
    redo: Sequence[str] = (),
    trusted_plugins: Sequence[str] | None = None,
) -> Sweep:
    """Finds a sweep, applies `key=value` words, and checks each of its points.

    Raises:
        UserError: for a mistake in its file, in the words, in the values, or at a point.
    """
    mapping = load_mapping(name_or_path, words, trusted_plugins=trusted_plugins)
    if until:
        mapping["until"] = until
    # The file of the sweep keeps the name, for whoever goes on with it or collects it.
    if mapping.get("sweep_of") is None:
        mapping["sweep_of"] = name_or_path
    own = {key: value for key, value in mapping.items() if key.startswith(SWEEP)}
    config = from_mapping(SweepConfig, own)
    sections = {key: value for key, value in mapping.items() if not key.startswith(SWEEP)}
    swept = own[SWEEP]
    if isinstance(swept, Word):
        swept = parse_word(swept, SWEEP)
    values = values_of(swept, sections)
    points = named_points(config, values)
    # Written down as they were read, so that the file says the same as the command line.
    mapping[SWEEP] = {
        key: list(of.values) if isinstance(of, Choice) else str(swept[key])
        for key, of in values.items()
    }
    experiments = {name: experiment_at(sections, name, point) for name, point in points.items()}
    first, here = next(iter(experiments.values())), LAUNCHERS.check("here", "launcher")
    if first.until:
        number_of(stages_of(first), first.until, "until")
    check_redo(stages_of(first), redo)
    return Sweep(
        folder.absolute(),
        config,
        mapping,
        points,
        {name: replace(experiment, launcher=here) for name, experiment in experiments.items()},
        first.launcher,
        tuple(redo),
        frozenset(key for key, of in values.items() if isinstance(of, Interval) and of.logarithmic),
    )


def run_sweep(sweep: Sweep) -> None:
    """Runs the points that are not finished, each in a folder of its name, and makes `sweep.csv` and `report.html`.

    A launcher that does not wait is given the jobs, the last of which makes both.

    Raises:
        UserError: for what a launcher can know to be impossible, for a run of this sweep that is under way, for a start
            as one of several ranks, and, from a launcher that waits, for points that failed.
    """
    if current_rank():
        raise UserError(
            "a sweep starts the processes of its points itself; run it once, with launcher=torchrun or launcher=slurm"
        )
    refuse_twice(sweep.folder)
    with writing(sweep.folder, "run"), naming(sweep.folder):
        _run_sweep(sweep)


def _run_sweep(sweep: Sweep) -> None:
    """Run the missing points of a sweep whose folder this process holds alone."""
    write_text(sweep.folder / SWEEP_FILE, dump_yaml(sweep.mapping))
    missing = [name for name in sweep.points if _outcome(sweep, name).get("state") != "finished"]
    print(f"{len(sweep.points)} points in {sweep.folder}, {len(missing)} to run", flush=True)
    jobs = list(_jobs(sweep, missing)) if missing else []
    if missing and LAUNCHERS.get(sweep.launcher.name).detached:
        collecting = Job(
            "collect",
            (("collect", f"run={sweep.folder}", *_plugin_words(sweep)),),
            after=("points",),
            always=True,
            together=False,
        )
        launched([*jobs, collecting], sweep.folder, sweep.launcher)
        return
    if missing:
        launched(jobs, sweep.folder, sweep.launcher)
    results = make_table(sweep)
    failed = [result.name for result in results if result.state != "finished"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(results)} points did not finish, {'; '.join(failed)}; "
            "the same command tries them again"
        )


def run_point(
    folder: Path,
    shared: Path | None,
    trusted_plugins: Sequence[str] | None,
    redo: Sequence[str] = (),
) -> None:
    """Runs the experiment of a point in its folder, which has its `point.yaml`, and writes down how it ended.

    Stages that are finished in `shared` stand in the folder as links; one that is another at this point is made there
    in place of the link.
    """
    rank = current_rank()
    first = rank is None or rank.number == 0
    config = (folder / POINT_FILE).read_text()

    def end(state: str, error: str = "") -> None:
        if first:
            write_json(
                folder / OUTCOME, {"state": state, "config": _digest(config), "error": error}
            )

    if first:
        record(folder)
        (folder / OUTCOME).unlink(missing_ok=True)
        for marker in sorted(shared.glob(f"*/{MARKER}")) if shared else ():
            stage = folder / marker.parent.name
            if not stage.exists():
                stage.unlink(missing_ok=True)
                stage.symlink_to(os.path.relpath(marker.parent, folder))
    try:
        experiment = load_experiment(str(folder / POINT_FILE), trusted_plugins=trusted_plugins)
        run_experiment(experiment, folder, redo=redo)
    except Again:
        raise
    except Exception as error:
        end("failed", " ".join(str(error).split()) or type(error).__name__)
        raise
    end("finished")


def make_table(sweep: Sweep) -> list[Result]:
    """Writes `sweep.csv` and `report.html` of the points as they stand, and prints the best and what is missing.

    Raises:
        UserError: where no point has the figure of `sweep_best`, when both are written.
    """
    results = [_result(sweep, name) for name in sweep.points]
    winner = best(results, sweep.config.sweep_best)
    folder = sweep.folder
    origin = Origin(
        experiment=str(sweep.config.sweep_of),
        command=command_line(f"experiment={folder / SWEEP_FILE}", f"run={folder}"),
        date=datetime.now(UTC),
        machines=machines(folder / name for name in sweep.points),
    )
    sweep_report(
        folder / REPORT,
        folder.name,
        results,
        sweep.config.sweep_best,
        winner,
        origin,
        logarithmic=sweep.logarithmic,
    )
    write_page(sweep.folder / TABLE, as_csv(results, list(sweep.config.sweep), winner))
    for result in results:
        if result.state != "finished":
            print(f"{result.state}: {result.name}{result.error and f', {result.error}'}")
    if winner:
        column = sweep.config.sweep_best.partition(" ")[2]
        print(f"{sweep.config.sweep_best}: {winner.figures[column]:.6g} at {winner.name}")
    print(f"table: {sweep.folder / TABLE}")
    print(f"report: {sweep.folder / REPORT}", flush=True)
    check_best(results, sweep.config.sweep_best)
    return results


@dataclass(frozen=True)
class Group:
    """Points of a sweep that are made of the same tokenizers, tokens, vectors and neighbours."""

    name: str
    """Of the folder of what they share: `shared`, with what they have in common and others have not."""
    points: tuple[str, ...]
    pretraining: bool
    """Whether they share their pretraining, too."""


def groups_of(sweep: Sweep) -> list[Group]:
    """The points by what their stages read: those whose inputs up to pretraining are equal share them."""
    alike: dict[str, list[str]] = {}
    trained: dict[str, set[str]] = {}
    with remembered(sweep.folder / DIGESTS):
        for name, experiment in sweep.experiments.items():
            run = RunFolder(experiment, sweep.folder, torch.device("cpu"))
            stages = stages_of(experiment)
            last = number_of(stages, "pretraining", "until")
            inputs = [_inputs(stage, run) for stage in stages[: last + 1]]
            before = digest_of("".join(inputs[:-1]))
            alike.setdefault(before, []).append(name)
            trained.setdefault(before, set()).add(inputs[-1])

    short, points = short_names(list(sweep.config.sweep)), sweep.points
    groups: dict[str, Group] = {}
    for before, names in alike.items():
        first = points[names[0]]
        common = {
            key: value
            for key, value in first.items()
            if all(points[name][key] == value for name in names)
            and any(point[key] != value for point in points.values())
        }
        folder = ",".join(filter(None, ["shared", point_name(common, short)]))
        if folder in groups:  # they differ in what values of several keys make together
            folder = f"{folder},{before[:8]}"
        groups[folder] = Group(folder, tuple(names), len(trained[before]) == 1)
    return list(groups.values())


def _inputs(stage: Stage[RunFolder], run: RunFolder) -> str:
    """What a stage depends on, as text; where that cannot be told, why, which its point will say."""
    try:
        return json.dumps([stage.name, stage.inputs(run)], sort_keys=True)
    except UserError as error:
        return str(error)


# ------------------------------------------------------------------------------------------------ parts


def _jobs(sweep: Sweep, missing: Sequence[str]) -> Iterator[Job]:
    """What several of the missing points share, once, and behind it an array of the points."""
    commands, after = {}, []
    for number, group in enumerate(groups_of(sweep)):
        wanted = [name for name in group.points if name in missing]
        jobs = _shared_jobs(sweep, group, f"shared{number}") if len(wanted) > 1 else []
        yield from jobs
        after += [job.name for job in jobs[-1:]]
        for name in wanted:
            folder = sweep.folder / name
            folder.mkdir(exist_ok=True)
            write_text(folder / POINT_FILE, _config(sweep.experiments[name]))
            redo = (f"redo={','.join(sweep.redo)}",) if sweep.redo else ()
            shared = f"shared={sweep.folder / group.name}"
            words = (f"run={folder}", shared, *redo, *_plugin_words(sweep))
            commands[name] = ("point", *words)
    # A point can make what it would have shared: it says what is wrong with that, too.
    tries = {"max_deaths": 1 + sweep.config.sweep_retries}
    yield Job("points", tuple(commands[name] for name in missing), tries, tuple(after), always=True)


def _plugin_words(sweep: Sweep) -> tuple[str, ...]:
    """What a job is told of the plugins: whoever starts the sweep has named them, so its jobs may load them."""
    plugins = next(iter(sweep.experiments.values())).plugins
    return (f"plugins={json.dumps(plugins)}",) if plugins else ()


def _shared_jobs(sweep: Sweep, group: Group, title: str) -> list[Job]:
    """The jobs of the stages that points share; none where they are made, or the points end before."""
    experiment, folder = sweep.experiments[group.points[0]], sweep.folder / group.name
    until = "pretraining" if group.pretraining else "neighbours"
    stages = [stage.name for stage in stages_of(experiment)]
    last = stages.index(until)
    if experiment.until and stages.index(experiment.until) <= last:
        return []
    shared = RunFolder(experiment, folder, torch.device("cpu"))
    missing, _ = first_unfinished(stages_of(experiment)[: last + 1], shared, folder)
    if missing is None:
        return []
    return experiment_jobs(
        replace(experiment, launcher=sweep.launcher),
        folder,
        until=until,
        redo=sweep.redo,
        name=title,
    )


def _config(experiment: Experiment) -> str:
    return dump_yaml(to_mapping(experiment))


def _digest(config: str) -> str:
    return digest_of(config)


def _outcome(sweep: Sweep, name: str) -> dict[str, Any]:
    """How the last run of a point ended; empty where none has, or it was one with other settings."""
    file = sweep.folder / name / OUTCOME
    outcome = read_json(file, {"state": str, "error?": str}) if file.is_file() else {}
    return outcome if outcome.get("config") == _digest(_config(sweep.experiments[name])) else {}


def _result(sweep: Sweep, name: str) -> Result:
    outcome = _outcome(sweep, name)
    figures = read_figures(sweep.folder / name) if outcome.get("state") == "finished" else {}
    error = outcome.get("error", "")
    return Result(name, sweep.points[name], outcome.get("state", "missing"), figures, error)
