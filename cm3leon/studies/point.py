"""A point of a sweep is run in a folder of its own, which records how it ended."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cm3leon.config import dump_yaml, to_mapping
from cm3leon.experiment import Experiment, load_experiment
from cm3leon.io import digest_of, read_json, write_json, write_text
from cm3leon.provenance import record
from cm3leon.records import MARKER
from cm3leon.secrets import without_secrets
from cm3leon.stages.running import run_experiment
from cm3leon.training.distributed import current_rank
from cm3leon.types import Again

POINT_FILE = "point.yaml"
"""The experiment of a point, in its folder; its job reads it."""
OUTCOME = "outcome.json"
"""How the run of a point ended, in its folder: `state`, digest of its `config`, `error`."""


def prepare_point(experiment: Experiment, folder: Path) -> None:
    """Make the folder of a point, with the file that its job reads."""
    folder.mkdir(exist_ok=True)
    write_text(folder / POINT_FILE, dump_yaml(without_secrets(to_mapping(experiment))))


def run_point(
    folder: Path,
    shared: Path | None,
    trusted_plugins: Sequence[str] | None,
    redo: Sequence[str] = (),
) -> None:
    """Run the experiment of a point in its folder, and record how it ended.

    Stages that are finished in `shared` are linked into the folder. A stage that differs at this
    point replaces its link.
    """
    rank = current_rank()
    first = rank is None or rank.number == 0
    config = (folder / POINT_FILE).read_text()

    # Link the shared stages, also over links that an earlier run left dangling.
    if first:
        record(folder)
        (folder / OUTCOME).unlink(missing_ok=True)
        for marker in sorted(shared.glob(f"*/{MARKER}")) if shared else ():
            stage = folder / marker.parent.name
            if not stage.exists():
                stage.unlink(missing_ok=True)
                stage.symlink_to(os.path.relpath(marker.parent, folder))

    try:
        experiment = load_experiment(str(folder / POINT_FILE), trusted_plugins=trusted_plugins)
        run_experiment(experiment, folder, redo=redo)
    except Again:
        raise  # stopped, not ended
    except Exception as error:
        if first:
            reason = " ".join(str(error).split()) or type(error).__name__
            _end(folder, config, "failed", reason)
        raise
    if first:
        _end(folder, config, "finished")


def outcome_of(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """How the last run of a point ended; {} if it has none, or one with other settings."""
    file = folder / OUTCOME
    if not file.is_file():
        return {}
    outcome = read_json(file, {"state": str, "error?": str})
    digest = digest_of(dump_yaml(to_mapping(experiment)))
    return outcome if outcome.get("config") == digest else {}


def _end(folder: Path, config: str, state: str, error: str = "") -> None:
    write_json(folder / OUTCOME, {"state": state, "config": digest_of(config), "error": error})
