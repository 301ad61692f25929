"""The page of a study: aims, evaluations, runs; for a sweep the best point, curves and a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cm3leon.evaluation.config import named, shown
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
from cm3leon.evaluation.report.answers import AnsweredItem, aim_fact, evaluation_section
from cm3leon.provenance import machines
from cm3leon.stages.attribution import attribution
from cm3leon.studies.config import Study
from cm3leon.studies.results import RunResult, StudyEntry, columns, is_number

COLUMNS = 12
"""Most figures in the table of points, the one that decides first; the CSV has all."""
KEPT = "All figures and settings are in results.json; the same command makes only what is missing."
SEEDS = (
    "Figures are means over the seeds, ± the standard deviation between runs; in brackets the "
    "interval of 95 % of the mean."
)
OWN = "As the runs evaluated themselves; their answers are on their own pages."
LOSSES = "Losses in nats a token, without retrieved documents; runs of other documents or objectives do not compare."


def study_report(
    path: Path,
    study: Study,
    results: Mapping[str, Any],
    examples: Mapping[str, Sequence[Sequence[AnsweredItem]]],
    entries: Sequence[StudyEntry],
) -> None:
    """Write the page, with links to the pages of the runs, whose folders lie beside it.

    Args:
        results: the content of results.json.
        examples: for each evaluation, the examples of each row.
        entries: the entries with their results.
    """
    config, evaluations = study.config, results["evaluations"]

    # An aim of an evaluation that was not made has no figure yet.
    facts = []
    for aim in config.aims:
        if aim.evaluation in evaluations:
            facts.append(aim_fact(aim, evaluations))

    sections = []
    for name, found in evaluations.items():
        asked = study.evaluations[name]
        by_compute = asked.against == "compute"
        sections.append(evaluation_section(asked, found, examples[name], by_compute=by_compute))

    # What runs found themselves.
    own = results.get("own_evaluations", {})
    for name, of_run in own.items():
        for aim in study.experiment(name).aims:
            fact = aim_fact(aim, of_run["evaluations"])
            facts.append(replace(fact, label=f"{fact.label}{_of(name, own)}"))
    sections += _own(study, own)

    # Runs that sweep nothing share a table; each swept entry has curves and a table of its own.
    single, swept = [], []
    for entry in entries:
        if entry.plan.sweep:
            swept.append(entry)
        else:
            single.append(entry)
    sections += _runs(study, single)
    for entry in swept:
        facts += _facts(entry)
        sections += _points(entry, path.parent)

    # Whose data and weights went into it, and where and how it was made.
    models: list[Path] = []
    for evaluation in study.evaluations.values():
        models += evaluation.models.values()
    experiments, folders = [], [study.folder]
    for name in study.runs:
        experiments.append(study.experiment(name))
        folders.append(study.folder / name)
    whose = attribution(experiments, study.evaluations.values(), models)
    origin = Origin(str(config.name), results["again"], datetime.now(UTC), machines(folders))

    sections += [*_failures(swept), *_times(results["seconds"]), origin.section()]
    footer = "\n\n".join(filter(None, [KEPT, whose]))
    write_report(path, Report(config.title, config.about, facts, sections, footer=footer))


def _own(study: Study, own: Mapping[str, Any]) -> list[Section]:
    """The runs' own evaluations over the seeds; the answers are on the runs' own pages."""
    sections = []
    for name, of_run in own.items():
        evaluations = study.experiment(name).evaluations
        for each, found in of_run["evaluations"].items():
            text = [OWN]
            if each in of_run["chosen"]:
                values = []
                for point in of_run["chosen"][each]:
                    values.append(" and ".join(named(point)) or "no other value")
                best_of = evaluations[str(evaluations[each].best_of)].title
                text.append(f"With {', '.join(values)}: for each seed the best of “{best_of}”.")
            section = evaluation_section(
                evaluations[each], found, [()] * len(found), text=" ".join(text)
            )
            sections.append(replace(section, title=f"{section.title}{_of(name, own)}"))
    return sections


def _of(name: str, own: Mapping[str, Any]) -> str:
    """Behind a title or label, which run it is about, if there are several."""
    return f", {name}" if len(own) > 1 else ""


def _facts(entry: StudyEntry) -> list[Fact]:
    """The best point, and how many points are finished."""
    winner = entry.best
    of = f", {entry.name}" if entry.name else ""
    facts = [Fact(f"points finished{of}", f"{len(entry.finished)} of {len(entry.results)}")]
    if winner:
        figure = f"{winner.figures[entry.column]:.4g}"
        facts.insert(0, Fact(f"{entry.wanted}{of}", figure, winner.name))
    return facts


def _points(entry: StudyEntry, folder: Path) -> list[Section]:
    """Curves of an entry's points, and a table with a row for each, the deciding figure first."""
    of = f" of {entry.name}" if entry.name else ""
    results, winner = entry.results, entry.best

    # A row begins with the values of its point, and the row of the best point is marked.
    leads: list[dict[str, Cell]] = []
    best, note = [], ""
    for index, result in enumerate(results):
        lead: dict[str, Cell] = {}
        for key, value in result.point.items():
            lead[key] = shown(value)
        leads.append(lead)
        if result is winner:
            best.append(index)
            note = f"The best by {entry.column} is marked."
    figures = sorted(columns(results), key=lambda name: name != entry.column)[:COLUMNS]

    sections = []
    if curves := _curves(entry):
        sections.append(Section(f"Curves{of}", blocks=curves))
    table = _table(results, leads, figures, folder, note, best)
    return [*sections, Section(f"Points{of}", blocks=[table])]


