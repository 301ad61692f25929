"""A study is run: what is missing of its runs and answers is made, then measured, and one page shows it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cm3leon.config import choices, dump_yaml, to_mapping
from cm3leon.evaluate import Evaluation, Row, figures_line
from cm3leon.evaluation.origin import Origin
from cm3leon.io import read_json, write_json, write_text
from cm3leon.locks import locked
from cm3leon.paths import make_folder, naming
from cm3leon.provenance import machines
from cm3leon.records import MARKER, read_stage
from cm3leon.stages.attribution import attribution
from cm3leon.stages.running import run_experiment
from cm3leon.stages.table import stages_of
from cm3leon.study.compute import training_flops
from cm3leon.study.config import Study, StudyEvaluation, load_run, rows
from cm3leon.study.report import study_report
from cm3leon.study.seeds import first_runs, over_seeds, row_of_seed
from cm3leon.terminal import command_line
from cm3leon.training.distributed import current_rank, joined
from cm3leon.types import UserError

RESULTS = "results.json"
STUDY_FILE = "study.yaml"
WAIT = 24 * 3600
"""Seconds that a rank waits for those that have more to answer."""


def run_study(
    study: Study,
    folder: Path,
    *,
    until: str | None = None,
    redo: Collection[str] = (),
    asked: tuple[int, int] | None = None,
) -> None:
    """Makes the runs that are not finished, then the evaluations, and says where the report is.

    Args:
        until: name of a run or evaluation after which it ends.
        redo: stages of the runs that may be made anew although they are expensive, with all that depend on them.
        asked: (k, n): only share k of n of the answers is made, and nothing measured.

    Raises:
        UserError: for an unknown `until`, and whatever a run or an evaluation finds wrong.
    """
    names = check_until(study, until)
    check_study_redo(study, redo)
    wanted = names[: names.index(until) + 1] if until else names
    make_folder(folder, "run")
    rank = current_rank()
    # The answers of a study may be shared by jobs; whoever measures them holds the folder alone.
    shared = asked is not None
    with (
        locked(folder, shared=shared) if not rank or rank.number == 0 else nullcontext(),
        naming(folder),
    ):
        _run_study(study, folder, wanted, until, redo, asked)


def _run_study(
    study: Study,
    folder: Path,
    wanted: Sequence[str],
    until: str | None,
    redo: Collection[str],
    asked: tuple[int, int] | None,
) -> None:
    rank = current_rank()
    if asked is None and (rank is None or rank.number == 0):
        write_text(folder / STUDY_FILE, dump_yaml(to_mapping(study)))
    if asked is None:
        for number, name in enumerate((name for name in wanted if name in study.runs), 1):
            print(f"run {number} of {len(study.runs)}: {name}", flush=True)
            experiment = load_run(study, name)
            own = [stage.name for stage in stages_of(experiment) if stage.name in redo]
            run_experiment(experiment, folder / name, redo=own)
    with joined(rank, WAIT) as ranks:
        share = asked or (ranks.rank, ranks.count)
        found = {}
        for name in (name for name in wanted if name in study.evaluations):
            evaluation = study.evaluations[name]
            asking = Evaluation(evaluation.protocol, folder / "answers")
            of_seeds = rows_of_seeds(study, name, folder)
            for row in itertools.chain(*of_seeds):
                asking.answer(row, range(share[0], asking.shards(row), share[1]))
            ranks.barrier()
            if asked is None and ranks.first:
                found[name] = measured(asking, name, evaluation, of_seeds)
        if asked is not None or not ranks.first or until is not None:
            return
        again = command_line(f"experiment={folder / STUDY_FILE}", f"run={folder}")
        results = {
            "again": again,
            "study": to_mapping(study),
            "seconds": {name: _seconds(folder / name) for name in study.runs},
            "validation": {name: _validation(folder / name) for name in study.runs},
            "evaluations": {name: result for name, (result, _) in found.items()},
        }
        write_json(folder / RESULTS, results)
        study_report(
            folder / "report.html",
            study,
            results,
            {name: shown for name, (_, shown) in found.items()},
            Origin(str(study.name), again, datetime.now(UTC), machines([folder])),
            attribution(
                [load_run(study, name) for name in study.runs],
                study.evaluations.values(),
                [path for each in study.evaluations.values() for path in each.models.values()],
            ),
        )
    print(f"report: {folder / 'report.html'}")


def check_until(study: Study, until: str | None) -> list[str]:
    """The names of all parts of a study. Raises UserError for an `until` that is none of them."""
    names = [*study.runs, *study.evaluations]
    if until is not None and until not in names:
        raise UserError(
            f"until is {until}, which is no part of this study; {choices(until, names)}"
        )
    return names


def check_study_redo(study: Study, redo: Collection[str]) -> None:
    """Raises UserError for a name in `redo` that is a stage of none of the runs."""
    known = {stage.name for name in study.runs for stage in stages_of(load_run(study, name))}
    for name in redo:
        if name not in known:
            raise UserError(
                f"redo is {name}, which is not a stage of a run of this study; {choices(name, known)}"
            )


def rows_of_seeds(study: Study, name: str, folder: Path) -> list[list[Row]]:
    """The rows of an evaluation; each is a list of what it is for every seed."""
    names = first_runs(study.runs)
    return [
        [row_of_seed(row, names, folder, seed) for seed in range(study.seeds)]
        for row in rows(name, study.evaluations[name])
    ]


def measured(
    asking: Evaluation, name: str, evaluation: StudyEvaluation, of_seeds: Sequence[Sequence[Row]]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The result of each row of an evaluation, and for each what is shown of it: the first seed's."""
    results, pictures = [], []
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
    """The losses of a run's validation documents after its training; empty for one that did not train."""
    file = folder / "pretraining" / "validation.json"
    return read_json(file, {str: (int, float)}) if file.is_file() else {}


def _seconds(folder: Path) -> dict[str, float]:
    """How long each stage of a run took."""
    stages = sorted(file.parent for file in folder.glob(f"*/{MARKER}"))
    return {stage.name: read_stage(stage)["seconds"] for stage in stages}
