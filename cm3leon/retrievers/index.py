"""The index of a memory bank of any size: exact for small ones,
inverted lists with product quantisation beyond.

An index is made in three steps, the middle one by any number of workers:

    train(...)            trained.faiss                     lists and codes, learned on a sample of all shards
    add_shard(..., k)     piece-00000.faiss ...             the codes of one shard of vectors
    merge(...)            index.faiss index.ivfdata         all pieces, searched through a memory map
                          index.json                        what it is, and its recall against exact search

Documents are known by their rows in the vectors; where only pairs may be retrieved (`pairs_only`),
others keep their rows and are not in the index. `search.py` is how it is searched, `bank.py` what
the retrievers search.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.config import NonNegativeInt, PositiveInt, Probability
from cm3leon.io import atomic, write_json
from cm3leon.permissions import check_readable
from cm3leon.retrievers.mips import Searcher, import_faiss, train_index, with_vectors
from cm3leon.retrievers.parts import MODALITIES
from cm3leon.retrievers.recall import RECALL_AT, lists_to_probe
from cm3leon.retrievers.search import CodeSearch
from cm3leon.retrievers.vectors import VectorShards
from cm3leon.seeds import wrapped
from cm3leon.types import UserError

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


@dataclass(kw_only=True)
class IndexConfig:
    """How a memory bank is searched."""

    exact_below: NonNegativeInt = 200_000
    """Indexes of fewer documents are searched exactly, held in memory."""
    code_bytes: PositiveInt = 64
    """Bytes of a document's product-quantised code;
    it must divide the size of the encoder's embedding."""
    lists: PositiveInt | None = None
    """Inverted lists; None = a power of two near 4 * sqrt(documents)."""
    rescored: PositiveInt = 256
    """Candidates by code that are ordered by their vectors, if more are not asked for."""
    recall_target: Probability = 0.95
    """Recall@2 against exact search, by text and by image, for which lists enough are probed, if
    all of them bring it. A query's own document does not count."""
    recall_queries: PositiveInt = 1000
    """Documents whose texts, and as many whose images, serve as queries to measure it."""


def lists_for(documents: int, config: IndexConfig) -> int:
    """Number of inverted lists."""
    return min(documents, config.lists or 2 ** round(math.log2(4 * math.sqrt(documents))))


def is_exact(documents: int, config: IndexConfig) -> bool:
    """Whether a bank of so many documents is searched exactly;
    fewer than a subspace has codes always are."""
    return documents < max(config.exact_below, PQ_CODES)


# ------------------------------------------------------------------------------------------- making


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
    searched = vectors.searched(pairs_only)
    if is_exact(len(searched), config):
        return
    if vectors.width % config.code_bytes:
        raise UserError(
            f"index.code_bytes is {config.code_bytes}; it must divide the vectors' width, "
            f"{vectors.width}"
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
            "vectors": len(vectors.searched(pairs_only)),
            "recall": {by: dict.fromkeys(map(str, RECALL_AT), 1.0) for by in MODALITIES},
            "bytes_per_document": 0,
        }
        write_json(folder / FIGURES, figures, indent=None, shared=True)
        return
    _merge_on_disk(folder, vectors.count)
    merged = time.perf_counter() - start
    index = read_index(folder)
    nprobe, recall = lists_to_probe(
        CodeSearch(Searcher(index), vectors, index.nlist, config.rescored),
        target=config.recall_target,
        queries=config.recall_queries,
        seed=seed,
        pairs_only=pairs_only,
    )
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


def read_index(folder: Path) -> Any:
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
