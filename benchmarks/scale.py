"""The constants behind docs/scale.md, measured on one core, and what they make of a corpus of any size.

    python benchmarks/scale.py                             # for 340 million documents
    python benchmarks/scale.py --documents 10000000
    python benchmarks/scale.py --search 444 --add 16667    # queries and vectors a second and core, from index.py
    python benchmarks/scale.py --candidate 18.8           # µs for the vectors of a candidate, from rescoring.py

Documents are a caption of about 60 characters and a JPEG of 256 x 256 pixels, 1,024 codes of 16 bits. The encoder is
CLIP ViT-B/32 with random weights, the image tokenizer the registered `vq` at the paper's geometry: speed does not
depend on the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from reading import photograph
from torch.utils.flop_counter import FlopCounterMode

from cm3leon.data.images import decode_image, square
from cm3leon.data.shards import shard_path, write_plan
from cm3leon.data.token_shards import Tokenizers, TokenShards, finish_tokens, write_token_shard
from cm3leon.registry import IMAGE_TOKENIZERS, RETRIEVERS, discover
from cm3leon.retrievers.bank import Bank
from cm3leon.retrievers.index import IndexConfig, lists_for, merge
from cm3leon.retrievers.neighbours import neighbours_of
from cm3leon.retrievers.parts import Parts
from cm3leon.retrievers.vectors import VectorShards, finish_vectors, write_vector_shard
from cm3leon.types import TokenDocument, TokenSegment

TEXT_TOKENS, CODES, WIDTH, VARIANTS = 16, 1024, 512, 4
A100_BF16, UTILISATION = 312e12, 0.4
"""Peak FLOP/s of an A100 (NVIDIA's data sheet), and the share of it that is assumed, not measured."""


def seconds(act: Callable[[], object], repeats: int = 3) -> float:
    """The best of some runs, after one that is not timed."""
    act()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return min(times)


def flops(act: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=340_000_000)
    parser.add_argument(
        "--search", type=float, default=0.0, help="queries/s of one core, from benchmarks/index.py"
    )
    parser.add_argument(
        "--add", type=float, default=0.0, help="vectors added a second and core, from there"
    )
    parser.add_argument(
        "--candidate",
        type=float,
        default=0.0,
        help="microseconds to read the vectors of a candidate, from benchmarks/rescoring.py",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random
    discover()
    rng = np.random.default_rng(0)
    n = options.documents

    jpeg = photograph(rng)
    decode = seconds(lambda: [square(decode_image(jpeg, 10**8), 256) for _ in range(50)]) / 50

    retriever = RETRIEVERS.build({"name": "dense"})
    encoder = retriever.encoder.eval()
    images = rng.integers(0, 256, (8, 256, 256, 3), dtype=np.uint8)
    texts = ["a photograph of a thing in some place, seen from not too far away"] * 8
    clip_image = seconds(lambda: encoder.encode_images(images)) / 8
    clip_text = seconds(lambda: encoder.encode_texts(texts)) / 8
    clip_flops = (
        flops(lambda: encoder.encode_images(images)) + flops(lambda: encoder.encode_texts(texts))
    ) / 8

    tokenizer = IMAGE_TOKENIZERS.build(
        {
            "name": "vq",
            "image_size": 256,
            "downsampling": 8,
            "codebook_size": 8192,
            "code_dim": 256,
            "channels": 128,
        }
    ).eval()
    codes = seconds(lambda: tokenizer.encode(images[:2]), 1) / 2
    codes_flops = flops(lambda: tokenizer.encode(images[:1]))

    count = 4096
    documents = [
        TokenDocument(
            f"00000.tar/{row:08d}",
            (
                TokenSegment("text", rng.integers(4, 56_320, TEXT_TOKENS)),
                TokenSegment("image", rng.integers(56_320, 64_512, CODES)),
            ),
        )
        for row in range(count)
    ]
    made_by = Tokenizers("text", "image", 56_320, 8_192, 512)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_plan(folder, {"tokenizers": vars(made_by)})
        path = shard_path(folder, 0, 1)
        write = seconds(lambda: write_token_shard(path, documents, made_by)) / count
        finish_tokens(folder, 1)
        size = path.stat().st_size / count
        shards = TokenShards(folder, made_by)
        read = seconds(lambda: [shards.document(row) for row in range(count)]) / count
    digest = seconds(lambda: hashlib.sha256(bytes(10**8))) / 1e8

    vectors = Parts(
        *(unit(rng.standard_normal((20_000, WIDTH), dtype=np.float32)) for _ in range(2))
    )
    header = {"encoder": "", "width": WIDTH}
    with tempfile.TemporaryDirectory() as place:
        index = Path(place) / "index"
        index.mkdir()
        write_plan(Path(place), header)
        ids = [str(row) for row in range(20_000)]
        write_vector_shard(shard_path(Path(place), 0, 1), ids, vectors, header)
        finish_vectors(Path(place), 1)
        merge(VectorShards(Path(place)), index, IndexConfig(), seed=0)
        bank = Bank(Path(place), index)
    queries = vectors.rows(slice(0, 256))
    search = seconds(lambda: bank.search(queries.text_BD, retriever.config.candidates)) / 256
    both = seconds(lambda: neighbours_of(retriever, bank, [queries], np.arange(256), like=queries))
    strategy = both / 256 - 2 * search

    lists = lists_for(n, IndexConfig())
    per_query, per_vector = (
        1 / rate if rate else float("nan") for rate in (options.search, options.add)
    )
    # A search reads the vectors of the candidates that it orders, and of those that the strategy looks at. The rates of
    # index.py are of one shard in memory; in a corpus of many, each candidate lies in another one.
    read_candidates = IndexConfig().rescored + retriever.config.candidates
    per_query += read_candidates * (options.candidate or float("nan")) * 1e-6
    print("| constant | measured, one core |\n|---|---|")
    for name, value in (
        ("JPEG to 256 x 256 pixels", f"{1 / decode:,.0f} images/s"),
        (
            "image tokenizer, encoding",
            f"{1 / codes:,.2f} images/s, {codes_flops / 1e9:,.0f} GFLOP each",
        ),
        (
            "CLIP ViT-B/32, image and text",
            f"{1 / (clip_image + clip_text):,.1f} /s, {clip_flops / 1e9:,.1f} GFLOP each",
        ),
        ("token shard, written", f"{1 / write:,.0f} documents/s, {size:,.0f} bytes each"),
        ("token shard, read and checked", f"{(TEXT_TOKENS + CODES) / read / 1e6:,.0f} M tokens/s"),
        ("SHA-256", f"{1 / digest / 1e9:.2f} GB/s"),
        ("strategy, a document and variant", f"{1 / strategy:,.0f} /s"),
        ("search, from index.py", f"{options.search:,.0f} queries/s"),
        ("vectors added, from index.py", f"{options.add:,.0f} /s"),
        (
            f"vectors of a candidate, from rescoring.py; {read_candidates} a search",
            f"{options.candidate:,.1f} µs",
        ),
    ):
        print(f"| {name} | {value} |")

    hour = 3600
    print(
        f"\n| {n:,} documents | disk | CPU core hours | GPU hours at {UTILISATION:.0%} of an A100's peak |"
    )
    print("|---|---|---|---|")
    gpu = A100_BF16 * UTILISATION * hour
    vector_bytes, code_bytes, neighbour_bytes = (
        4 * WIDTH,
        IndexConfig().code_bytes + 8,
        4 * 4 * VARIANTS,
    )
    variants = 1 + VARIANTS
    for name, disk, cpu, accelerator in (
        ("tokens", size * n, n * (decode + write + digest * size) / hour, n * codes_flops / gpu),
        (
            "vectors",
            vector_bytes * n,
            n * (decode + digest * vector_bytes) / hour,
            n * clip_flops / gpu,
        ),
        (f"index ({lists:,} lists)", code_bytes * n, n * per_vector / hour, 0),
        (
            "neighbours",
            neighbour_bytes * n,
            n * (decode + VARIANTS * (strategy + 2 * per_query)) / hour,
            n * VARIANTS * clip_flops / gpu,
        ),
    ):
        print(f"| {name} | {disk / 1e12:.3f} TB | {cpu:,.0f} | {accelerator:,.0f} |")
    print(f"\n{variants} passes of CLIP: the document, and {VARIANTS} variants of query dropout.")


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
