"""Make the table and the report of a sweep, or of a study without evaluations, from its runs.

Runs that are not finished count as they stand.

python -m cm3leon.run collect run=runs/digits-sweep
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cm3leon.locks import locked
from cm3leon.stages.trust import Trust
from cm3leon.types import UserError


@dataclass(kw_only=True)
class Options(Trust):
    """Options of the command collect."""

    run: Path
    """A folder of a sweep or a study."""


def main(options: Options) -> None:
    """Make both under the folder's lock, so that jobs that end together do not write at once.

    Raises:
        UserError: if no point has the figure that the sweep compares, and for a study with
            evaluations.
    """
    from cm3leon.records import KINDS
    from cm3leon.studies import load_study, load_sweep
    from cm3leon.studies.run import write_results

    # The settings are those that the sweep or the study was started with, as its folder has them.
    folder, trusted = options.run, options.trusted_plugins
    if (folder / KINDS["study"]).is_file():
        study = load_study(str(folder / KINDS["study"]), (), folder, trusted_plugins=trusted)
    else:
        study = load_sweep(str(folder / KINDS["sweep"]), (), folder, trusted_plugins=trusted)

    if study.evaluations:
        raise UserError(
            f"run: {folder} is a study with evaluations, whose figures its own command makes: "
            f"experiment={study.file} run={folder}"
        )

    with locked(folder, wait=True):
        write_results(study)
