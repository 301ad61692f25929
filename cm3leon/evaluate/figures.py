"""Figures of a row: as a result file keeps them, and as the command line shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cm3leon.evaluation.config import shown
from cm3leon.evaluation.metrics import Measured


def as_figures(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """What a protocol measured, as plain data."""
    return {name: asdict(value) for name, value in measured.items()}


def figures_line(row: str, result: Mapping[str, Any]) -> str:
    """The figures of a row on the command line: `cfg 2: right 0.93`,
    `right 0.93 ± 0.02` over several seeds."""
    figures = dict(result["metrics"])
    if "truncated" in result:
        figures[f"truncated at {result['max_tokens']} tokens"] = result["truncated"]

    said = []
    for metric, found in figures.items():
        text = f"{metric} {shown(round(found['value'], 4))}"
        if "runs" in found:
            text += f" ± {shown(round(found['runs']['deviation'], 4))}"
        said.append(text)
    return f"{row}: {', '.join(said)}"
