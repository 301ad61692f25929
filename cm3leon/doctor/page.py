"""Findings and figures as a page and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from cm3leon.doctor.figures import Figure, goal_of
from cm3leon.doctor.findings import Finding
from cm3leon.evaluation.report.numbers import column, counted
from cm3leon.evaluation.report.page import Cell, Fact, Report, Section, Status, Table, write_report
from cm3leon.io import write_json

PAGE, JSON = "doctor.html", "doctor.json"
HOW_TO_READ = (
    "Figures are medians after calls that are not counted; a batch of images is timed once. "
    "Weights are random, which changes the factor of a window alone. A goal is judged only on the "
    "GPU that it is for; beside figures of other GPUs stands the H100's."
)


def device_name(device: torch.device) -> str:
    """The device's name by CUDA; of a CPU, its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"


def write(
    folder: Path, findings: Sequence[Finding], figures: Sequence[Figure], device: torch.device
) -> None:
    """Write the page and the JSON file into the folder, which is made if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    name, now = device_name(device), datetime.now(UTC).isoformat(timespec="seconds")
    rows = []
    for figure in figures:
        goal, is_own = goal_of(figure.name, name)
        met = None
        if goal and is_own and figure.value is not None:
            met = goal.is_met(figure.value)
        rows.append({**asdict(figure), "goal": goal and asdict(goal), "met": met})

    write_json(
        folder / JSON,
        {
            "device": name,
            "torch": torch.__version__,
            "time": now,
            "findings": [asdict(finding) for finding in findings],
            "figures": rows,
        },
    )
    write_report(folder / PAGE, report(findings, figures, name, now))


def report(findings: Sequence[Finding], figures: Sequence[Figure], device: str, now: str) -> Report:
    """The page: first the findings, what is wrong on top, then goals, then all figures by part."""
    facts, ordered = [], []
    for verdict in VERDICTS:
        found = [finding for finding in findings if finding.verdict == verdict]
        facts.append(_fact(verdict, found))
        ordered += found
    sections = [Section("The machine", blocks=[findings_table(ordered)])]

    # Without measure=true there are no figures.
    if figures:
        facts.append(_goals_fact(figures, device))
        aimed = [figure for figure in figures if goal_of(figure.name, device)[0]]
        if aimed:
            sections.append(Section("Goals", HOW_TO_READ, [goals_table(aimed, device)]))
        for part in dict.fromkeys(figure.part for figure in figures):
            of_part = [figure for figure in figures if figure.part == part]
            sections.append(Section(part.capitalize(), blocks=[figures_table(of_part)]))
    return Report(
        title="Doctor",
        subtitle=f"{device}, torch {torch.__version__}, {now}",
        facts=facts,
        sections=sections,
    )


VERDICTS = ("wrong", "warning", "good")


def _fact(verdict: str, found: Sequence[Finding]) -> Fact:
    """The number of findings of a verdict; those that need something done are named."""
    status: Status = "plain"
    if verdict == "wrong":
        status = "bad" if found else "good"
    names = ""
    if verdict != "good":
        names = ", ".join(finding.name for finding in found)
    return Fact(verdict, str(len(found)), names, status)


def _goals_fact(figures: Sequence[Figure], device: str) -> Fact:
    """How many of the goals for this device are reached; a figure without a value misses its
    goal."""
    met = []
    for figure in figures:
        goal, is_own = goal_of(figure.name, device)
        if goal and is_own:
            met.append(figure.value is not None and goal.is_met(figure.value))
    if not met:
        measured = sum(figure.value is not None for figure in figures)
        return Fact("figures", f"{measured} of {len(figures)}", "no goals are set for this device")
    return Fact("goals reached", f"{sum(met)} of {len(met)}", "", "good" if all(met) else "bad")


def findings_table(findings: Sequence[Finding]) -> Table:
    """A row for each finding; what is wrong is highlighted."""
    columns = ["", "verdict", "found", "what to do"]
    rows = [[f.name, f.verdict, f.text, f.advice or None] for f in findings]
    marked = [row for row, finding in enumerate(findings) if finding.verdict == "wrong"]
    return Table(columns, rows, highlight=frozenset(marked))


def goals_table(figures: Sequence[Figure], device: str) -> Table:
    """The figures that have goals, with their goals and what other projects reach."""
    rows: list[list[Cell]] = []
    for figure in figures:
        goal, is_own = goal_of(figure.name, device)
        assert goal is not None
        verdict = None
        if is_own and figure.value is not None:
            verdict = "reached" if goal.is_met(figure.value) else "missed"
        rows.append(
            [figure.name, _value(figure), f"{goal.text} ({goal.gpu})", verdict, goal.anchor]
        )
    return Table(["", "measured", "goal", "", "others"], rows)


def figures_table(figures: Sequence[Figure]) -> Table:
    """All figures of a part; one that could not be measured has a dash, and the reason behind
    it."""
    rows = [[f.name, _value(f), f.note or None] for f in figures]
    return Table(["", "measured", "with what, or why not"], rows)


def _value(figure: Figure) -> str | None:
    if figure.value is None:
        return None
    return f"{column([figure.value])[0]} {figure.unit}"
