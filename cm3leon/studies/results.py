"""What the runs of a study came to: read from their folders, put into one table,
the best of what is swept marked."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cm3leon.config import choices
from cm3leon.evaluation.config import shown
from cm3leon.evaluation.metrics import OverRuns, over_runs
from cm3leon.io import read_json, read_json_lines
from cm3leon.records import MARKER
from cm3leon.stages.table import stages_of
from cm3leon.studies.config import Study, StudyRun
from cm3leon.studies.point import outcome_of
from cm3leon.studies.points import Point
from cm3leon.studies.seeds import first_runs, name_of
from cm3leon.types import UserError

LOWEST = "lowest loss"
"""What a point is best by, if nothing else is said."""
State = Literal["finished", "failed", "missing"]
"""finished and failed as its run said; missing: it has not begun, still runs,
or has ended without a word."""


@dataclass(frozen=True)
class Result:
    """A run of a study, be it a point of what is swept or not."""

    name: str
    point: Point
    state: State
    figures: Mapping[str, float] = field(default_factory=dict)
    """By the columns of the table; of several seeds the mean."""
    error: str = ""
    """Why it failed, in a sentence."""
    spread: Mapping[str, OverRuns] = field(default_factory=dict)
    """How each figure varies over the seeds of the study; empty for a single seed."""

    def has(self, column: str) -> bool:
        """Whether it has a finite figure of that name."""
        return math.isfinite(self.figures.get(column, math.nan))


@dataclass(frozen=True)
class Entry:
    """An entry of a study, with what each of its points came to over the seeds;
    one that sweeps nothing has one."""

    name: str
    """Empty in a sweep."""
    plan: StudyRun
    results: Sequence[Result]

    @property
    def wanted(self) -> str:
        """What the best point is best by, `lowest loss`."""
        return self.plan.sweep_best or LOWEST

    @property
    def column(self) -> str:
        """The figure in that."""
        return self.wanted.partition(" ")[2]

    @property
    def finished(self) -> list[Result]:
        """The points that are."""
        return [result for result in self.results if result.state == "finished"]

    @property
    def best(self) -> Result | None:
        """The finished point that is best; None where none has that figure,
        and where nothing is swept."""
        sign = 1 if self.wanted.startswith("lowest") else -1
        able = [result for result in self.finished if self.plan.sweep and result.has(self.column)]
        return min(able, key=lambda result: sign * result.figures[self.column], default=None)

    def check_best(self) -> None:
        """Raises UserError where points are finished,
        and none of them has the column of `sweep_best`."""
        known = columns(self.finished)
        if self.plan.sweep_best and known and self.column not in known:
            raise UserError(
                f"sweep_best is {self.wanted}, and the points have no figure {self.column}; "
                f"{choices(self.column, known)}"
            )


def results_of(study: Study) -> dict[str, Result]:
    """What every run of a study came to, by its name."""
    found = {}
    for name, run in study.runs.items():
        state, error = _state(study, name)
        figures = read_figures(study.folder / name) if state == "finished" else {}
        found[name] = Result(name, run.point, state, figures, error)
    return found


def entries_of(study: Study, results: Mapping[str, Result]) -> list[Entry]:
    """The entries of a study, each with its points and their figures over the seeds."""
    entries: dict[str, Entry] = {}
    for name in first_runs(study.runs):
        run = study.runs[name]
        of_seeds = [results[name_of(name, seed)] for seed in range(study.config.seeds)]
        of = entries.get(run.entry, Entry(run.entry, run.plan, ()))
        entries[run.entry] = replace(of, results=[*of.results, _over_seeds(of_seeds)])
    return list(entries.values())


def _over_seeds(results: Sequence[Result]) -> Result:
    """The first seed's result with the mean and the spread of each figure;
    an unfinished one stands for all."""
    first = results[0]
    unfinished = next((each for each in results if each.state != "finished"), None)
    if unfinished or len(results) == 1:
        return replace(unfinished or first, name=first.name)
    shared = [key for key in first.figures if all(key in each.figures for each in results)]
    values = {key: [each.figures[key] for each in results] for key in shared}
    means = {key: statistics.fmean(several) for key, several in values.items()}
    spread = {key: over_runs(several) for key, several in values.items()}
    return replace(first, figures=means, spread=spread)


def _state(study: Study, name: str) -> tuple[State, str]:
    """How a run ended: a point as it has written down, any other run by its last stage."""
    experiment, folder = study.experiment(name), study.folder / name
    if study.runs[name].plan.sweep:
        outcome = outcome_of(experiment, folder)
        return outcome.get("state", "missing"), outcome.get("error", "")
    last = experiment.until or stages_of(experiment)[-1].name
    return ("finished" if (folder / last / MARKER).is_file() else "missing"), ""


def read_figures(folder: Path) -> dict[str, float]:
    """The figures of a run folder, of the stages that it has.

    `loss` and others of the validation documents after pretraining, `train.*` of its last record,
    `reconstruction.*`, and from metrics.json `EVALUATION-VALUE-VALUE.METRIC` of each row of an
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
    """The numbers of a mapping, also those given with an interval."""
    values = {
        key: value["value"] if isinstance(value, dict) and "value" in value else value
        for key, value in content.items()
    }
    return {prefix + key: value for key, value in values.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def columns(results: Sequence[Result]) -> list[str]:
    """The names of the figures, in the order of their first appearance."""
    return list(dict.fromkeys(name for result in results for name in result.figures))


def as_csv(results: Sequence[Result], best: Collection[Result | None]) -> str:
    """The table: a line for each run, with its name, the swept keys, its state, whether it is best,
    its figures."""
    names, text = columns(results), io.StringIO()
    keys = dict.fromkeys(key for result in results for key in result.point)
    winners = [winner.name for winner in best if winner]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", *keys, "state", "best", *names])
    for result in results:
        point = [shown(result.point[key]) if key in result.point else "" for key in keys]
        figures = [result.figures.get(name, "") for name in names]
        mark = "best" if result.name in winners else ""
        writer.writerow([result.name, *point, result.state, mark, *figures])
    return text.getvalue()
