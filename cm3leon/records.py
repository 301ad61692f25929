"""Records of folders: checksums of a stage's files, which are compared before the files are read.

A finished stage has a `stage.json` with the checksum of each of its files:

    {"fingerprint": "3f0c...", "seconds": 12.5,
     "files": {"tokenizer.json": "9a1b...", "shard-0.arrow": "8192 bytes"}}

A file is compared before it is read, once in a process. An Arrow shard has a checksum of its own,
which `data.shards.open_shard` compares, so only its size is recorded here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.io import read_json, sha256
from cm3leon.permissions import check_readable
from cm3leon.types import UserError

STAGES = (
    "documents",
    "text_tokenizer",
    "image_tokenizer",
    "reconstruction",
    "retriever",
    "tokens",
    "vectors",
    "index",
    "neighbours",
    "pretraining",
    "evaluation",
)
"""Stages in the order in which they are made."""
MARKER = "stage.json"
"""The record of a stage. It is written last, so a stage that has one is finished."""

KINDS = {"run": "config.yaml", "sweep": "sweep.yaml", "study": "study.yaml"}
"""Kinds of folders, and the file by which each is recognised."""


# -------------------------------------------------------------------------------------- checksums


def checksum(path: Path) -> str:
    """Return a file's entry in a record: its SHA-256, or for a shard its size."""
    if path.suffix == ".arrow":  # there may be terabytes of them
        return f"{path.stat().st_size} bytes"
    return sha256(path)


def changed(folder: Path, files: Mapping[str, str]) -> list[str]:
    """List the files of a folder that are missing, or whose checksum is not the recorded one."""
    return [
        name
        for name, recorded in files.items()
        if not (folder / name).is_file() or checksum(folder / name) != recorded
    ]


def check_unchanged(folder: Path, files: Mapping[str, str]) -> None:
    """Compare files with their recorded checksums.

    Raises:
        UserError: naming the first that is missing or has changed.
    """
    for name in changed(folder, files):
        file = folder / name
        what = "has changed since it was written" if file.is_file() else "is missing"
        raise UserError(
            f"{file} {what}; put a copy back, or run the experiment again, which makes it anew "
            "(verify=false opens what has changed as it is)"
        )


def check_stage(folder: Path, names: Sequence[str] = (), *, finished: bool = True) -> None:
    """Compare files of a stage with its record before they are read; without names, all files.

    Args:
        folder: folder of the stage.
        names: names of files; none = all files of the record.
        finished: whether to refuse a stage without a record; otherwise such a stage is one in the
            making, and passes.

    Raises:
        UserError: for a file that is missing, has changed or is not in the record, or a stage that
            is not finished.
    """
    if not (folder / MARKER).is_file():
        if finished:
            raise UserError(
                f"{folder} is not finished: its {MARKER} is missing; run the experiment again, "
                "which finishes it"
            )
        return

    recorded = read_stage(folder)["files"]
    if not names and not recorded:
        raise UserError(
            f"{folder / MARKER} names no files; "
            "run the experiment again, which makes the stage anew"
        )
    for name in names:
        if name not in recorded:
            raise UserError(
                f"{folder / MARKER} does not name {name}; "
                "run the experiment again, which makes the stage anew"
            )
    check_unchanged(folder, {name: recorded[name] for name in names or recorded})


def read_stage(folder: Path) -> dict[str, Any]:
    """Read the record of a finished stage: `fingerprint`, `seconds`, `files`.

    Raises:
        UserError: for a stage without a record, or with a damaged one.
    """
    return read_json(
        folder / MARKER, {"fingerprint": str, "seconds": (int, float), "files": {str: str}}
    )


def read_array(path: Path) -> np.ndarray:
    """Read a NumPy file, but no pickle in it, which could run code.

    Raises:
        UserError: for a file that is missing, may not be read, or is damaged.
    """
    check_readable(path)
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{path} is damaged: it cannot be read as a NumPy file ({error})"
        ) from error


# ------------------------------------------------------------------------------- kinds of folders


def refuse_other_kind(folder: Path, kind: str) -> None:
    """Raise UserError if a folder is that of a run, a sweep or a study, but not of this kind."""
    found = [each for each, file in KINDS.items() if (folder / file).is_file()]
    if any(folder.glob(f"*/{MARKER}")):
        found.insert(0, "run")
    for other in found:
        if other != kind:
            raise UserError(
                f"run: {folder} is the folder of a {other}, and a {kind} needs one of its own; "
                f"choose another run=, for example run={folder}-{kind}"
            )
