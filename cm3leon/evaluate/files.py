"""Files of answers: a folder for each row of a result, with one file for every 128 items.

Each file is an .npz archive of arrays with a row for each item and, in most, a column for each
sample; which ones depends on the protocol:

    codes (I, n, N), clip (I, n)         images: codes, cosine with the caption by CLIP
    texts (I, n), truncated (I, n)       texts, and whether they were cut at their length
    scores (I, 1, K)                     log-likelihoods of ranked candidates
    documents (I,)                       retrieved documents in the prompt
    rows (I, K), kept (I, n)             own corpus: their rows in the bank; given parts unchanged
    seconds (1,)                         time of each visit to the file
"""

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
"""Arrays that have no samples: they are replaced when samples are added."""


def shard_file(folder: Path, number: int) -> Path:
    """The file of the answers to one shard's items."""
    return folder / f"{number:05d}.npz"


def sample_count(file: Path) -> int:
    """Samples in a file of answers; 0 if it is missing."""
    if not file.is_file():
        return 0
    held = read_answers(file)
    for name in ("clip", "texts", "scores"):
        if name in held:
            return len(held[name][0])
    raise UserError(f"{file} holds no answers; remove it, and the same command makes it again")


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
    """Append samples to a file of answers, which is written anew."""
    whole = {**made, "seconds": np.array([seconds])}
    if file.is_file():
        held = read_answers(file)
        for name in set(whole) & set(held) - set(REPLACED):
            axis = 0 if name == "seconds" else 1
            whole[name] = np.concatenate([held[name], whole[name]], axis=axis)
    write_arrays(file, whole)


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays into a file, atomically."""
    with atomic(file, shared=True) as partial, partial.open("wb") as content:
        np.savez_compressed(content, allow_pickle=False, **arrays)
