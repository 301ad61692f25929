"""How figures are written on a page: the one place for formats of numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

DASH, MINUS = "\u2013", "\u2212"
_NUMERIC = re.compile(r"nan|\u2212?inf|[\d\s.,%e/()\[\]+\-\u00b1\u00d7\u2013\u2212]+")


def column(cells: Sequence[str | float | None]) -> list[str]:
    """A column of a table as text, with floats aligned at the decimal point."""
    floats = [cell for cell in cells if isinstance(cell, float | np.floating)]
    decimals = max((_decimals(value) for value in floats), default=0)
    return [_cell(cell, decimals) for cell in cells]


def is_numeric(texts: Sequence[str]) -> bool:
    """Whether a column reads as numbers: digits, signs, per cent, intervals.

    Dashes and gaps do not count.
    """
    filled = [text for text in texts if text.strip(f" -{DASH}")]
    return bool(filled) and all(_NUMERIC.fullmatch(text) for text in filled)


def _decimals(value: float) -> int:
    """Decimals that show a value with four digits."""
    text = f"{value:.4g}"
    return 0 if "e" in text else len(text.partition(".")[2])


def _cell(cell: str | float | None, decimals: int) -> str:
    """A string as it is, a dash for None, a float with `decimals` but at most five digits."""
    if cell is None:
        return DASH
    if isinstance(cell, str):
        return cell

    if not isinstance(cell, float | np.floating):
        text = f"{cell:,}"
    elif cell == 0 or 1e-4 <= abs(cell) < 1e15:
        digits = len(f"{abs(cell):.0f}")
        text = f"{cell:,.{min(decimals, max(_decimals(cell), 5 - digits))}f}"
    else:
        text = f"{cell:.4g}"
    return text.replace("-", MINUS)


def tick(value: float) -> str:
    """A number on an axis: 0.05, 2, 1,500, 2.5M."""
    size = abs(value)
    if size >= 1e6:
        text = f"{value / 1e6:g}M"
    elif size >= 1e3:
        text = f"{value:,.0f}"
    else:
        text = f"{value:g}"
    return text.replace("-", MINUS)


def metric(value: float) -> str:
    """A figure of any size: 0.912, 27.3."""
    if abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.1f}"


def interval(low: float, high: float, write: Callable[[float], str] = metric) -> str:
    """The interval of a figure that `write` formats: [0.880, 0.940]."""
    return f"[{write(low)}, {write(high)}]"


def unbroken(text: str) -> str:
    """A figure that breaks into lines only before a bracket, so that a narrow column stays readable.

    `0.912 ± 0.012 (0.880 to 0.940) [0.871, 0.953]` takes up to three lines.
    """
    return re.sub(r" (?![(\[])", "\u00a0", text)


def counted(count: int, noun: str) -> str:
    """A number of things: 1 code, 1,024 codes."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def span(start: int, end: int) -> str:
    """Positions [start, end): 17, or 17–1,040."""
    return f"{start:,}{DASH}{end - 1:,}" if end - start > 1 else f"{start:,}"
