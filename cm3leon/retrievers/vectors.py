"""Vectors of documents in shards: the text and the image part of each, as 16-bit floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cm3leon.data.shards import PLAN, Shard, ShardFolder, finish, read_plan, write_shard
from cm3leon.io import check_shape
from cm3leon.retrievers.parts import Parts
from cm3leon.types import UserError
from cm3leon.weights import check_finite


def write_vector_shard(
    path: Path, ids: Sequence[str], parts: Parts, header: Mapping[str, Any]
) -> None:
    """Write a shard of documents with the columns `id`,
    `text` and `image` (zeros for a missing part).

    Raises:
        NotFinite: for vectors that are NaN or infinite.
    """
    for vectors_BD in (parts.text_BD, parts.image_BD):
        check_finite(
            torch.from_numpy(vectors_BD), f"what the encoder makes of documents for {path}"
        )
    columns = {
        "id": pa.array(ids, pa.large_string()),
        "text": _vectors(parts.text_BD),
        "image": _vectors(parts.image_BD),
    }
    write_shard(path, columns, header)


def _vectors(vectors_BD: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(
        pa.array(vectors_BD.astype(np.float16).ravel()), vectors_BD.shape[1]
    )


def finish_vectors(folder: Path, count: int) -> None:
    """Check all shards and write index.json.
    Raises DamagedShard for one that is missing or damaged."""
    finish(folder, count)


class VectorShards:
    """The vectors in a finished folder; rows are numbered from 0 in order of shards.

    Args:
        expect: what the folder's plan must say of the encoder.
        verify: compare the checksum of each shard when it is first opened.

    Raises:
        UserError: for an unfinished folder, or one that another encoder made.
    """

    def __init__(
        self, folder: Path, expect: Mapping[str, Any] | None = None, *, verify: bool = True
    ) -> None:
        self.folder = folder
        self._shards = ShardFolder(folder, _VectorColumns, verify=verify, scattered=True)
        made_by = read_plan(folder)
        check_shape(made_by, {"width": int}, str(folder / PLAN))
        self.width = made_by["width"]
        for name, wanted in (expect or {}).items():
            if made_by.get(name) != wanted:
                raise UserError(
                    f"{folder} was made by another encoder: {name} is {made_by.get(name)} there "
                    f"and {wanted} here; use that run's encoder, or make the vectors again"
                )

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def all_stay_mapped(self) -> bool:
        """Whether reading rows in any order opens each shard once, see
        `ShardFolder.all_stay_mapped`."""
        return self._shards.all_stay_mapped

    @property
    def count(self) -> int:
        """Number of shards."""
        return len(self._shards.rows)

    def shard(self, number: int) -> Parts:
        """All vectors of a shard, float32."""
        columns = self._shards.whole(number)
        return Parts(columns.text_MD.astype(np.float32), columns.image_MD.astype(np.float32))

    def first(self, number: int) -> int:
        """The first row of a shard."""
        return self._shards.first(number)

    def searched(self, pairs_only: bool) -> np.ndarray:
        """Rows (N,) of the documents that an index holds, see `Parts.searched`."""
        if not pairs_only:
            return np.arange(len(self))
        found = [self.first(k) + self.shard(k).searched(pairs_only) for k in range(self.count)]
        return np.concatenate(found)

    def parts(self, rows: np.ndarray) -> Parts:
        """The vectors of some rows, float32, (*rows.shape, D) each; a negative row is zeros.

        Raises:
            IndexError: for a row beyond the last.
        """
        # Queries share many of their candidates: each row is read once, and in order.
        distinct, index_of = np.unique(rows.ravel(), return_inverse=True)
        text = np.zeros((len(distinct), self.width), np.float32)
        image = np.zeros_like(text)
        given = np.flatnonzero(distinct >= 0)
        for number, indices, wanted in self._shards.by_shard(distinct[given]):
            columns = self._shards.shard(number)
            text[given[indices]] = columns.text_MD[wanted]
            image[given[indices]] = columns.image_MD[wanted]

        shape = (*rows.shape, self.width)
        return Parts(text[index_of].reshape(shape), image[index_of].reshape(shape))

    def id(self, row: int) -> str:
        """The id of a document."""
        number, place = self._shards.locate(row)
        return self._shards.shard(number).id[place].as_py()


class _VectorColumns:
    """Views of the columns of an open shard."""

    def __init__(self, shard: Shard) -> None:
        self.id = shard.columns["id"]
        self.text_MD = shard.numbers("text")
        self.image_MD = shard.numbers("image")
