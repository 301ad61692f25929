"""Run one point of a sweep or a study, whose folder the launcher has prepared.

python -m cm3leon.run point run=runs/digits-sweep/seed=0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cm3leon.commands.words import RedoOptions
from cm3leon.stages.trust import Trust


@dataclass(kw_only=True)
class Options(Trust, RedoOptions):
    """Options of the command point."""

    run: Path
    """A folder of a point."""
    shared: Path | None = None
    """Folder of the stages that it shares with other points; null = it shares none."""


def main(options: Options) -> None:
    """Run the experiment of the point, and write down how it ended."""
    from cm3leon.studies.point import run_point

    run_point(options.run, options.shared, options.trusted_plugins, options.stages_to_redo)
