"""Neighbours of the training documents: found once, drawn anew in every epoch.

Searching during training would keep the encoder and the index on every machine. Instead, each
document is a query once in every of V variants (its text and image with other tokens dropped), and
the rows that were found are stored. With 2 variants and 2 documents by each modality:

                   by text   by image
    variant 0      17  4     9  -1        -1: no fourth document passed the strategy's rules
    variant 1      17  30    4  12

A training sample draws one variant and up to `max_documents` of its rows; see `draw`.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cm3leon.data.shards import DamagedShard, Shard, ShardFolder, finish, write_shard
from cm3leon.retrievers.bank import Bank
from cm3leon.retrievers.base import Retriever
from cm3leon.retrievers.parts import MODALITIES, Parts
from cm3leon.retrievers.strategy import NONE


def draw(
    rows_VK: np.ndarray, *, most: int, random_count: bool, rng: np.random.Generator
) -> list[int]:
    """Rows of the bank for one training sample, the most relevant last (next to the query).

    A variant is drawn, then `most` of its distinct neighbours; with `random_count` the number of
    documents is uniform from 0 to that many. From the row 17 4 9 -1 and `most` 2, for example,
    the sample is given 9 and 17, in this order.
    """
    rows_K = rows_VK[rng.integers(len(rows_VK))]
    distinct = list(dict.fromkeys(row for row in rows_K.tolist() if row != NONE))

    count = min(most, len(distinct))
    if random_count:
        count = int(rng.integers(count + 1))
    chosen = np.sort(rng.permutation(len(distinct))[:count]).tolist()
    return [distinct[index] for index in reversed(chosen)]


def neighbours_of(
    retriever: Retriever,
    bank: Bank,
    variants: Iterable[Parts],
    own_B: np.ndarray,
    *,
    like: Parts,
) -> tuple[np.ndarray, Counter[str]]:
    """Find documents for queries in several variants; return rows of the bank and verdicts.

    The image is asked after the text: what it finds excludes the text's documents and copies of
    them.

    Args:
        variants: the parts of the documents in each variant.
        own_B: the documents' own rows in the bank, -1 for those not in it.
        like: the parts of the documents themselves, copies of which are not taken.

    Returns:
        rows (V, B, 2 * per_modality), and how many candidates each rule rejected in all.
    """
    count = retriever.config.per_modality
    verdicts: Counter[str] = Counter()
    rows_VBK = []
    for queries in variants:
        taken_BT = np.zeros((len(own_B), 0), np.int64)
        for modality in MODALITIES:
            rows_BK, seen = retriever.retrieve(
                bank, queries, modality, count=count, exclude_Q=own_B, like=like, taken_QT=taken_BT
            )
            taken_BT = np.concatenate([taken_BT, rows_BK], axis=1)
            verdicts += seen
        rows_VBK.append(taken_BT)
    return np.stack(rows_VBK), verdicts


# ------------------------------------------------------------------------------------------- shards


def write_neighbour_shard(path: Path, rows_VBK: np.ndarray, header: Mapping[str, Any]) -> None:
    """Write the neighbours of a shard of documents.

    Its columns are `rows`, all variants of a document one after the other, and `crc`, the CRC-32 of
    their bytes.
    """
    V, B, K = rows_VBK.shape
    rows = rows_VBK.transpose(1, 0, 2).reshape(B, V * K).astype(np.int32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), V * K)
    crc = pa.array([zlib.crc32(row.tobytes()) for row in rows], pa.uint32())
    write_shard(path, {"rows": column, "crc": crc}, {**header, "variants": V})


def finish_neighbours(folder: Path, count: int) -> None:
    """Check all shards and write index.json.
    Raises DamagedShard for one that is missing or damaged."""
    finish(folder, count, lambda shard: {"variants": shard.header["variants"]})


def _rows(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    return shard.numbers("rows"), shard.numbers("crc")


class NeighbourShards:
    """The neighbours in a finished folder; documents are numbered
    from 0 in order of shards and rows.

    Raises:
        UserError: for a folder that is not finished.
    """

    def __init__(self, folder: Path) -> None:
        self._shards = ShardFolder(folder, _rows)
        self._variants = max(self._shards.index["variants"], default=1)

    def __len__(self) -> int:
        return len(self._shards)

    def rows(self, document: int) -> np.ndarray:
        """Rows of the bank (V, K) of one document in each variant;
        -1 where the strategy left fewer.

        Raises:
            DamagedShard: naming the shard, if they are not as they were written.
        """
        number, index = self._shards.locate(document)
        rows, crc = self._shards.shard(number)
        if zlib.crc32(rows[index].tobytes()) != crc[index]:
            raise DamagedShard(
                f"{self._shards.path(number)}: row {index} is damaged, its checksum does not "
                "match; delete the file and make it again"
            )
        return rows[index].reshape(self._variants, -1)

    def shard(self, number: int) -> np.ndarray:
        """All rows (M, V * K) of one shard, without checking their checksums."""
        return self._shards.shard(number)[0]

    def draw(
        self, document: int, *, most: int, random_count: bool, rng: np.random.Generator
    ) -> list[int]:
        """Rows of the bank for one training sample, see `draw`."""
        return draw(self.rows(document), most=most, random_count=random_count, rng=rng)
