"""Where a page of several runs comes from: experiment, command, date, machines, and links to the
pages of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath

from cm3leon.evaluation.report import Code, Link, Section, Table

PAGES = {
    "report.html": "report",
    "reconstruction/report.html": "reconstructions",
}
"""The pages that a run may have, the most informative first, with the text of a link to each."""


@dataclass(frozen=True)
class Origin:
    """Where a page comes from."""

    experiment: str
    """Its name when it was started."""
    command: str
    """Makes the page again, and of its runs only what is missing."""
    date: datetime
    """When the page was made."""
    machines: Sequence[str] = ()
    """A line for each machine that its runs were made on, as far as recorded."""

    def section(self) -> Section:
        """The last section of a page."""
        rows: list[tuple[str, str]] = [
            ("experiment", self.experiment),
            ("page made", f"{self.date.astimezone(UTC):%Y-%m-%d %H:%M} UTC"),
        ]
        for machine in self.machines:
            rows.append(("machine", machine))
        return Section(
            "To run it again",
            "This command makes the page again, and of its runs only what is missing.",
            [Code(self.command), Table(("", ""), rows)],
        )


def page_of(name: str, folder: Path) -> Link | None:
    """A link to the page of the run in `folder / name`; None if it has none."""
    for page, title in PAGES.items():
        if (folder / name / page).is_file():
            return Link(title, PurePath(name) / page)
    return None


def is_logarithmic(key: str, values: Sequence[float]) -> bool:
    """Whether the axis of a swept key is logarithmic: that of a learning rate, and of positive
    numbers whose largest is at least ten times the smallest."""
    if not values or min(values) <= 0:
        return False
    return key.endswith("learning_rate") or max(values) >= 10 * min(values)
