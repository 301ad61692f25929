"""A row of a result: a model under a setting, with the memory bank that it is asked with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm3leon.evaluation.config import AskConfig
from cm3leon.io import sha256
from cm3leon.permissions import check_readable
from cm3leon.records import MARKER, read_stage
from cm3leon.retrievers.index import ADDED
from cm3leon.stages.files import WEIGHTS, recorded_digest
from cm3leon.types import UserError


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a result: a model under a setting."""

    name: str
    model: str
    folder: Path
    """Run folder of the model."""
    setting: AskConfig
    point: dict[str, Any]
    """The swept keys and their values."""


def bank_identity(folder: Path) -> list[str]:
    """What identifies a memory bank: the fingerprint of its index, and a digest of added documents.

    Raises:
        UserError: for a folder without a finished index.
    """
    stage = _finished(folder, "index", "bank")
    identity = [read_stage(stage)["fingerprint"]]
    added = stage / ADDED
    if added.is_file():
        identity.append(sha256(added))
    return identity


def ranker_identity(folder: Path) -> str:
    """What identifies the CLIP that ranks samples: the digest of its weights.

    Raises:
        UserError: for a folder without a finished retriever.
    """
    return recorded_digest(_finished(folder, "retriever", "ranker"), WEIGHTS)


def _finished(folder: Path, stage: str, setting: str) -> Path:
    """The folder of a stage of the run that a setting names. Raises UserError if it is missing."""
    check_readable(folder / stage / MARKER)
    if not (folder / stage / MARKER).is_file():
        raise UserError(
            f"setting.{setting}: {folder} is not the folder of a run with a finished {stage}, "
            "for example runs/digits"
        )
    return folder / stage
