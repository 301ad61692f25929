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
    "Figures are medians after calls that are not counted; a batch of images is timed once. Weights are random, which "
    "changes the factor of a window alone. A goal is judged only on the GPU that it is for; beside figures of other "
    "GPUs stands the H100's."
)


def device_name(device: torch.device) -> str:
    """As CUDA calls it; a CPU by its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"


def write(
    folder: Path, findings: Sequence[Finding], figures: Sequence[Figure], device: torch.device
) -> None:
    """Both files, in a folder that is made."""
    folder.mkdir(parents=True, exist_ok=True)
    name, now = device_name(device), datetime.now(UTC).isoformat(timespec="seconds")
    rows = []
    for figure in figures:
        goal, is_own = goal_of(figure.name, name)
        met = goal.is_met(figure.value) if goal and is_own and figure.value is not None else None
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
    """The page: what is wrong comes first, then goals, then every figure by its part."""
    counts = {verdict: [f for f in findings if f.verdict == verdict] for verdict in VERDICTS}
    facts = [_fact(verdict, counts[verdict]) for verdict in VERDICTS]
    ordered = [finding for verdict in VERDICTS for finding in counts[verdict]]
    sections = [Section("The machine", blocks=[findings_table(ordered)])]
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
    statuses: dict[str, Status] = {"wrong": "bad" if found else "good"}
    names = ", ".join(f.name for f in found) if verdict != "good" else ""
    return Fact(verdict, str(len(found)), names, statuses.get(verdict, "plain"))


def _goals_fact(figures: Sequence[Figure], device: str) -> Fact:
    """How many of the goals for this device are reached."""
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
    """A row for each."""
    columns = ["", "verdict", "found", "what to do"]
    rows = [[f.name, f.verdict, f.text, f.advice or None] for f in findings]
    marked = [row for row, finding in enumerate(findings) if finding.verdict == "wrong"]
    return Table(columns, rows, highlight=frozenset(marked))


def goals_table(figures: Sequence[Figure], device: str) -> Table:
    """Figures that have goals, beside them and what others reach."""
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
    """All figures of a part; a dash stands where one could not be measured, and the reason behind it."""
    rows = [[f.name, _value(f), f.note or None] for f in figures]
    return Table(["", "measured", "with what, or why not"], rows)


def _value(figure: Figure) -> str | None:
    return None if figure.value is None else f"{column([figure.value])[0]} {figure.unit}"
