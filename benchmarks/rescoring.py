"""Reading the vectors of candidates from shards on disk, as a search does for a batch of queries.

    python benchmarks/rescoring.py --documents 10000000 --folder /scratch/rescoring

Shards of 10,000 and of 100,000 documents hold the same vectors: 512 numbers of 16 bits for the
text, and as many for the image. Rows are random. Those of a real search are no closer together,
since a corpus is in no order of its vectors.

A batch of 256 queries orders 256 candidates each by their vectors, 65,536 rows of 340 million.
Here a batch has fewer rows in proportion to the documents, so that as many fall into each shard.

Each layout is read twice: with maps for all shards, and with maps for 24 % of them, the share that
8,191 maps of a process are of 34,000 shards (docs/scale.md). Files are dropped from the page cache
first (`cold`), then the same rows are read once more (`warm`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cm3leon.data.shards as shards_module
from cm3leon.data.shards import shard_path, write_plan
from cm3leon.retrievers.index import IndexConfig
from cm3leon.retrievers.parts import Parts
from cm3leon.retrievers.vectors import VectorShards, finish_vectors, write_vector_shard
from cm3leon.stages.sharing import BATCH

WIDTH = 512
CANDIDATES, CORPUS = BATCH * IndexConfig().rescored, 340_000_000
"""Rows that a batch of queries reads in a corpus of so many documents."""
FEW_MAPS = (65_530 // 8) / 34_000
"""Share of 34,000 shards that a process maps where Linux grants it the usual number."""


def write(folder: Path, documents: int, size: int) -> None:
    """Write a folder of vectors in shards of `size` documents.

    Every shard has the same vectors, but begins at another one. Shards that an interrupted run has
    left are kept.
    """
    rng = np.random.default_rng(0)
    text_BD = rng.standard_normal((size, WIDTH), dtype=np.float32)
    image_BD = rng.standard_normal((size, WIDTH), dtype=np.float32)
    count = documents // size
    write_plan(folder, {"width": WIDTH})
    for number in tqdm(range(count), desc=f"shards of {size:,}", unit="shard"):
        path = shard_path(folder, number, count)
        if not path.is_file():
            parts = Parts(np.roll(text_BD, number, axis=0), np.roll(image_BD, number, axis=0))
            ids = [f"{number}/{row}" for row in range(size)]
            write_vector_shard(path, ids, parts, {"width": WIDTH})
    finish_vectors(folder, count)


def drop(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    # Pages that are not on the disk yet would stay.
    os.sync()
    for path in folder.glob("*.arrow"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_a_candidate(folder: Path, batches: int, seed: int) -> tuple[float, float]:
    """Mean seconds to read the two vectors of a candidate: of time, and of the processor.

    The call has a reader of its own, whose maps end with it, since pages that a process maps cannot
    be dropped from the cache.
    """
    # A first row opens the folder, which is not timed.
    vectors = VectorShards(folder, verify=False)
    vectors.parts(np.zeros((1, 1), np.int64))

    rng = np.random.default_rng(seed)
    count = max(1, round(CANDIDATES * len(vectors) / CORPUS))
    begun, cpu_begun = time.perf_counter(), time.process_time()
    for _ in range(batches):
        vectors.parts(rng.integers(0, len(vectors), count))
    took, cpu_took = time.perf_counter() - begun, time.process_time() - cpu_begun

    return took / (batches * count), cpu_took / (batches * count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk that is measured")
    parser.add_argument("--batches", type=int, default=40)
    options = parser.parse_args()

    print("| documents a shard | shards | maps for | page cache ", end="")
    print("| µs a candidate | of them on the CPU |\n|---|---|---|---|---|---|")
    for size in (10_000, 100_000):
        folder = options.folder / str(size)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, options.documents, size)
        count = options.documents // size

        few = max(1, int(FEW_MAPS * count))
        for name, maps in (("all", count), (f"{FEW_MAPS:.0%}", few)):
            # Linux grants this process as many maps as ever; only the reader believes otherwise.
            shards_module.most_open = lambda maps=maps: maps
            for cache in ("cold", "warm"):
                if cache == "cold":
                    drop(folder)
                took, cpu_took = seconds_a_candidate(folder, options.batches, seed=0)
                times = f"{1e6 * took:.1f} | {1e6 * cpu_took:.1f}"
                print(f"| {size:,} | {count:,} | {name} | {cache} | {times} |", flush=True)

        # A layout of ten million documents takes 20 GB, so the next one takes its room.
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
