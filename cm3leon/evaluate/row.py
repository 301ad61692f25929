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
    check_readable(folder / "index" / MARKER)
    if not (folder / "index" / MARKER).is_file():
        raise UserError(
            f"setting.bank: {folder} is not the folder of a run with a finished index, "
            "for example runs/digits"
        )
    identity = [read_stage(folder / "index")["fingerprint"]]
    added = folder / "index" / ADDED
    if added.is_file():
        identity.append(sha256(added))
    return identity


def ranker_identity(folder: Path) -> str:
    """What identifies the CLIP that ranks samples: the digest of its weights.

    Raises:
        UserError: for a folder without a finished retriever.
    """
    check_readable(folder / "retriever" / MARKER)
    if not (folder / "retriever" / MARKER).is_file():
        raise UserError(
            f"setting.ranker: {folder} is not the folder of a run with a finished retriever, "
            "for example runs/digits"
        )
    return recorded_digest(folder / "retriever", WEIGHTS)
