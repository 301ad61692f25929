"""Files of answers: a folder for each row of a result, in it a file for every 128 items."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from cm3leon.io import atomic
from cm3leon.permissions import check_readable
from cm3leon.types import UserError

REPLACED = ("rows", "documents")
"""Arrays that are of the items, not of their samples."""


def shard_file(folder: Path, number: int) -> Path:
    """The file of the answers to the items of one shard."""
    return folder / f"{number:05d}.npz"


def sample_count(file: Path) -> int:
    """Samples that a file of answers has; 0 for one that is not there."""
    if not file.is_file():
        return 0
    held = read_answers(file)
    return next(len(held[name][0]) for name in ("clip", "texts", "scores") if name in held)


def read_answers(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of answers. Raises UserError for one that is damaged."""
    check_readable(file)
    try:
        with np.load(file, allow_pickle=False) as held:
            return dict(held)
    except (OSError, ValueError, BadZipFile, zlib.error) as error:
        raise UserError(
            f"{file} is damaged; remove it, and the same command makes it again"
        ) from error


def add_answers(file: Path, made: Mapping[str, np.ndarray], seconds: float) -> None:
    """Write a file of answers anew, with further samples behind those that it has."""
    whole = {**made, "seconds": np.array([seconds])}
    if file.is_file():
        held = read_answers(file)
        for name in set(whole) & set(held) - set(REPLACED):
            axis = 0 if name == "seconds" else 1
            whole[name] = np.concatenate([held[name], whole[name]], axis=axis)
    write_arrays(file, whole)


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into a file, whole or not at all."""
    with atomic(file, shared=True) as partial, partial.open("wb") as content:
        np.savez_compressed(content, allow_pickle=False, **arrays)
