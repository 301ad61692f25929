"""Memory banks of documents that a test makes up, exactly searched."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cm3leon.data.shards import shard_path, write_plan
from cm3leon.retrievers.bank import Bank
from cm3leon.retrievers.index import IndexConfig, merge
from cm3leon.retrievers.parts import Parts
from cm3leon.retrievers.vectors import VectorShards, finish_vectors, write_vector_shard


def stored(vectors_BD: np.ndarray) -> np.ndarray:
    """Vectors as a bank keeps them: 16 bits a number."""
    return vectors_BD.astype(np.float16).astype(np.float32)


def write_bank(
    folder: Path,
    parts: Parts,
    ids: Sequence[str] | None = None,
    *,
    pairs_only: bool = False,
    encoder: str = "abc",
) -> tuple[Path, Path]:
    """Write the vectors of documents, in one shard, and their index; returns both folders."""
    vectors, index = folder / "vectors", folder / "index"
    header = {"encoder": encoder, "width": parts.text_BD.shape[1]}
    ids = ids or [str(row) for row in range(len(parts.text_BD))]
    write_plan(vectors, header)
    write_vector_shard(shard_path(vectors, 0, 1), ids, parts, header)
    finish_vectors(vectors, 1)
    index.mkdir()
    merge(VectorShards(vectors), index, IndexConfig(), seed=0, pairs_only=pairs_only)
    return vectors, index


def bank_of(parts: Parts, ids: Sequence[str] | None = None, *, pairs_only: bool = False) -> Bank:
    """A bank of the documents, whose files are there as long as it is."""
    folder = TemporaryDirectory()
    bank = Bank(*write_bank(Path(folder.name), parts, ids, pairs_only=pairs_only))
    weakref.finalize(bank, folder.cleanup)
    return bank
