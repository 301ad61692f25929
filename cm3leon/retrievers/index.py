"""The index of a memory bank of any size: exact for small ones, inverted lists with product quantisation beyond.

An index is made in three steps, the middle one by any number of workers:

    train(...)            trained.faiss                     lists and codes, learned on a sample of all shards
    add_shard(..., k)     piece-00000.faiss ...             the codes of one shard of vectors
    merge(...)            index.faiss index.ivfdata         all pieces, searched through a memory map
                          index.json                        what it is, and its recall against exact search

Search takes the best candidates by their codes and orders them by their vectors, so that the codes decide only which
candidates are seen. Documents are known by their rows in the vectors; where only pairs may be retrieved (`pairs_only`),
others keep their rows and are not in the index.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.config import NonNegativeInt, PositiveInt, Probability
from cm3leon.data.shards import open_shard, read_plan
from cm3leon.io import atomic, check_shape, read_json, write_json
from cm3leon.permissions import check_readable
from cm3leon.retrievers.bank import MODALITIES, Parts
from cm3leon.retrievers.mips import Searcher, import_faiss, largest, train_index, with_vectors
from cm3leon.retrievers.strategy import NONE
from cm3leon.retrievers.vectors import VectorShards, write_vector_shard
from cm3leon.seeds import wrapped
from cm3leon.types import Modality, UserError

TRAINED, INDEX, DATA, FIGURES, ADDED = (
    "trained.faiss",
    "index.faiss",
    "index.ivfdata",
    "index.json",
    "added.arrow",
)
HNSW_FROM = 16_384
"""Lists from which on the list of a vector is itself looked up in a graph."""
PQ_CODES = 256
"""Codes of a subspace, one byte each."""
PIECE = 2**18
"""Vectors that are compared with queries at a time, in exact search through all shards."""
RECALL_AT = (2, 10)


@dataclass(kw_only=True)
class IndexConfig:
    """How a memory bank is searched."""

    exact_below: NonNegativeInt = 200_000
    """Indexes of fewer documents are searched exactly, held in memory."""
    code_bytes: PositiveInt = 64
    """Bytes of a document's product-quantised code; it must divide the size of the encoder's embedding."""
    lists: PositiveInt | None = None
    """Inverted lists; None = a power of two near 4 * sqrt(documents)."""
    rescored: PositiveInt = 256
    """Candidates by code that are ordered by their vectors, if more are not asked for."""
    recall_target: Probability = 0.95
    """Recall@2 against exact search, by text and by image, for which lists enough are probed, if all of them bring
    it. A query's own document does not count."""
    recall_queries: PositiveInt = 1000
    """Documents whose texts, and as many whose images, serve as queries to measure it."""


def lists_for(documents: int, config: IndexConfig) -> int:
    """Number of inverted lists."""
    return min(documents, config.lists or 2 ** round(math.log2(4 * math.sqrt(documents))))


def is_exact(documents: int, config: IndexConfig) -> bool:
    """Whether a bank of so many documents is searched exactly; fewer than a subspace has codes always are."""
    return documents < max(config.exact_below, PQ_CODES)


# ------------------------------------------------------------------------------------------------ making


def train(
    vectors: VectorShards,
    folder: Path,
    config: IndexConfig,
    seed: int,
    *,
    pairs_only: bool = False,
) -> None:
    """Learns the lists and the codes, unless that is done, or the bank is searched exactly.

    Raises:
        UserError: for code_bytes that do not divide the vectors' width.
    """
    # Vectors that are few even with those that are left out need not be counted.
    if is_exact(len(vectors), config) or (folder / TRAINED).is_file():
        return
    searched = _searched(vectors, pairs_only)
    if is_exact(len(searched), config):
        return
    if vectors.width % config.code_bytes:
        raise UserError(
            f"index.code_bytes is {config.code_bytes}; it must divide the vectors' width, {vectors.width}"
        )
    faiss = import_faiss()
    lists = lists_for(len(searched), config)
    quantizer = f"IVF{lists}_HNSW32" if lists >= HNSW_FROM else f"IVF{lists}"
    index = faiss.index_factory(
        vectors.width, f"{quantizer},PQ{config.code_bytes}", faiss.METRIC_INNER_PRODUCT
    )
    wanted = min(
        len(searched), max(64 * lists, 2**18)
    )  # FAISS asks for 39 a list, and 256 codes of 39 a subspace
    chosen = np.random.default_rng(seed).choice(len(searched), wanted, replace=False)
    rows = searched[np.sort(chosen)]
    index.cp.seed = index.pq.cp.seed = wrapped(seed + 1, bits=31)
    train_index(
        index, np.concatenate([vectors.parts(some).mean() for some in np.array_split(rows, 64)])
    )
    _write(index, folder / TRAINED)


