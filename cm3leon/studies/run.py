"""Run a study: make what is missing of its runs and answers, measure, and write its page."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cm3leon.config import choices, dump_yaml
from cm3leon.evaluate import Evaluation, Row, figures_line
from cm3leon.evaluation.report import write_page
from cm3leon.evaluation.report.answers import AnsweredItem
from cm3leon.io import read_json, write_json, write_text
from cm3leon.launch.follow import refuse_twice
from cm3leon.launch.runs import launched
from cm3leon.locks import locked
from cm3leon.paths import make_folder, naming
from cm3leon.provenance import record
from cm3leon.records import MARKER, read_stage
from cm3leon.registry import LAUNCHERS
from cm3leon.secrets import without_secrets
from cm3leon.stages.folders import check_run_folder
from cm3leon.stages.running import run_experiment
from cm3leon.stages.stage import redo_of
from cm3leon.stages.table import stages_of
from cm3leon.studies.checks import check_study
from cm3leon.studies.compute import training_flops
from cm3leon.studies.config import Study, StudyEvaluation, rows
from cm3leon.studies.jobs import point_jobs, study_jobs, unfinished
from cm3leon.studies.report import study_report
from cm3leon.studies.results import (
    as_csv,
    entries_of,
    own_evaluations,
    results_of,
)
from cm3leon.studies.seeds import first_runs, over_seeds, row_of_seed
from cm3leon.terminal import command_line
from cm3leon.training.distributed import current_rank, joined
from cm3leon.types import UserError

RESULTS, REPORT = "results.json", "report.html"
WAIT = 24 * 3600
"""Seconds that a rank waits for ranks with more to answer."""

Found = Mapping[str, tuple[list[dict[str, Any]], list[Sequence[AnsweredItem]]]]
"""For each evaluation the results of its rows, and the answered items to show of each."""


def is_made_here(study: Study) -> bool:
    """Whether this process starts the jobs of a study and waits for them: a sweep that is finished,
    or whose launcher waits."""
    detached = LAUNCHERS.get(study.config.launcher.name).detached
    return study.kind == "sweep" and not (detached and unfinished(study, list(study.runs)))


def launch_study(study: Study, *, until: str | None = None, redo: Collection[str] = ()) -> int:
    """Hand a study to its launcher, and print how to follow it.

    Returns:
        an exit code; 0 if none is known yet.

    Raises:
        UserError: as `run_study`, and for what the launcher can know to be impossible.
    """
    wanted = parts_until(study, until)
    check_study_redo(study, redo)
    check_study(study, wanted)
    check_run_folder(study.folder)
    make_folder(study.folder, "run")
    refuse_twice(study.folder)
    with locked(study.folder), naming(study.folder):
        write_text(study.file, dump_yaml(without_secrets(study.written)))
        for batch in study.batches():
            if study.runs[batch[0]].plan.sweep:
                _missing_points(study, [name for name in batch if name in wanted])
        jobs = study_jobs(study, until=until, redo=redo)
    return launched(jobs, study.folder.absolute(), study.config.launcher)


def run_study(
    study: Study,
    *,
    until: str | None = None,
    redo: Collection[str] = (),
    asked: tuple[int, int] | None = None,
) -> None:
    """Make the runs that are not finished, then the evaluations, and print where the report is.

    Args:
        until: name of the last run or evaluation to make.
        redo: stages of the runs that may be made anew although they are expensive, with all stages
            that depend on them.
        asked: (k, n): make only share k of n of the answers, and measure nothing.

    Raises:
        UserError: for an unknown `until` or `redo`, a folder that is not this study's, a run or a
            file that is named and does not exist, a mistake that a run or an evaluation finds, and
            points that failed.
    """
    wanted = parts_until(study, until)
    check_study_redo(study, redo)
    check_study(study, wanted)
    check_run_folder(study.folder)

    rank = current_rank()
    if study.kind == "sweep":
        if rank:
            raise UserError(
                "a sweep starts the processes of its points itself; run it once, with "
                "launcher=torchrun or launcher=slurm"
            )
        refuse_twice(study.folder)
    make_folder(study.folder, "run")
    first = rank is None or rank.number == 0

    # Several jobs may make answers at the same time; the one that measures has the folder alone.
    alone = locked(study.folder, shared=asked is not None)
    with alone if first else nullcontext(), naming(study.folder):
        if first and asked is None:
            record(study.folder)
            write_text(study.file, dump_yaml(without_secrets(study.written)))
        if asked is None:
            _make_runs(study, wanted, redo)
        # In their own order, also where one has the name of a run.
        found = _evaluated(study, [name for name in study.evaluations if name in wanted], asked)
        if first and asked is None and until is None:
            write_results(study, found)


def write_results(study: Study, found: Found | None = None) -> None:
    """Write `results.json`, the table and the page of the runs as they are, and print the best
    points and what is missing.

    Args:
        found: results of the evaluations; None if they were not made.

    Raises:
        UserError: if no point has the figure of `sweep_best`, after everything is written.
    """
    results, found, folder = results_of(study), found or {}, study.folder
    entries = entries_of(study, results)
    spread = {}
    for entry in entries:
        for result in entry.results:
            if result.spread:
                spread[result.name] = asdict(result)["spread"]

    # Points of a sweep link to stages that they share, whose time would count at each of them.
    seconds = {}
    for name, run in study.runs.items():
        if not run.plan.sweep:
            seconds[name] = _seconds(folder / name)

    # The file keeps the figures of each evaluation's rows, the page also shows their answers.
    evaluations, examples = {}, {}
    for name, (figures, items) in found.items():
        evaluations[name] = figures
        examples[name] = items
    own = own_evaluations(study)
    content = {
        "again": command_line(f"experiment={study.file}", f"run={folder}"),
        study.kind: study.written,
        "seconds": seconds,
        "validation": {name: _validation(folder / name) for name in study.runs},
        "runs": [asdict(result) for result in results.values()],
        "over_seeds": spread,
        "evaluations": evaluations,
        "own_evaluations": own,
    }
    write_json(folder / RESULTS, content)
    study_report(folder / REPORT, study, content, examples, entries)

    # The same for the terminal.
    for name, of_run in own.items():
        for asked, asked_rows in of_run["evaluations"].items():
            for row in asked_rows:
                print(f"      {name}, {asked} | {figures_line(row['row'], row)}")
    for result in results.values():
        if result.state != "finished":
            print(f"{result.state}: {result.name}{result.error and f', {result.error}'}")
    winners = []
    for entry in entries:
        best = entry.best
        winners.append(best)
        if best:
            print(f"{entry.wanted}: {best.figures[entry.column]:.6g} at {best.name}")
    if study.runs:
        table = study.file.with_suffix(".csv")
        write_page(table, as_csv(list(results.values()), winners))
        print(f"table: {table}")
    print(f"report: {folder / REPORT}", flush=True)

    for entry in entries:
        entry.check_best()


def parts_until(study: Study, until: str | None) -> list[str]:
    """The runs and evaluations of a study up to one of them.

    Raises:
        UserError: for an `until` that is not one of them.
    """
    names = [*study.runs, *study.evaluations]
    if until is None:
        return names
    if until not in names:
        raise UserError(
            f"until is {until}, which is not a run or an evaluation of this study; "
            f"{choices(until, names)}"
        )
    return names[: names.index(until) + 1]


def check_study_redo(study: Study, redo: Collection[str]) -> None:
    """Raise UserError for a name in `redo` that is not a stage of any run."""
    if not redo:
        return
    known: set[str] = set()
    for name in study.runs:
        known.update(stage.name for stage in stages_of(study.experiment(name)))
    for name in redo:
        if name not in known:
            raise UserError(
                f"redo is {name}, which is not a stage of a run of this {study.kind}; "
                f"{choices(name, known)}"
            )


def rows_of_seeds(study: Study, name: str) -> list[list[Row]]:
    """The rows of an evaluation, each as the list of its rows for every seed."""
    names, seeds = first_runs(study.runs), range(study.config.seeds)
    found = []
    for row in rows(name, study.evaluations[name]):
        of_row = []
        for seed in seeds:
            of_row.append(row_of_seed(row, names, study.folder, seed))
        found.append(of_row)
    return found


# -------------------------------------------------------------------------------------------- parts


def _make_runs(study: Study, wanted: Collection[str], redo: Collection[str]) -> None:
    """Make the missing runs in their order; the points of an entry as jobs of the launcher.

    Raises:
        UserError: for points that failed, after the page of what there is was written.
    """
    number = itertools.count(1)
    for batch in study.batches():
        # Ranks that were started together train every run together, points too.
        if study.runs[batch[0]].plan.sweep and current_rank() is None:
            _make_points(study, batch, [name for name in batch if name in wanted], redo)
            continue
        for name in batch:
            if name in wanted:
                print(f"run {next(number)} of {len(study.runs)}: {name}", flush=True)
                experiment = study.experiment(name)
                own = redo_of(stages_of(experiment), redo)
                run_experiment(experiment, study.folder / name, redo=own)


def _make_points(
    study: Study, batch: Sequence[str], wanted: Sequence[str], redo: Collection[str]
) -> None:
    """Hand the missing points of an entry to the launcher, and wait for them."""
    missing = _missing_points(study, wanted)
    if missing:
        jobs = point_jobs(study, batch, missing, redo)
        launched(jobs, study.folder.absolute(), study.config.launcher)
    failed = unfinished(study, missing)
    if failed:
        write_results(study)
        raise UserError(
            f"{len(failed)} of {len(wanted)} points did not finish, {'; '.join(failed)}; "
            "the same command tries them again"
        )


def _missing_points(study: Study, wanted: Sequence[str]) -> list[str]:
    """The points that are not finished; prints how many they are."""
    missing = unfinished(study, wanted)
    if wanted:
        print(f"{len(wanted)} points in {study.folder}, {len(missing)} to run", flush=True)
    return missing


def _evaluated(study: Study, wanted: Sequence[str], asked: tuple[int, int] | None) -> Found:
    """The results of the evaluations; {} on all ranks but the first,
    and if only a share is answered."""
    found = {}
    with joined(current_rank(), WAIT) as ranks:
        share = asked or (ranks.rank, ranks.count)
        for name in wanted:
            evaluation = study.evaluations[name]
            asking = Evaluation(evaluation.protocol, study.folder / "answers")
            of_seeds = rows_of_seeds(study, name)

            # Each rank or job answers every n-th file; the first rank measures when all are there.
            for row in itertools.chain(*of_seeds):
                asking.answer(row, range(share[0], asking.shards(row), share[1]))
            ranks.barrier()
            if asked is None and ranks.first:
                found[name] = _measured(asking, name, evaluation, of_seeds)
    return found


def _measured(
    asking: Evaluation, name: str, evaluation: StudyEvaluation, of_seeds: Sequence[Sequence[Row]]
) -> tuple[list[dict[str, Any]], list[Sequence[AnsweredItem]]]:
    """The result of each row of an evaluation, and the first seed's answered items to show."""
    results: list[dict[str, Any]] = []
    pictures: list[Sequence[AnsweredItem]] = []
    for of_row in of_seeds:
        first = of_row[0]
        result = over_seeds([asking.measure(row) for row in of_row])
        if evaluation.against == "compute":
            result["training_flops"] = training_flops(first.folder, first.setting.checkpoint)
        if len(of_row) > 1:
            result["identities"] = [asking.identity(row) for row in of_row]
        results.append(
            {
                "row": first.name,
                "model": first.model,
                "point": first.point,
                "identity": asking.identity(first),
                **result,
            }
        )
        print(f"      {name} | {figures_line(first.name, result)}", flush=True)
        pictures.append(asking.shown(first))
    return results, pictures


def _validation(folder: Path) -> dict[str, float]:
    """The losses of a run's validation documents after its training; {} if it did not train."""
    file = folder / "pretraining" / "validation.json"
    return read_json(file, {str: (int, float)}) if file.is_file() else {}


def _seconds(folder: Path) -> dict[str, float]:
    """Seconds that each stage of a run took."""
    seconds = {}
    for stage in sorted(file.parent for file in folder.glob(f"*/{MARKER}")):
        seconds[stage.name] = read_stage(stage)["seconds"]
    return seconds
