"""A line of the doctor's report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["good", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. `wrong` keeps something from working; a warning does not."""

    verdict: Verdict
    name: str
    text: str
    advice: str = ""
    """What to do about it; "" if it is good."""


def good(name: str, text: str) -> Finding:
    return Finding("good", name, text)


def warning(name: str, text: str, advice: str) -> Finding:
    return Finding("warning", name, text, advice)


def wrong(name: str, text: str, advice: str) -> Finding:
    return Finding("wrong", name, text, advice)


def lines(finding: Finding) -> Iterator[str]:
    """The finding as lines for a terminal."""
    yield f"{finding.verdict:<8} {finding.name}: {finding.text}"
    if finding.advice:
        yield f"         -> {finding.advice}"
