"""The page of a study: aims, a table and a plot for each evaluation, some of the answers, and its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cm3leon.evaluation.config import shown
from cm3leon.evaluation.origin import Origin, page_of
from cm3leon.evaluation.report import (
    Cell,
    Report,
    Section,
    Table,
    write_report,
)
from cm3leon.evaluation.report.answers import Example, aim_fact, evaluation_section
from cm3leon.study.config import Study

KEPT = "All figures and settings are in results.json; the same command makes only what is missing."


def study_report(
    path: Path,
    study: Study,
    results: Mapping[str, Any],
    examples: Mapping[str, Sequence[Sequence[Example]]],
    origin: Origin,
    attribution: str = "",
) -> None:
    """Writes the page, with links to the pages of the runs, whose folders lie beside it.

    Args:
        examples: for each evaluation, those of each of its rows.
        attribution: what there is to say of whose the pictures are.
    """
    evaluations = results["evaluations"]
    sections = [
        evaluation_section(
            study.evaluations[name],
            found,
            examples[name],
            by_compute=study.evaluations[name].against == "compute",
        )
        for name, found in evaluations.items()
    ]
    write_report(
        path,
        Report(
            title=study.title,
            subtitle=study.about,
            facts=[
                aim_fact(aim, evaluations) for aim in study.aims if aim.evaluation in evaluations
            ],
            sections=[
                *sections,
                *_runs(study, path.parent),
                *_losses(results["validation"]),
                *_times(results["seconds"]),
                origin.section(),
            ],
            footer="\n\n".join(filter(None, [KEPT, attribution])),
        ),
    )


def _runs(study: Study, folder: Path) -> list[Section]:
    """The runs with their experiments, what was changed in these, and links to their pages."""
    if not study.runs:
        return []
    rows: list[dict[str, Cell]] = [
        {
            "run": name,
            "experiment": run.experiment,
            "changed in it": ", ".join(
                f"{key} {shown(value)}" for key, value in run.overrides.items()
            ),
            "page": page_of(name, folder),
        }
        for name, run in study.runs.items()
    ]
    return [Section("Runs", blocks=[Table.of(rows)])]


def _losses(validation: Mapping[str, Mapping[str, float]]) -> list[Section]:
    """What the runs that trained came to, the lowest loss marked."""
    trained = {name: losses for name, losses in validation.items() if losses}
    if not trained:
        return []
    best = min(range(len(trained)), key=lambda row: list(trained.values())[row]["loss"])
    rows: list[dict[str, Cell]] = [{"run": name, **losses} for name, losses in trained.items()]
    note = "In nats a token, without retrieved documents; runs of other documents or objectives do not compare."
    table = Table.of(rows, note, {best} if len(rows) > 1 else ())
    return [Section("Validation losses", blocks=[table])]


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