def _searched(vectors: VectorShards, pairs_only: bool) -> np.ndarray:
    """Rows (N,) of the documents in the index."""
    if not pairs_only:
        return np.arange(len(vectors))
    found = [
        vectors.first(number) + vectors.shard(number).searched(pairs_only)
        for number in range(vectors.count)
    ]
    return np.concatenate(found)


def add_shard(
    vectors: VectorShards, number: int, folder: Path, *, pairs_only: bool = False
) -> None:
    """Writes the piece of a trained index with the vectors of one shard, unless it is there.

    Without a trained index the bank is searched exactly, and there are no pieces.
    """
    path = _piece(folder, number)
    if path.is_file() or not (folder / TRAINED).is_file():
        return
    parts = vectors.shard(number)
    places = parts.searched(pairs_only)
    trained = _opened(folder / TRAINED)
    _write(with_vectors(trained, parts.mean()[places], vectors.first(number) + places), path)


def merge(
    vectors: VectorShards,
    folder: Path,
    config: IndexConfig,
    seed: int,
    *,
    pairs_only: bool = False,
) -> None:
    """Merges the pieces on disk, measures the recall, and writes index.json."""
    start = time.perf_counter()
    figures: dict[str, Any] = {
        "documents": len(vectors),
        "pairs_only": pairs_only,
        "width": vectors.width,
        "config": asdict(config),
    }
    if not (folder / TRAINED).is_file():
        figures |= {
            "kind": "exact",
            "vectors": len(_searched(vectors, pairs_only)),
            "recall": {by: dict.fromkeys(map(str, RECALL_AT), 1.0) for by in MODALITIES},
            "bytes_per_document": 0,
        }
        write_json(folder / FIGURES, figures, indent=None, shared=True)
        return
    _merge_on_disk(folder, vectors.count)
    merged = time.perf_counter() - start
    index = _read(folder)
    nprobe, recall = _tuned(vectors, index, config, seed, pairs_only)
    figures |= {
        "kind": "ivf_pq",
        "vectors": index.ntotal,
        "lists": index.nlist,
        "nprobe": nprobe,
        "recall": recall,
        "bytes_per_document": sum((folder / name).stat().st_size for name in (INDEX, DATA))
        / index.ntotal,
        "merge_seconds": merged,
        "recall_seconds": time.perf_counter() - start - merged,
    }
    write_json(folder / FIGURES, figures, indent=None, shared=True)


def _merge_on_disk(folder: Path, pieces: int) -> None:
    index = _opened(folder / TRAINED)
    from faiss.contrib.ondisk import merge_ondisk

    (folder / DATA).unlink(missing_ok=True)
    with _quiet():
        merge_ondisk(
            index, [str(_piece(folder, number)) for number in range(pieces)], str(folder / DATA)
        )
        _write(index, folder / INDEX)


def _piece(folder: Path, number: int) -> Path:
    return folder / f"piece-{number:05d}.faiss"


def _write(index: Any, path: Path) -> None:
    """Writes an index whole or not at all."""
    with atomic(path, shared=True) as partial:
        import_faiss().write_index(index, str(partial))


def _read(folder: Path) -> Any:
    """The merged index, its lists mapped into memory."""
    check_readable(folder / DATA)
    try:
        with _quiet():
            return _opened(folder / INDEX, import_faiss().IO_FLAG_ONDISK_SAME_DIR)
    except RuntimeError as error:
        raise UserError(
            f"{folder / INDEX} or {DATA} beside it is no readable index; make the index again"
        ) from error


def _opened(path: Path, flags: int = 0) -> Any:
    """An index as FAISS wrote it. Raises UserError for a file that this user may not read."""
    check_readable(path)
    return import_faiss().read_index(str(path), flags)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what FAISS says of its files on the process's standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


# ------------------------------------------------------------------------------------------------ recall


