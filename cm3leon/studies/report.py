"""The page of a study: aims, its evaluations, its runs, and of what is swept the best point,
curves and a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
    numbers,
    write_report,
)
from cm3leon.evaluation.report.answers import Example, aim_fact, evaluation_section
from cm3leon.provenance import machines
from cm3leon.stages.attribution import attribution
from cm3leon.studies.config import Study
from cm3leon.studies.results import Entry, Result, columns

COLUMNS = 12
"""Figures of the table of points, the one that counts first; the CSV has all."""
KEPT = "All figures and settings are in results.json; the same command makes only what is missing."
SEEDS = (
    "Figures are means over the seeds, ± the standard deviation between runs; in brackets the "
    "interval of 95 % of the mean."
)
LOSSES = "Losses in nats a token, without retrieved documents; runs of other documents or objectives do not compare."


def study_report(
    path: Path,
    study: Study,
    results: Mapping[str, Any],
    examples: Mapping[str, Sequence[Sequence[Example]]],
    entries: Sequence[Entry],
) -> None:
    """Writes the page, with links to the pages of the runs, whose folders lie beside it.

    Args:
        results: what results.json has.
        examples: for each evaluation, those of each of its rows.
        entries: what the runs came to.
    """
    config, evaluations = study.config, results["evaluations"]
    facts = [aim_fact(aim, evaluations) for aim in config.aims if aim.evaluation in evaluations]
    sections = []
    for name, found in evaluations.items():
        asked = study.evaluations[name]
        by_compute = asked.against == "compute"
        sections.append(evaluation_section(asked, found, examples[name], by_compute=by_compute))

    sections += _runs(study, [entry for entry in entries if not entry.plan.sweep])
    swept = [entry for entry in entries if entry.plan.sweep]
    for entry in swept:
        facts += _facts(entry)
        sections += _points(entry, path.parent)

    again, folders = results["again"], [study.folder, *(study.folder / name for name in study.runs)]
    whose = attribution(
        [study.experiment(name) for name in study.runs],
        study.evaluations.values(),
        [folder for each in study.evaluations.values() for folder in each.models.values()],
    )
    origin = Origin(str(config.name), again, datetime.now(UTC), machines(folders))
    sections += [*_failures(swept), *_times(results["seconds"]), origin.section()]
    footer = "\n\n".join(filter(None, [KEPT, whose]))
    write_report(path, Report(config.title, config.about, facts, sections, footer=footer))


def _facts(entry: Entry) -> list[Fact]:
    """The best point, large, and how many are finished."""
    winner, of = entry.best, f", {entry.name}" if entry.name else ""
    facts = [Fact(f"points finished{of}", f"{len(entry.finished)} of {len(entry.results)}")]
    if winner:
        figure = f"{winner.figures[entry.column]:.4g}"
        facts.insert(0, Fact(f"{entry.wanted}{of}", figure, winner.name))
    return facts


def _points(entry: Entry, folder: Path) -> list[Section]:
    """Curves of the points of an entry, and a row for each with its values,
    the figure that counts first."""
    of, results = f" of {entry.name}" if entry.name else "", entry.results
    curves = _curves(entry)
    leads: list[dict[str, Cell]] = [
        {key: shown(value) for key, value in result.point.items()} for result in results
    ]
    figures = sorted(columns(results), key=lambda name: name != entry.column)[:COLUMNS]
    best = [index for index, result in enumerate(results) if result is entry.best]
    note = f"The best by {entry.column} is marked." if best else ""
    return [
        *([Section(f"Curves{of}", blocks=curves)] if curves else []),
        Section(f"Points{of}", blocks=[_table(results, leads, figures, folder, note, best)]),
    ]


def _runs(study: Study, entries: Sequence[Entry]) -> list[Section]:
    """The runs that sweep nothing: their experiments, what was changed in these,
    and their losses."""
    if not entries:
        return []
    results, leads = [], []
    for entry in entries:
        (result,) = entry.results
        changed = study.runs[result.name].overrides.items()
        lead: dict[str, Cell] = {"run": result.name, "experiment": entry.plan.experiment}
        lead["changed in it"] = ", ".join(f"{key} {shown(value)}" for key, value in changed)
        results.append(result)
        leads.append(lead)
    figures = [name for name in columns(results) if "." not in name]
    losses = [result.figures.get("loss", math.inf) for result in results]
    best = [losses.index(min(losses))] if len(set(losses)) > 1 else []
    return [Section("Runs", blocks=[_table(results, leads, figures, study.folder, LOSSES, best)])]


def _table(
    results: Sequence[Result],
    leads: Sequence[Mapping[str, Cell]],
    figures: Sequence[str],
    folder: Path,
    note: str,
    best: Sequence[int],
) -> Table:
    """A row for each result: what leads it, its state, its page if any has one, its figures."""
    pages = [page_of(result.name, folder) for result in results]
    rows = []
    for result, lead, page in zip(results, leads, pages, strict=True):
        row = {**lead, "state": result.state}
        if any(pages):
            row["page"] = page
        row |= {name: _cell(result, name) for name in figures}
        rows.append(row)
    seeds = SEEDS if any(result.spread for result in results) else ""
    return Table.of(rows, " ".join(filter(None, [note, seeds])), best)


def _cell(result: Result, name: str) -> Cell:
    """A figure; over several seeds the mean, with the deviation and the interval of the mean."""
    if name not in result.spread:
        return result.figures.get(name)
    over = result.spread[name]
    deviation, low, high = map(numbers.metric, (over.deviation, over.low, over.high))
    return f"{numbers.metric(result.figures[name])} ± {deviation} ({low} to {high})"


def _times(seconds: Mapping[str, Mapping[str, float]]) -> list[Section]:
    if not seconds:
        return []
    rows: list[dict[str, Cell]] = [
        {
            "run": name,
            "stages, in seconds": " ".join(f"{stage} {spent:.0f}" for stage, spent in of.items()),
            "seconds": round(sum(of.values())),
        }
        for name, of in seconds.items()
    ]
    total = sum(sum(of.values()) for of in seconds.values())
    text = f"All runs together took {total / 60:.1f} minutes."
    return [Section("Time", text, [Table.of(rows)])]


def _curves(entry: Entry) -> list[Curves]:
    """The figure against each swept key that has numbers,
    a line for each combination of the others.

    Seeds are no line of their own: where there are several, the line is their mean,
    and a band from lowest to highest.
    """
    able = [result for result in entry.finished if result.has(entry.column)]
    keys = _numeric_keys(able)
    return [_curve(able, key, entry.column, key in entry.plan.logarithmic) for key in keys]


def _numeric_keys(results: Sequence[Result]) -> list[str]:
    """Swept keys, but seeds, that have two or more numbers and nothing else."""
    found = []
    for key in results[0].point if results else ():
        values = [result.point[key] for result in results]
        numeric = all(
            isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
        )
        if numeric and len(set(values)) > 1 and not _is_seed(key):
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
        line = lines.setdefault(others or column, {})
        line.setdefault(result.point[key], []).append(result.figures[column])
    series = []
    for name, at in lines.items():
        ordered = sorted(at)
        mean, low, high = ([of(at[x]) for x in ordered] for of in (statistics.fmean, min, max))
        series.append(Series(name, ordered, mean, low, high))
    return Curves(series, x_label=key, y_label=column, log_x=log_x)


def _is_seed(key: str) -> bool:
    return key.split(".")[-1] == "seed"


def _failures(entries: Collection[Entry]) -> list[Section]:
    rows: list[dict[str, Cell]] = [
        {"point": result.name, "state": result.state, "reason": result.error}
        for entry in entries
        for result in entry.results
        if result.state != "finished"
    ]
    text = "The same command, given again, tries these and no others."
    return [Section("Not finished", text, [Table.of(rows)])] if rows else []
