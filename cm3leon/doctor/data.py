"""Time what makes a corpus ready: embedding and tokenising images, and the index of their
vectors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

from cm3leon.data.shards import shard_path, write_plan
from cm3leon.doctor.figures import Figure, attempted
from cm3leon.doctor.hardware import median_seconds
from cm3leon.registry import IMAGE_TOKENIZERS
from cm3leon.retrievers.encoder import ClipEncoder, EncoderConfig
from cm3leon.retrievers.index import IndexConfig, add_shard, merge, train
from cm3leon.retrievers.parts import Parts
from cm3leon.retrievers.vectors import VectorShards, finish_vectors, write_vector_shard

PART = "corpus"
WIDTH, LATENT, CENTRES, SHARD = 512, 64, 2_000, 50_000
HEADER = {"encoder": "simulated", "width": WIDTH}
LARGE_VQGAN = {"name": "vqgan", "image_size": 256, "codebook_size": 8192}
SMALL_VQGAN = {"name": "vqgan", "image_size": 32, "codebook_size": 64, "channels": 32,
               "multipliers": [1, 2], "attention_levels": []}  # fmt: skip


def write_vectors(folder: Path, documents: int) -> VectorShards:
    """Write the vectors of simulated documents in shards.

    A document is a point of a 64-dimensional mixture of 2,000 broad, overlapping clusters, mapped
    to 512 dimensions. Its text and its image vector are this point with noise of their own, so that
    an index has to tell near from very near, as with real captions.
    """
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, LATENT), dtype=np.float32)
    turn = rng.standard_normal((LATENT, WIDTH), dtype=np.float32)
    write_plan(folder, HEADER)
    count = -(-documents // SHARD)
    for number in range(count):
        rng = np.random.default_rng([1, number])
        rows = min(SHARD, documents - number * SHARD)

        # The order of the draws is part of the data: centres, spread, then the noise of each part.
        chosen = centres[rng.integers(CENTRES, size=rows)]
        points = chosen + 0.7 * rng.standard_normal((rows, LATENT), dtype=np.float32)
        near = unit(points @ turn)
        text = unit(near + 0.03 * rng.standard_normal(near.shape, dtype=np.float32))
        image = unit(near + 0.03 * rng.standard_normal(near.shape, dtype=np.float32))

        ids = [str(number * SHARD + row) for row in range(rows)]
        write_vector_shard(shard_path(folder, number, count), ids, Parts(text, image), HEADER)
    finish_vectors(folder, count)
    return VectorShards(folder, HEADER)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class IndexTimes(NamedTuple):
    """Seconds of the steps that make an index."""

    train: float
    add: float
    merge: float


def timed_index(vectors: VectorShards, folder: Path, config: IndexConfig) -> IndexTimes:
    """Make the index of all vectors in a folder that exists, step by step."""
    start = time.perf_counter()
    train(vectors, folder, config, seed=0)
    trained = time.perf_counter()
    for number in range(vectors.count):
        add_shard(vectors, number, folder)
    added = time.perf_counter()
    merge(vectors, folder, config, seed=0)
    return IndexTimes(trained - start, added - trained, time.perf_counter() - added)


def measure(device: torch.device, full: bool) -> Iterator[Figure]:
    """Embedding and tokenising images, and decoding codes to images."""
    batch, side, repeats, settings = 4, 32, 2, SMALL_VQGAN
    if full:
        batch, side, repeats, settings = 256, 256, 5, LARGE_VQGAN
    images_BHWC = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)

    def embedding() -> tuple[float, str]:
        config = EncoderConfig() if full else EncoderConfig(architecture=None)
        encoder = ClipEncoder(config).to(device).eval()
        taken = median_seconds(lambda: encoder.encode_images(images_BHWC), device, repeats)
        return batch / taken, f"{config.architecture or 'a small CLIP'}, random weights"

    yield from attempted(PART, "embedding images", "images/s", embedding)

    # Each measurement builds its own tokenizer: one that fails takes no other with it.
    how = f"VQGAN of {side} x {side} pixels, random weights, float32"

    def tokenizing() -> tuple[float, str]:
        torch.manual_seed(0)
        tokenizer = IMAGE_TOKENIZERS.build(settings).to(device).ready()
        taken = median_seconds(lambda: tokenizer.encode(images_BHWC), device, repeats)
        return batch / taken, how

    yield from attempted(PART, "tokenising images", "images/s", tokenizing)

    def decoding() -> tuple[float, str]:
        torch.manual_seed(0)
        tokenizer = IMAGE_TOKENIZERS.build(settings).to(device).ready()
        codes_BN = np.zeros((batch, tokenizer.grid**2), np.int64)
        taken = median_seconds(lambda: tokenizer.decode(codes_BN), device, repeats)
        return batch / taken, how

    yield from attempted(PART, "codes to images", "images/s", decoding)


def measure_index(device: torch.device, full: bool) -> Iterator[Figure]:
    """Training, filling and merging an index; FAISS uses the GPUs by itself if it is built for
    them."""
    documents, code_bytes, queries = (500_000, 64, 1000) if full else (600, 4, 50)
    config = IndexConfig(exact_below=0, code_bytes=code_bytes, recall_queries=queries)
    with TemporaryDirectory() as folder:
        vectors = write_vectors(Path(folder) / "vectors", documents)
        (Path(folder) / "index").mkdir()
        found: list[IndexTimes] = []

        def training() -> tuple[float, str]:
            found.append(timed_index(vectors, Path(folder) / "index", config))
            return found[0].train, f"{documents:,} documents of {WIDTH} dimensions"

        # One call makes all three figures; if it fails, the first one says why.
        yield from attempted("index", "index: training", "s", training)
        for times in found:
            yield Figure("index", "index: adding", documents / times.add, "documents/s")
            yield Figure("index", "index: merging and recall", times.merge, "s")