def _runs(study: Study, entries: Sequence[StudyEntry]) -> list[Section]:
    """The runs that sweep nothing: their experiments, what was changed in them,
    and their losses."""
    if not entries:
        return []
    results, leads, losses = [], [], []
    for entry in entries:
        (result,) = entry.results
        changed = []
        for key, value in study.runs[result.name].overrides.items():
            changed.append(f"{key} {shown(value)}")
        lead: dict[str, Cell] = {"run": result.name, "experiment": entry.plan.experiment}
        lead["changed in it"] = ", ".join(changed)
        results.append(result)
        leads.append(lead)
        losses.append(result.figures.get("loss", math.inf))

    # Among equal losses, and so in a table of one run, none is marked as the best.
    best = []
    if len(set(losses)) > 1:
        best = [losses.index(min(losses))]

    # Figures of parts stay on the runs' own pages.
    figures = [name for name in columns(results) if "." not in name]
    return [Section("Runs", blocks=[_table(results, leads, figures, study.folder, LOSSES, best)])]


def _table(
    results: Sequence[RunResult],
    leads: Sequence[Mapping[str, Cell]],
    figures: Sequence[str],
    folder: Path,
    note: str,
    best: Sequence[int],
) -> Table:
    """A row for each result: its lead, its state, its page if any has one, its figures."""
    pages = [page_of(result.name, folder) for result in results]
    rows = []
    for result, lead, page in zip(results, leads, pages, strict=True):
        row = {**lead, "state": result.state}
        if any(pages):
            row["page"] = page
        for name in figures:
            row[name] = _cell(result, name)
        rows.append(row)

    # What the intervals mean is said where there are any.
    notes = [note]
    if any(result.spread for result in results):
        notes.append(SEEDS)
    return Table.of(rows, " ".join(filter(None, notes)), best)


def _cell(result: RunResult, name: str) -> Cell:
    """A figure; over several seeds the mean, its deviation and its interval."""
    if name not in result.spread:
        return result.figures.get(name)
    over = result.spread[name]
    deviation, low, high = map(numbers.metric, (over.deviation, over.low, over.high))
    mean = numbers.metric(result.figures[name])
    return numbers.unbroken(f"{mean} ± {deviation} ({low} to {high})")


def _times(seconds: Mapping[str, Mapping[str, float]]) -> list[Section]:
    if not seconds:
        return []
    rows: list[dict[str, Cell]] = []
    total = 0.0
    for name, of in seconds.items():
        stages = []
        for stage, spent in of.items():
            stages.append(f"{stage} {spent:.0f}")
        of_run = sum(of.values())
        rows.append({"run": name, "stages, in seconds": " ".join(stages), "seconds": round(of_run)})
        total += of_run
    text = f"All runs together took {total / 60:.1f} minutes."
    return [Section("Time", text, [Table.of(rows)])]


def _curves(entry: StudyEntry) -> list[Curves]:
    """The deciding figure against each numeric swept key,
    one line for each combination of the others.

    Seeds have no lines of their own: the line is their mean, in a band from lowest to highest.
    """
    able = [result for result in entry.finished if result.has(entry.column)]
    curves = []
    for key in _numeric_keys(able):
        curves.append(_curve(able, key, entry.column, key in entry.plan.logarithmic))
    return curves


def _numeric_keys(results: Sequence[RunResult]) -> list[str]:
    """Swept keys other than seeds that have only numbers, and at least two."""
    if not results:
        return []
    found = []
    for key in results[0].point:
        values = [result.point[key] for result in results]
        if len(set(values)) > 1 and all(map(is_number, values)) and not _is_seed(key):
            found.append(key)
    return found


def _curve(results: Sequence[RunResult], key: str, column: str, logarithmic: bool) -> Curves:
    log_x = logarithmic or is_logarithmic(key, [result.point[key] for result in results])

    # line -> x -> the figures of all seeds.
    lines: dict[str, dict[float, list[float]]] = {}
    for result in results:
        others = []
        for other, value in result.point.items():
            if other != key and not _is_seed(other):
                others.append(f"{other.split('.')[-1]} {shown(value)}")
        line = lines.setdefault(", ".join(others) or column, {})
        line.setdefault(result.point[key], []).append(result.figures[column])

    series = []
    for name, at in lines.items():
        ordered = sorted(at)
        mean, low, high = [], [], []
        for x in ordered:
            mean.append(statistics.fmean(at[x]))
            low.append(min(at[x]))
            high.append(max(at[x]))
        series.append(Series(name, ordered, mean, low, high))
    return Curves(series, x_label=key, y_label=column, log_x=log_x)


def _is_seed(key: str) -> bool:
    return key.split(".")[-1] == "seed"


def _failures(entries: Collection[StudyEntry]) -> list[Section]:
    rows: list[dict[str, Cell]] = []
    for entry in entries:
        for result in entry.results:
            if result.state != "finished":
                rows.append({"point": result.name, "state": result.state, "reason": result.error})
    if not rows:
        return []
    text = "The same command, given again, tries only these points."
    return [Section("Not finished", text, [Table.of(rows)])]
