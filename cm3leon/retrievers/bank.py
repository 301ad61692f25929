"""The memory bank: documents on disk, known by their rows, searched by text or by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.data.shards import open_shard, read_plan
from cm3leon.io import check_shape, read_json
from cm3leon.permissions import check_readable
from cm3leon.retrievers.index import ADDED, FIGURES, read_index
from cm3leon.retrievers.mips import Searcher, import_faiss
from cm3leon.retrievers.parts import Parts
from cm3leon.retrievers.search import CodeSearch, best
from cm3leon.retrievers.strategy import NONE
from cm3leon.retrievers.vectors import VectorShards, write_vector_shard
from cm3leon.types import UserError


class Bank:
    """A memory bank on disk, searched by text or by image;
    documents can be added without a rebuild.

    Added documents have the rows after all others and are searched exactly; `added_ids` are their
    ids.

    Args:
        expect: what the vectors' plan must say of the encoder.
        with_added: whether added documents are part of the bank.
        verify: compare the checksum of each shard of vectors when it is first opened.

    Raises:
        UserError: for a folder that is not finished, or vectors of another encoder.
    """

    def __init__(
        self,
        vectors: Path,
        index: Path,
        expect: Mapping[str, Any] | None = None,
        *,
        with_added: bool = True,
        verify: bool = True,
    ) -> None:
        self.vectors = VectorShards(vectors, expect, verify=verify)
        self._folder = index

        check_readable(index / FIGURES)
        try:
            figures = read_json(
                index / FIGURES, {"documents": int, "kind": str, "config": {"rescored": int}}
            )
        except UserError as error:
            raise UserError(
                f"{index} holds no finished index: its {FIGURES} is missing or unreadable"
            ) from error
        if figures["documents"] != len(self.vectors):
            raise UserError(
                f"{index} is the index of {figures['documents']} documents, {vectors} has "
                f"{len(self.vectors)}; make the index again"
            )

        self._exact = figures["kind"] == "exact"
        if not self._exact:
            check_shape(figures, {"nprobe": int}, str(index / FIGURES))
        # Indexes of older versions hold all documents.
        self.pairs_only = bool(figures.get("pairs_only", False))
        made = _flat(self.vectors, self.pairs_only) if self._exact else read_index(index)
        self._indexed = int(made.ntotal)
        self._searcher = Searcher(made)
        if self._exact:
            self._searched = self.vectors.searched(self.pairs_only)
        else:
            self._nprobe = int(figures["nprobe"])
            rescored = int(figures["config"]["rescored"])
            self._by_codes = CodeSearch(self._searcher, self.vectors, made.nlist, rescored)

        self.added_ids: list[str] = []
        nothing = np.zeros((0, self.vectors.width), np.float32)
        self._added = Parts(nothing, nothing)
        if with_added and (index / ADDED).is_file():
            shard = open_shard(index / ADDED)
            text_MD = shard.numbers("text").astype(np.float32)
            image_MD = shard.numbers("image").astype(np.float32)
            self.add(shard.strings("id"), Parts(text_MD, image_MD))

    def __len__(self) -> int:
        return len(self.vectors) + len(self.added_ids)

    @property
    def searchable(self) -> int:
        """Number of documents that a search can find."""
        return self._indexed + len(self._added.searched(self.pairs_only))

    @property
    def place(self) -> str:
        """Where it is searched, see `Searcher`."""
        return self._searcher.place

    def add(self, ids: Sequence[str], parts: Parts) -> np.ndarray:
        """Add documents and return their rows; `save_added` keeps them for the next time."""
        first = len(self)
        # A copy of this bank keeps the documents that it has.
        self.added_ids = [*self.added_ids, *ids]
        self._added = Parts.concatenate([self._added, parts])
        return np.arange(first, len(self))

    def save_added(self) -> None:
        """Write the added documents beside the index, for whoever opens it next."""
        plan = read_plan(self.vectors.folder)
        write_vector_shard(self._folder / ADDED, self.added_ids, self._added, plan)

    def search(self, query_QD: np.ndarray, count: int) -> np.ndarray:
        """Rows (Q, count) of the best documents by inner product, the best first; -1 if there are
        fewer."""
        query_QD = np.ascontiguousarray(query_QD, dtype=np.float32)
        if self._exact:
            # The flat index numbers only the documents that it holds.
            found_QK = self._searcher.search(query_QD, count)
            is_row = found_QK != NONE
            found_QK[is_row] = self._searched[found_QK[is_row]]
        else:
            found_QK = self._by_codes(query_QD, count, nprobe=self._nprobe)

        added_M = self._added.searched(self.pairs_only)
        if not len(added_M):
            return found_QK

        # Score what was found again, and take the best of it and of the added documents.
        scores_QK = np.einsum("qkd,qd->qk", self.parts_of(found_QK).mean(), query_QD)
        scores_QK[found_QK == NONE] = -np.inf
        added_QM = np.broadcast_to(len(self.vectors) + added_M, (len(query_QD), len(added_M)))
        scores_QM = query_QD @ self._added.mean()[added_M].T
        return best(
            np.concatenate([scores_QK, scores_QM], 1),
            np.concatenate([found_QK, added_QM], 1),
            count,
        )[1]

    def parts_of(self, rows: np.ndarray) -> Parts:
        """The parts of some rows, (*rows.shape, D) each; zeros for a negative row."""
        added = rows >= len(self.vectors)
        parts = self.vectors.parts(np.where(added, NONE, rows))
        indices = rows[added] - len(self.vectors)
        parts.text_BD[added] = self._added.text_BD[indices]
        parts.image_BD[added] = self._added.image_BD[indices]
        return parts

    def id(self, row: int) -> str:
        """The id of a document."""
        if row < len(self.vectors):
            return self.vectors.id(row)
        return self.added_ids[row - len(self.vectors)]


def _flat(vectors: VectorShards, pairs_only: bool) -> Any:
    """An index of the vectors themselves, for exact search."""
    index = import_faiss().IndexFlatIP(vectors.width)
    for number in range(vectors.count):
        parts = vectors.shard(number)
        index.add(parts.mean()[parts.searched(pairs_only)])
    return index
