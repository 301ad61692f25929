"""The index of a memory bank: exact search for small banks, inverted lists of codes for large ones.

How 64 bytes stand for a vector of 512 numbers. k-means divides the space into `lists`; each vector
goes to the list with the nearest centre. What is left of the vector after subtracting the centre is
cut into `code_bytes` pieces, and each piece is replaced by the number of the nearest of 256 learned
pieces:

    vector = centre of list 17 + [piece 203 | piece 11 | ... | piece 96]     64 bytes in list 17

A search probes the `nprobe` lists whose centres are nearest to the query, estimates inner products
from the codes, and orders the best candidates by their exact vectors (`search.py`).

An index is made in three steps, the middle one by any number of workers:

    train(...)            trained.faiss              lists and codes, learned on a sample
    add_shard(..., k)     piece-00000.faiss ...      the codes of one shard of vectors
    merge(...)            index.faiss index.ivfdata  all pieces, searched through a memory map
                          index.json                 its kind, and its recall of exact search

Documents are known by their rows in the vectors. With `pairs_only`, only documents with both a text
and an image are in the index; the others keep their rows.
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

TRAINED = "trained.faiss"
INDEX = "index.faiss"
DATA = "index.ivfdata"
FIGURES = "index.json"
ADDED = "added.arrow"
"""Documents that were added to a finished bank."""
HNSW_FROM = 16_384
"""From this many lists on, the nearest centres are looked up in a graph instead of one by one."""
PQ_CODES = 256
"""Codes of a piece of a vector: one byte."""


@dataclass(kw_only=True)
class IndexConfig:
    """How a memory bank is searched."""

    exact_below: NonNegativeInt = 200_000
    """Banks of fewer documents are held in memory and searched exactly."""
    code_bytes: PositiveInt = 64
    """Bytes of a document's product-quantised code;
    it must divide the size of the encoder's embedding."""
    lists: PositiveInt | None = None
    """Inverted lists; None: a power of two near 4 * sqrt(documents)."""
    rescored: PositiveInt = 256
    """Best candidates by code that are then ordered by their exact vectors; a search for more
    documents orders as many as it asks for."""
    recall_target: Probability = 0.95
    """As many lists are probed as bring this recall@2 of exact search, both by text and by image,
    or all lists if that is not enough. A query's own document does not count."""
    recall_queries: PositiveInt = 1000
    """Documents whose texts, and as many whose images, are the queries that measure it."""


def lists_for(documents: int, config: IndexConfig) -> int:
    """Number of inverted lists."""
    return min(documents, config.lists or 2 ** round(math.log2(4 * math.sqrt(documents))))


def is_exact(documents: int, config: IndexConfig) -> bool:
    """Whether a bank of this many documents is searched exactly; below 256, where a code could not
    be learned, it always is."""
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
    """Learn the lists and the codes, unless that is done or the bank is searched exactly.

    Raises:
        UserError: for code_bytes that do not divide the vectors' width.
    """
    # Counting the documents to index reads all vectors; if even all of them are few, it need not.
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

    # FAISS would also reorder the codes, which takes seconds for each byte of one, for a filter by
    # Hamming distance that is not used here.
    index.do_polysemous_training = False

    # The sample. FAISS asks for 39 vectors a list, and as many for each of the 256 codes.
    wanted = min(len(searched), max(64 * lists, 2**18))
    chosen = np.random.default_rng(seed).choice(len(searched), wanted, replace=False)
    rows = searched[np.sort(chosen)]
    sample = [vectors.parts(some).mean() for some in np.array_split(rows, 64)]

    index.cp.seed = index.pq.cp.seed = wrapped(seed + 1, bits=31)
    train_index(index, np.concatenate(sample))
    _write(index, folder / TRAINED)


def add_shard(
    vectors: VectorShards, number: int, folder: Path, *, pairs_only: bool = False
) -> None:
    """Write the piece of a trained index that holds one shard's vectors, unless it exists.

    Without a trained index the bank is searched exactly, and there are no pieces.
    """
    path = _piece(folder, number)
    if path.is_file() or not (folder / TRAINED).is_file():
        return

    parts = vectors.shard(number)
    indexed = parts.searched(pairs_only)
    trained = _opened(folder / TRAINED)
    rows = vectors.first(number) + indexed
    _write(with_vectors(trained, parts.mean()[indexed], rows), path)


def merge(
    vectors: VectorShards,
    folder: Path,
    config: IndexConfig,
    seed: int,
    *,
    pairs_only: bool = False,
) -> None:
    """Merge the pieces on disk, measure the recall, and write index.json."""
    start = time.perf_counter()
    figures: dict[str, Any] = {
        "documents": len(vectors),
        "pairs_only": pairs_only,
        "width": vectors.width,
        "config": asdict(config),
    }

    # Exact search needs no files but the vectors.
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

    # How many lists to probe is measured on the finished index.
    index = read_index(folder)
    nprobe, recall = lists_to_probe(
        CodeSearch(Searcher(index), vectors, index.nlist, config.rescored),
        target=config.recall_target,
        queries=config.recall_queries,
        seed=seed,
        pairs_only=pairs_only,
    )

    on_disk = (folder / INDEX).stat().st_size + (folder / DATA).stat().st_size
    figures |= {
        "kind": "ivf_pq",
        "vectors": index.ntotal,
        "lists": index.nlist,
        "nprobe": nprobe,
        "recall": recall,
        "bytes_per_document": on_disk / index.ntotal,
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
    """Write an index, whole or not at all."""
    with atomic(path, shared=True) as partial:
        import_faiss().write_index(index, str(partial))


def read_index(folder: Path) -> Any:
    """The merged index, with its lists mapped into memory."""
    check_readable(folder / DATA)
    try:
        with _quiet():
            return _opened(folder / INDEX, import_faiss().IO_FLAG_ONDISK_SAME_DIR)
    except RuntimeError as error:
        raise UserError(
            f"{folder / INDEX} or {DATA} beside it is damaged; make the index again with redo=index"
        ) from error


def _opened(path: Path, flags: int = 0) -> Any:
    """Open an index that FAISS wrote. Raises UserError for a file that this user may not read."""
    check_readable(path)
    return import_faiss().read_index(str(path), flags)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what FAISS prints to the process's standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
