"""Make the table and the report of a sweep from its points as they stand.

python -m cm3leon.run collect run=runs/digits-sweep
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cm3leon.locks import locked
from cm3leon.stages.trust import Trust


@dataclass(kw_only=True)
class Options(Trust):
    """Options of the command collect."""

    run: Path
    """A folder of a sweep."""


def main(options: Options) -> None:
    """Makes both, while nobody else does.

    Raises:
        UserError: where no point has the figure that the sweep looks for.
    """
    from cm3leon.sweep.run import SWEEP_FILE, load_sweep, make_table

    file = str(options.run / SWEEP_FILE)
    sweep = load_sweep(file, (), options.run, trusted_plugins=options.trusted_plugins)
    with locked(options.run, wait=True):
        make_table(sweep)
