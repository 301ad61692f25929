"""The memory bank's index beside exact search and autofaiss, which clip-retrieval builds upon.

    # One million documents of 512 dimensions, about 10 minutes.
    python benchmarks/index.py

    python benchmarks/index.py --documents 200000

Documents are points of a 64-dimensional mixture of 2,000 broad, overlapping clusters. Each becomes
a vector of a text and one of an image, with noise of their own. Queries are texts of documents with
more noise. Recall is against exact search over the means of a document's two vectors.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cm3leon.doctor.data import WIDTH, timed_index, unit, write_vectors
from cm3leon.retrievers.bank import Bank
from cm3leon.retrievers.index import IndexConfig
from cm3leon.retrievers.recall import recall_at
from cm3leon.retrievers.search import exact_search
from cm3leon.retrievers.vectors import VectorShards

QUERIES = 1024

Search = Callable[[np.ndarray], np.ndarray]
"""Rows (Q, 10) of the documents found for queries (Q, D)."""


def rate(search: Search, queries: np.ndarray, batch: int) -> tuple[np.ndarray, float]:
    """The rows found, and queries a second after one batch that is not counted."""
    search(queries[:batch])
    start = time.perf_counter()
    found = [search(queries[first : first + batch]) for first in range(0, len(queries), batch)]
    return np.concatenate(found), len(queries) / (time.perf_counter() - start)


def row(
    name: str, build: float, size: float, search: Search, queries: np.ndarray, exact: np.ndarray
) -> None:
    """Measure an index and print its row.

    Args:
        build: seconds that building it took.
        size: bytes for each document.
        exact: the right rows (Q, 10) for the queries (Q, D).
    """
    found, batched = rate(search, queries, 64)
    _, single = rate(search, queries[:64], 1)
    recalls = " | ".join(f"{recall_at(exact, found, k):.3f}" for k in (2, 10))
    print(
        f"| {name} | {build:,.0f} | {size:,.0f} | {batched:,.0f} | {single:,.0f} | {recalls} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    # After the options, so that `--help` needs no faiss.
    import faiss

    faiss.omp_set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        vectors = write_vectors(Path(place) / "vectors", options.documents)
        rng = np.random.default_rng(2)
        chosen = rng.choice(options.documents, QUERIES, replace=False)
        texts = vectors.parts(chosen).text_BD
        queries = unit(texts + 0.02 * rng.standard_normal(texts.shape, dtype=np.float32))

        start = time.perf_counter()
        exact = exact_search(vectors, queries, 10)
        exact_rate = QUERIES / (time.perf_counter() - start)
        print(f"{options.documents:,} documents of {WIDTH} dimensions, ", end="")
        print(f"{QUERIES} queries, {options.threads} threads; ")
        print(f"exact search through the shards on disk: {exact_rate:,.0f} queries/s\n")
        print("| index | build, s | bytes a document | queries/s, 64 at once ", end="")
        print("| one by one | recall@2 | recall@10 |\n|---|---|---|---|---|---|---|", flush=True)

        means = np.concatenate([vectors.shard(number).mean() for number in range(vectors.count)])
        matrix = torch.from_numpy(means)

        def matmul(some: np.ndarray) -> np.ndarray:
            return (torch.from_numpy(some) @ matrix.T).topk(10).indices.numpy()

        # The product of all documents is slow, so a quarter of the queries has to do.
        row("torch matmul, float32", 0, 4 * WIDTH, matmul, queries[:256], exact[:256])
        ours(vectors, Path(place), queries, exact)
        peers(means, Path(place), options, queries, exact)


def ours(vectors: VectorShards, place: Path, queries: np.ndarray, exact: np.ndarray) -> None:
    """Build the memory bank's index, even where few documents would be searched exactly."""
    folder = place / "index"
    folder.mkdir()
    config = IndexConfig(exact_below=0)
    times = timed_index(vectors, folder, config)
    figures = json.loads((folder / "index.json").read_text())
    bank = Bank(vectors.folder, folder)

    name = (
        f"ours: IVF{figures['lists']},PQ{config.code_bytes}, nprobe {figures['nprobe']}, "
        f"{config.rescored} rescored (train {times.train:.0f} s, add {times.add:.0f} s, "
        f"merge and recall {times.merge:.0f} s)"
    )
    size = figures["bytes_per_document"]
    row(name, sum(times), size, lambda some: bank.search(some, 10), queries, exact)


def peers(
    means: np.ndarray,
    place: Path,
    options: argparse.Namespace,
    queries: np.ndarray,
    exact: np.ndarray,
) -> None:
    """Let autofaiss choose an index that may be as large as ours, 80 bytes a document."""
    try:
        from autofaiss import build_index
    except ImportError:
        print("| autofaiss | not installed | | | | | |")
        return
    import faiss

    # autofaiss 2.18 gives this constructor's arguments by name, and faiss 1.15 takes them by
    # position only.
    by_position = faiss.OPQMatrix
    faiss.OPQMatrix = lambda d, M, d2: by_position(d, M, d2)
    memory = options.documents * 80
    start = time.perf_counter()
    index, infos = build_index(
        means,
        save_on_disk=False,
        metric_type="ip",
        max_index_memory_usage=f"{memory // 2**20}MB",
        current_memory_available="10GB",
        nb_cores=options.threads,
        verbose=logging.ERROR,
    )
    built = time.perf_counter() - start

    path = place / "autofaiss.index"
    faiss.write_index(index, str(path))
    name = (
        f"autofaiss, at most {memory // options.documents} bytes a document: {infos['index_key']}"
    )
    size = path.stat().st_size / options.documents
    row(name, built, size, lambda some: index.search(some, 10)[1], queries, exact)


if __name__ == "__main__":
    main()
