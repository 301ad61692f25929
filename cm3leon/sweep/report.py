"""The page of a sweep: its best point, every point in a table, the figure that counts as curves, the failures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path

from cm3leon.evaluation.config import shown
from cm3leon.evaluation.origin import Origin, is_logarithmic, page_of
from cm3leon.evaluation.report import (
    Cell,
    Curves,
    Fact,
    Report,
    Section,
    Series,
    Table,
    write_report,
)
from cm3leon.sweep.results import Result, columns

COLUMNS = 12
"""Figures of the table, the one that counts first; sweep.csv has all."""


def sweep_report(
    path: Path,
    title: str,
    results: Sequence[Result],
    wanted: str,
    winner: Result | None,
    origin: Origin,
    *,
    logarithmic: Collection[str] = (),
) -> None:
    """Writes the page, with links to the pages of the points, whose folders lie beside it.

    Args:
        wanted: what the `winner` is best by, `lowest loss`.
        logarithmic: keys whose axis is logarithmic whatever their values.
    """
    column = wanted.partition(" ")[2]
    done = [result for result in results if result.state == "finished"]
    facts = [Fact("points finished", f"{len(done)} of {len(results)}")]
    if winner:
        facts.insert(0, Fact(wanted, f"{winner.figures[column]:.4g}", winner.name))
    curves = list(_curves(done, column, logarithmic))
    report = Report(
        title=title,
        subtitle=f"A sweep of {origin.experiment} over {', '.join(results[0].point)}",
        facts=facts,
        sections=[
            *([Section("Curves", blocks=curves)] if curves else []),
            Section("Points", blocks=[_table(results, column, winner, path.parent)]),
            *_failures(results),
            origin.section(),
        ],
        footer="sweep.csv has all figures. Each point is a run folder beside it.",
    )
    write_report(path, report)


def _table(results: Sequence[Result], column: str, winner: Result | None, folder: Path) -> Table:
    """A row for each point: its values, its state, its page if any point has one, its figures."""
    named = columns(results)
    figures = sorted(named, key=lambda name: name != column)[:COLUMNS]
    pages = [page_of(result.name, folder) for result in results]
    rows = []
    for result, page in zip(results, pages, strict=True):
        row: dict[str, Cell] = {key: shown(value) for key, value in result.point.items()}
        row["state"] = result.state
        if any(pages):
            row["page"] = page
        row |= {name: result.figures.get(name) for name in figures}
        rows.append(row)
    best = [index for index, result in enumerate(results) if result is winner]
    return Table.of(rows, f"The best by {column} is marked." if winner else "", best)


def _curves(done: Sequence[Result], column: str, logarithmic: Collection[str]) -> list[Curves]:
    """The figure against each swept key that has numbers, a line for each combination of the others.

    Seeds are no line of their own: where there are several, the line is their mean, and a band from lowest to highest.
    """
    able = [result for result in done if math.isfinite(result.figures.get(column, math.nan))]
    charts = [_curve(able, key, column, key in logarithmic) for key in _numeric_keys(able)]
    return [chart for chart in charts if chart.series]


def _numeric_keys(results: Sequence[Result]) -> list[str]:
    """Swept keys, but seeds, that have two or more numbers and nothing else."""
    found = []
    for key in results[0].point if results else ():
        values = [result.point[key] for result in results]
        numbers = all(
            isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
        )
        if numbers and len(set(values)) > 1 and not _is_seed(key):
            found.append(key)
    return found


def _curve(results: Sequence[Result], key: str, column: str, logarithmic: bool) -> Curves:
    log_x = logarithmic or is_logarithmic(key, [result.point[key] for result in results])
    lines: dict[str, dict[float, list[float]]] = {}
    for result in results:
        others = ", ".join(
            f"{other.split('.')[-1]} {shown(value)}"
            for other, value in result.point.items()
            if other != key and not _is_seed(other)
        )
        lines.setdefault(others or column, {}).setdefault(result.point[key], []).append(
            result.figures[column]
        )
    series = []
    for name, at in lines.items():
        ordered = sorted(at)
        series.append(
            Series(
                name,
                ordered,
                *([of(at[x]) for x in ordered] for of in (statistics.fmean, min, max)),
            )
        )
    return Curves(series, x_label=key, y_label=column, log_x=log_x)


def _is_seed(key: str) -> bool:
    return key.split(".")[-1] == "seed"


def _failures(results: Sequence[Result]) -> list[Section]:
    failed = [result for result in results if result.state != "finished"]
    if not failed:
        return []
    rows = [
        {"point": result.name, "state": result.state, "reason": result.error} for result in failed
    ]
    text = "The command of the sweep, given again, tries these and no others."
    return [Section("Not finished", text, [Table.of(rows)])]
