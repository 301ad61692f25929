"""Results of a study's runs: read from their folders, put into one table, the best points marked.

With two seeds, a swept entry `lr` becomes rows like these. A run's figures are one result each;
the entry has one result a point, the mean over the seeds:

    runs      lr-0.001          loss 3.10     lr-0.003          loss 2.98
              lr-0.001-seed_1   loss 3.14     lr-0.003-seed_1   loss 3.02
    entry lr  lr-0.001          loss 3.12     lr-0.003          loss 3.00   best
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from cm3leon.config import choices
from cm3leon.evaluation.config import shown
from cm3leon.evaluation.metrics import OverRuns, over_runs
from cm3leon.experiment import RunEvaluation
from cm3leon.io import read_json, read_json_lines
from cm3leon.records import MARKER
from cm3leon.registry import PROTOCOLS
from cm3leon.stages.evaluation import RESULTS, best_row
from cm3leon.stages.pipeline import first_unfinished
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.table import stages_of
from cm3leon.studies.config import Study, StudyRun
from cm3leon.studies.point import outcome_of
from cm3leon.studies.points import Point
from cm3leon.studies.seeds import first_runs, name_of, own_over_seeds
from cm3leon.types import UserError

LOWEST = "lowest loss"
"""What makes a point the best, unless `sweep_best` says otherwise."""
State = Literal["finished", "failed", "missing"]
"""finished, failed: as the run recorded. missing: not started, still running, or ended without a
record."""


@dataclass(frozen=True)
class RunResult:
    """The result of a run of a study, or the mean of its seeds."""

    name: str
    point: Point
    state: State
    figures: Mapping[str, float] = field(default_factory=dict)
    """By columns of the table; means over the seeds."""
    error: str = ""
    """Why it failed, in a sentence."""
    spread: Mapping[str, OverRuns] = field(default_factory=dict)
    """How each figure varies over the seeds; {} for a single seed."""

    def has(self, column: str) -> bool:
        """Whether it has a finite figure of this name."""
        return math.isfinite(self.figures.get(column, math.nan))


@dataclass(frozen=True)
class StudyEntry:
    """An entry of a study with a result for each of its points;
    an entry without a sweep has one."""

    name: str
    """"" in a sweep."""
    plan: StudyRun
    results: Sequence[RunResult]

    @property
    def wanted(self) -> str:
        """What makes a point the best, such as `lowest loss`."""
        return self.plan.sweep_best or LOWEST

    @property
    def column(self) -> str:
        """The figure that decides which point is best."""
        return self.wanted.partition(" ")[2]

    @property
    def finished(self) -> list[RunResult]:
        """The results of finished points."""
        return [result for result in self.results if result.state == "finished"]

    @property
    def best(self) -> RunResult | None:
        """The best finished point; None if none has the figure, or nothing is swept."""
        if not self.plan.sweep:
            return None
        sign = 1 if self.wanted.startswith("lowest") else -1
        able = [result for result in self.finished if result.has(self.column)]
        return min(able, key=lambda result: sign * result.figures[self.column], default=None)

    def check_best(self) -> None:
        """Raise UserError if points are finished and none has the column of `sweep_best`."""
        known = columns(self.finished)
        if self.plan.sweep_best and known and self.column not in known:
            raise UserError(
                f"sweep_best is {self.wanted}, and the points have no figure {self.column}; "
                f"{choices(self.column, known)}"
            )


def results_of(study: Study) -> dict[str, RunResult]:
    """The result of every run of a study, by name."""
    found = {}
    for name, run in study.runs.items():
        state, error = _state(study, name)
        figures = read_figures(study.folder / name) if state == "finished" else {}
        found[name] = RunResult(name, run.point, state, figures, error)
    return found


def entries_of(study: Study, results: Mapping[str, RunResult]) -> list[StudyEntry]:
    """The entries of a study, each with its points and their figures over the seeds."""
    entries: dict[str, StudyEntry] = {}
    for name in first_runs(study.runs):
        run = study.runs[name]
        of_seeds = [results[name_of(name, seed)] for seed in range(study.config.seeds)]
        of = entries.get(run.entry, StudyEntry(run.entry, run.plan, ()))
        entries[run.entry] = replace(of, results=[*of.results, _over_seeds(of_seeds)])
    return list(entries.values())


def own_evaluations(study: Study) -> dict[str, dict[str, Any]]:
    """What runs found in their own evaluations, over the seeds, of a study with several seeds or
    without evaluations of its own.

    By the name of the run, those that sweep nothing and are finished with every seed: `evaluations`
    with the rows of each, `judge`, and `chosen` with the values that each seed took from the best
    row of another evaluation (`best_of`).
    """
    found: dict[str, dict[str, Any]] = {}
    if study.config.seeds == 1 and study.evaluations:
        return found
    for name in first_runs(study.runs):
        of_seeds = [name_of(name, seed) for seed in range(study.config.seeds)]
        asked = study.experiment(name).evaluations
        if asked and not study.runs[name].plan.sweep and _are_evaluated(study, of_seeds):
            results = []
            for each in of_seeds:
                results.append(read_json(study.folder / each / "evaluation" / RESULTS))
            found[name] = {**own_over_seeds(results), "chosen": _chosen(asked, results)}
    return found


def _are_evaluated(study: Study, names: Sequence[str]) -> bool:
    """Whether runs are finished with their present settings, to their own evaluation."""
    for name in names:
        experiment, folder = study.experiment(name), study.folder / name
        if experiment.until not in (None, "evaluation"):
            return False
        if not (folder / "evaluation" / MARKER).is_file():
            return False  # at once: the plan of a large corpus takes a while
        run = RunFolder(experiment, folder, torch.device("cpu"))
        missing, _ = first_unfinished(stages_of(experiment), run, folder)
        if missing is not None:
            return False
    return True


def _chosen(
    asked: Mapping[str, RunEvaluation], results: Sequence[Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """For each evaluation with `best_of`, the values that each seed took from that one's best
    row."""
    chosen: dict[str, list[dict[str, Any]]] = {}
    for name, evaluation in asked.items():
        if evaluation.best_of is None:
            continue
        lowest = PROTOCOLS.get(asked[evaluation.best_of].protocol.name).lowest_is_best
        chosen[name] = []
        for result in results:
            best = best_row(result["evaluations"][evaluation.best_of], lowest)
            chosen[name].append(best["point"])
    return chosen


def _over_seeds(results: Sequence[RunResult]) -> RunResult:
    """The first seed's result with the mean and spread of each figure; if a seed is unfinished, its
    result."""
    first = results[0]
    for result in results:
        if result.state != "finished":
            return replace(result, name=first.name)
    if len(results) == 1:
        return first

    means, spread = {}, {}
    for name in first.figures:
        values = [result.figures[name] for result in results if name in result.figures]
        if len(values) == len(results):
            means[name] = statistics.fmean(values)
            spread[name] = over_runs(values)
    return replace(first, figures=means, spread=spread)


def _state(study: Study, name: str) -> tuple[State, str]:
    """How a run ended: for a point as it recorded, for any other run by its last stage."""
    experiment, folder = study.experiment(name), study.folder / name
    if study.runs[name].plan.sweep:
        outcome = outcome_of(experiment, folder)
        return outcome.get("state", "missing"), outcome.get("error", "")
    last = experiment.until or stages_of(experiment)[-1].name
    if (folder / last / MARKER).is_file():
        return "finished", ""
    return "missing", ""


def read_figures(folder: Path) -> dict[str, float]:
    """The figures in a run folder, of the stages that are there.

    `loss` and other figures of the validation documents after pretraining; `train.*` of its last
    record; `reconstruction.*`; from metrics.json `EVALUATION-VALUE-VALUE.METRIC` of each row of an
    evaluation, and `seconds`.
    """
    found: dict[str, float] = dict(_numbers(_json(folder / "pretraining" / "validation.json")))
    log = folder / "pretraining" / "log.jsonl"
    if log.is_file():
        found |= _numbers(read_json_lines(log)[-1], "train.")
    found |= _numbers(_json(folder / "reconstruction" / "figures.json"), "reconstruction.")
    metrics = _json(folder / "metrics.json")
    if "t2i_accuracy" in metrics:
        raise UserError(
            f"{folder / 'metrics.json'} is of an earlier version; run the point again, which makes "
            "its evaluation anew"
        )

    for name, rows in metrics.get("evaluations", {}).items():
        for row in rows:
            title = "-".join([name, *map(shown, row["point"].values())])
            found |= _numbers(row["metrics"], f"{title}.")
    if "wall_seconds" in metrics:
        found["seconds"] = metrics["wall_seconds"]["total"]
    return found


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _numbers(content: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a mapping, also those that come with an interval."""
    found = {}
    for key, value in content.items():
        if isinstance(value, dict) and "value" in value:
            value = value["value"]
        if is_number(value):
            found[prefix + key] = value
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def columns(results: Sequence[RunResult]) -> list[str]:
    """The names of the figures, in the order of their first appearance."""
    names: dict[str, None] = {}
    for result in results:
        names |= dict.fromkeys(result.figures)
    return list(names)


def as_csv(results: Sequence[RunResult], best: Collection[RunResult | None]) -> str:
    """The table: for each run its name, the swept keys, its state, whether it is best, its
    figures."""
    keys: dict[str, None] = {}
    for result in results:
        keys |= dict.fromkeys(result.point)
    names, text = columns(results), io.StringIO()
    winners = set()
    for winner in best:
        if winner is not None:
            winners.add(winner.name)

    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", *keys, "state", "best", *names])
    for result in results:
        cells: list[Any] = [result.name]

        # Another entry may sweep keys that this one does not; their cells are empty.
        for key in keys:
            cells.append(shown(result.point[key]) if key in result.point else "")
        cells += [result.state, "best" if result.name in winners else ""]
        for name in names:
            cells.append(result.figures.get(name, ""))
        writer.writerow(cells)
    return text.getvalue()
