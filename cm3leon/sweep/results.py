"""What the points of a sweep came to: read from their run folders, put into one table, the best marked."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cm3leon.config import choices
from cm3leon.evaluation.config import shown
from cm3leon.io import read_json, read_json_lines
from cm3leon.sweep.points import Point
from cm3leon.types import UserError

State = Literal["finished", "failed", "missing"]
"""finished and failed as its run said; missing: it has not begun, still runs, or has ended without a word."""


@dataclass(frozen=True)
class Result:
    """A point after a run of it."""

    name: str
    point: Point
    state: State
    figures: Mapping[str, float] = field(default_factory=dict)
    """By the columns of the table."""
    error: str = ""
    """Why it failed, in a sentence."""


def read_figures(folder: Path) -> dict[str, float]:
    """The figures of a run folder, of the stages that it has.

    `loss` and others of the validation documents after pretraining, `train.*` of its last record,
    `reconstruction.*`, and from metrics.json `EVALUATION-VALUE-VALUE.METRIC` of each row of an evaluation, and
    `seconds`.
    """
    found: dict[str, float] = dict(_numbers(_json(folder / "pretraining" / "validation.json")))
    log = folder / "pretraining" / "log.jsonl"
    if log.is_file():
        found |= _numbers(read_json_lines(log)[-1], "train.")
    found |= _numbers(_json(folder / "reconstruction" / "figures.json"), "reconstruction.")
    metrics = _json(folder / "metrics.json")
    if "t2i_accuracy" in metrics:
        raise UserError(
            f"{folder / 'metrics.json'} is of an earlier version; run the point again, which makes its evaluation anew"
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


def best(results: Sequence[Result], wanted: str) -> Result | None:
    """The finished point that is best by `lowest COLUMN` or `highest COLUMN`, None where no point has that figure."""
    direction, _, column = wanted.partition(" ")
    sign = 1 if direction == "lowest" else -1
    able = [
        result
        for result in results
        if result.state == "finished" and math.isfinite(result.figures.get(column, math.nan))
    ]
    return min(able, key=lambda result: sign * result.figures[column], default=None)


def check_best(results: Sequence[Result], wanted: str) -> None:
    """Raises UserError where points are finished, and none of them has the column of `sweep_best`."""
    column = wanted.partition(" ")[2]
    known = columns([result for result in results if result.state == "finished"])
    if known and column not in known:
        raise UserError(
            f"sweep_best is {wanted}, and the points have no figure {column}; {choices(column, known)}"
        )


def as_csv(results: Sequence[Result], keys: Sequence[str], winner: Result | None) -> str:
    """The table: a line for each point, with its name, the swept keys, its state, whether it is best, its figures."""
    names, text = columns(results), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", *keys, "state", "best", *names])
    for result in results:
        figures = [result.figures.get(name, "") for name in names]
        mark = "best" if result is winner else ""
        writer.writerow(
            [result.name, *(shown(result.point[key]) for key in keys), result.state, mark, *figures]
        )
    return text.getvalue()