def _tuned(
    vectors: VectorShards, index: Any, config: IndexConfig, seed: int, pairs_only: bool
) -> tuple[int, dict[str, dict[str, float]]]:
    """The fewest lists to probe for the recall that is aimed at, or all, with the recall at `RECALL_AT`.

    Queries are texts and images of documents, as training asks them; the recall of each kind has to reach the target.
    """
    most = max(RECALL_AT)
    asked = {by: _queries(vectors, config.recall_queries, seed, by) for by in MODALITIES}
    asked = {by: queries for by, queries in asked.items() if len(queries.own_Q)}
    exact = {
        by: queries.others(exact_search(vectors, queries.vectors_QD, most + 1, pairs_only))
        for by, queries in asked.items()
    }
    searcher, lists = Searcher(index), index.nlist
    nprobe = 1
    while True:
        recall: dict[str, dict[str, float]] = {}
        for by, queries in asked.items():
            found_QK = queries.others(
                _rescored(
                    searcher, nprobe, vectors, queries.vectors_QD, most + 1, config.rescored, lists
                )
            )
            recall[by] = {str(k): recall_at(exact[by], found_QK, k) for k in RECALL_AT}
        reached = min((of[str(RECALL_AT[0])] for of in recall.values()), default=1.0)
        if reached >= config.recall_target or nprobe >= lists:
            return nprobe, recall
        nprobe = min(2 * nprobe, lists)


@dataclass(frozen=True, eq=False)
class Queries:
    """Vectors (Q, D) of one part of documents, and the documents' rows (Q,)."""

    vectors_QD: np.ndarray
    own_Q: np.ndarray

    def others(self, found_QK: np.ndarray) -> np.ndarray:
        """The found rows (Q, K - 1) without each query's own document, or without the last."""
        order_QK = np.argsort(found_QK == self.own_Q[:, None], axis=1, kind="stable")
        return np.take_along_axis(found_QK, order_QK, axis=1)[:, :-1]


def _queries(vectors: VectorShards, count: int, seed: int, by: Modality) -> Queries:
    """One part of random documents, of those that have it."""
    rows = np.random.default_rng([seed, 1]).choice(
        len(vectors), min(count, len(vectors)), replace=False
    )
    parts = vectors.parts(rows)
    has_Q = parts.has(by)
    return Queries((parts.text_BD if by == "text" else parts.image_BD)[has_Q], rows[has_Q])


def recall_at(exact_QK: np.ndarray, found_QK: np.ndarray, k: int) -> float:
    """Share of the exact best `k` that are among the found best `k`."""
    hits = (exact_QK[:, :k, None] == found_QK[:, None, :k]) & (exact_QK[:, :k, None] != NONE)
    return float(hits.any(axis=2).sum() / max(1, (exact_QK[:, :k] != NONE).sum()))


def exact_search(
    vectors: VectorShards, queries_QD: np.ndarray, count: int, pairs_only: bool = False
) -> np.ndarray:
    """Rows (Q, count) of the best documents by inner product, going once through all shards, piece by piece."""
    best_QK = np.full((len(queries_QD), count), NONE, np.int64)
    scores_QK = np.full((len(queries_QD), count), -np.inf, np.float32)
    for number in range(vectors.count):
        parts = vectors.shard(number)
        places = parts.searched(pairs_only)
        rows_M, vectors_MD = vectors.first(number) + places, parts.mean()[places]
        for start in range(0, len(vectors_MD), PIECE):
            piece_MD = vectors_MD[start : start + PIECE]
            scores_QM, places_QM = largest(queries_QD, piece_MD, min(count, len(piece_MD)))
            scores_QK, best_QK = _best(
                np.concatenate([scores_QK, scores_QM], axis=1),
                np.concatenate([best_QK, rows_M[start + places_QM]], axis=1),
                count,
            )
    return best_QK


