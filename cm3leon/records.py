"""What folders say of themselves: JSON files that others may have written, and checksums that are compared on opening.

A finished stage has a `stage.json` with the checksum of each of its files:

    {"fingerprint": "3f0c...", "seconds": 12.5, "files": {"tokenizer.json": "9a1b...", "shard-0.arrow": "8192 bytes"}}

Whoever opens one of the files compares it first, once in a process. An Arrow shard carries its own checksum, which
`data.shards.open_shard` compares; here only its size is looked at.
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
"""Written last: a stage is finished when its folder has one."""

KINDS = {"run": "config.yaml", "sweep": "sweep.yaml", "study": "study.yaml"}
"""What a folder may be of, and the file that says so."""


# ------------------------------------------------------------------------------------------------ checksums


def checksum(path: Path) -> str:
    """What a record says of a file: its SHA-256, or the size of a shard, which carries a checksum of its own."""
    if path.suffix == ".arrow":  # there may be terabytes of them
        return f"{path.stat().st_size} bytes"
    return sha256(path)


def changed(folder: Path, files: Mapping[str, str]) -> list[str]:
    """The names of files in a folder that are missing or have another checksum than the recorded one."""
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
        finished: refuse a stage without a record. If off, such a stage is one that is being made, and passes.

    Raises:
        UserError: for a file that is missing, has changed or is not in the record, or a stage that is not finished.
    """
    if not (folder / MARKER).is_file():
        if finished:
            raise UserError(f"{folder} is not finished: its {MARKER} is missing")
        return
    recorded = read_stage(folder)["files"]
    if not names and not recorded:
        raise UserError(
            f"{folder / MARKER} names no files; run the experiment again, which makes the stage anew"
        )
    for name in names:
        if name not in recorded:
            raise UserError(
                f"{folder / MARKER} does not name {name}; run the experiment again, which makes the stage anew"
            )
    check_unchanged(folder, {name: recorded[name] for name in names or recorded})


def read_stage(folder: Path) -> dict[str, Any]:
    """The record of a finished stage: `fingerprint`, `seconds`, `files`.

    Raises:
        UserError: for a stage without a record, or with a damaged one.
    """
    return read_json(
        folder / MARKER, {"fingerprint": str, "seconds": (int, float), "files": {str: str}}
    )


def read_array(path: Path) -> np.ndarray:
    """A NumPy file, without running what a pickle might hold.

    Raises:
        UserError: for a file that is missing, may not be read, or is damaged.
    """
    check_readable(path)
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged: it is no readable NumPy file ({error})") from error


# ------------------------------------------------------------------------------------------------ kinds of folders


def refuse_other_kind(folder: Path, kind: str) -> None:
    """Raises UserError where the folder is that of a run, a sweep or a study, and not of this kind."""
    found = [each for each, file in KINDS.items() if (folder / file).is_file()]
    if any(folder.glob(f"*/{MARKER}")):
        found.insert(0, "run")
    for other in found:
        if other != kind:
            raise UserError(
                f"run: {folder} is the folder of a {other}, and a {kind} needs one of its own; choose another run=, "
                f"for example run={folder}-{kind}"
            )