def _best(scores_QM: np.ndarray, rows_QM: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest scores of each query in falling order, with their rows."""
    if scores_QM.shape[1] > count:
        chosen = np.argpartition(-scores_QM, count - 1, axis=1)[:, :count]
        scores_QM, rows_QM = (np.take_along_axis(x, chosen, axis=1) for x in (scores_QM, rows_QM))
    order = np.argsort(-scores_QM, axis=1, kind="stable")
    return np.take_along_axis(scores_QM, order, axis=1), np.take_along_axis(rows_QM, order, axis=1)


def _rescored(
    searcher: Searcher,
    nprobe: int,
    vectors: VectorShards,
    queries_QD: np.ndarray,
    count: int,
    rescored: int,
    lists: int,
) -> np.ndarray:
    """The best of `rescored` candidates by code, ordered by their vectors; -1 where there are fewer.

    Queries whose probed lists hold fewer than `count` documents probe more lists.
    """
    most = max(count, rescored)
    candidates_QM = searcher.search(queries_QD, most, nprobe=nprobe)
    while nprobe < lists and len(short := np.flatnonzero(candidates_QM[:, count - 1] == NONE)):
        nprobe = min(2 * nprobe, lists)
        candidates_QM[short] = searcher.search(queries_QD[short], most, nprobe=nprobe)
    scores_QM = np.einsum("qmd,qd->qm", vectors.parts(candidates_QM).mean(), queries_QD)
    return _best(np.where(candidates_QM == NONE, -np.inf, scores_QM), candidates_QM, count)[1]


# ------------------------------------------------------------------------------------------------ searching


class Bank:
    """A memory bank on disk, searched by text or by image; documents can be added without a rebuild.

    Added documents have the rows after all others, and are searched exactly; `added_ids` are theirs.

    Args:
        expect: what the vectors' plan has to say of the encoder.
        with_added: whether documents that were added are in it.
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
                f"{index} is the index of {figures['documents']} documents, {vectors} has {len(self.vectors)}; "
                "make the index again"
            )
        self._rescored = int(figures["config"]["rescored"])
        self._exact = figures["kind"] == "exact"
        if not self._exact:
            check_shape(figures, {"nprobe": int}, str(index / FIGURES))
        # An index made before documents were left out has all of them.
        self.pairs_only = bool(figures.get("pairs_only", False))
        if self._exact:
            self._searched = _searched(self.vectors, self.pairs_only)
            made = _flat(self.vectors, self.pairs_only)
        else:
            self._nprobe, made = figures["nprobe"], _read(index)
            self._lists = made.nlist
        self._indexed = int(made.ntotal)
        self._searcher = Searcher(made)
        self.added_ids: list[str] = []
        self._added = Parts(*(np.zeros((0, self.vectors.width), np.float32) for _ in range(2)))
        if with_added and (index / ADDED).is_file():
            shard = open_shard(index / ADDED)
            parts = Parts(*(shard.numbers(name).astype(np.float32) for name in ("text", "image")))
            self.add(shard.strings("id"), parts)

    def __len__(self) -> int:
        return len(self.vectors) + len(self.added_ids)

    @property
    def searchable(self) -> int:
        """Number of documents that a search may find."""
        return self._indexed + len(self._added.searched(self.pairs_only))

    @property
    def place(self) -> str:
        """Where it is searched, see `Searcher`."""
        return self._searcher.place

    def add(self, ids: Sequence[str], parts: Parts) -> np.ndarray:
        """Adds documents, and returns their rows; `save_added` keeps them for the next time."""
        first = len(self)
        self.added_ids += ids
        self._added = Parts.concatenate([self._added, parts])
        return np.arange(first, len(self))

    def save_added(self) -> None:
        """Writes the added documents beside the index; whoever opens it finds them."""
        plan = read_plan(self.vectors.folder)
        write_vector_shard(self._folder / ADDED, self.added_ids, self._added, plan)

    def search(self, query_QD: np.ndarray, count: int) -> np.ndarray:
        """Rows (Q, count) of the best documents by inner product, the best first; -1 where there are fewer."""
        query_QD = np.ascontiguousarray(query_QD, dtype=np.float32)
        if self._exact:
            places_QK = self._searcher.search(query_QD, count)
            found_QK = np.full_like(places_QK, NONE)
            found = places_QK != NONE
            found_QK[found] = self._searched[places_QK[found]]
        else:
            found_QK = _rescored(
                self._searcher,
                self._nprobe,
                self.vectors,
                query_QD,
                count,
                self._rescored,
                self._lists,
            )
        added_M = self._added.searched(self.pairs_only)
        if not len(added_M):
            return found_QK
        scores_QK = np.einsum("qkd,qd->qk", self.parts_of(found_QK).mean(), query_QD)
        scores_QK[found_QK == NONE] = -np.inf
        added_QM = np.broadcast_to(len(self.vectors) + added_M, (len(query_QD), len(added_M)))
        scores_QM = query_QD @ self._added.mean()[added_M].T
        return _best(
            np.concatenate([scores_QK, scores_QM], 1),
            np.concatenate([found_QK, added_QM], 1),
            count,
        )[1]

    def parts_of(self, rows: np.ndarray) -> Parts:
        """The parts of some rows, (*rows.shape, D) each; zeros for a negative row."""
        added = rows >= len(self.vectors)
        parts = self.vectors.parts(np.where(added, NONE, rows))
        places = rows[added] - len(self.vectors)
        parts.text_BD[added], parts.image_BD[added] = (
            self._added.text_BD[places],
            self._added.image_BD[places],
        )
        return parts

    def id(self, row: int) -> str:
        """The id of a document."""
        return (
            self.vectors.id(row)
            if row < len(self.vectors)
            else self.added_ids[row - len(self.vectors)]
        )


def _flat(vectors: VectorShards, pairs_only: bool) -> Any:
    index = import_faiss().IndexFlatIP(vectors.width)
    for number in range(vectors.count):
        parts = vectors.shard(number)
        index.add(parts.mean()[parts.searched(pairs_only)])
    return index
