"""The constants behind docs/scale.md, measured on one core, and a corpus's needs that follow.

    # For 340 million documents, with what other benchmarks measured: queries and vectors a second
    # and core (index.py), and microseconds for the vectors of a candidate (rescoring.py). Hours
    # that depend on one that is not given are nan.
    python benchmarks/scale.py --search 444 --add 16667 --candidate 18.8

    python benchmarks/scale.py --documents 10000000

A document is a caption of about 60 characters and a JPEG of 256 x 256 pixels, 1,024 codes of 16
bits. The encoder is CLIP ViT-B/32 and the image tokenizer the registered `vq` at the paper's size,
both with random weights, on which their speed does not depend.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from reading import photograph
from torch.utils.flop_counter import FlopCounterMode

from cm3leon.data.images import decode_image, square
from cm3leon.data.shards import shard_path, write_plan
from cm3leon.data.token_shards import Tokenizers, TokenShards, finish_tokens, write_token_shard
from cm3leon.registry import IMAGE_TOKENIZERS, RETRIEVERS, discover
from cm3leon.retrievers.bank import Bank
from cm3leon.retrievers.base import Retriever
from cm3leon.retrievers.index import IndexConfig, lists_for, merge
from cm3leon.retrievers.neighbours import neighbours_of
from cm3leon.retrievers.parts import Parts
from cm3leon.retrievers.vectors import VectorShards, finish_vectors, write_vector_shard
from cm3leon.types import TokenDocument, TokenSegment

TEXT_TOKENS, CODES, WIDTH, VARIANTS = 16, 1024, 512, 4
SHARD = 4096
"""Documents of the shard that is written and read."""
INDEXED = 20_000
"""Documents of the index that is searched."""
HOUR = 3600
A100_BF16, UTILISATION = 312e12, 0.4
"""Peak FLOP/s of an A100 (NVIDIA's data sheet), and the share of it that is reached: an assumption,
not a measurement."""


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
    """Floating-point operations of one run."""
    with FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops()


class Networks(NamedTuple):
    """Seconds and FLOPs of the networks for one document."""

    clip_image: float
    clip_text: float
    clip_flops: float
    """Of the encoder for image and text together."""
    codes: float
    codes_flops: float


class Shard(NamedTuple):
    """Seconds that a document of a token shard takes, and its bytes."""

    write: float
    read: float
    """From a warm cache."""
    size: float
    """Bytes of a document."""


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

    # open_clip warns that the weights are random.
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    discover()
    rng = np.random.default_rng(0)
    jpeg = photograph(rng)
    decode = seconds(lambda: [square(decode_image(jpeg, 10**8), 256) for _ in range(50)]) / 50
    retriever = RETRIEVERS.build({"name": "dense"})
    networks = measure_networks(retriever, rng)
    shard = measure_shard(rng)
    digest = seconds(lambda: hashlib.sha256(bytes(10**8))) / 1e8
    strategy = measure_strategy(retriever, rng)

    # A search reads the vectors of the candidates that it orders, and of those that the strategy
    # looks at.
    read_candidates = IndexConfig().rescored + retriever.config.candidates
    print("| constant | measured, one core |\n|---|---|")
    tokens_rate = (TEXT_TOKENS + CODES) / shard.read / 1e6
    for name, value in (
        ("JPEG to 256 x 256 pixels", f"{1 / decode:,.0f} images/s"),
        (
            "image tokenizer, encoding",
            f"{1 / networks.codes:,.2f} images/s, {networks.codes_flops / 1e9:,.0f} GFLOP each",
        ),
        (
            "CLIP ViT-B/32, image and text",
            f"{1 / (networks.clip_image + networks.clip_text):,.1f} /s, "
            f"{networks.clip_flops / 1e9:,.1f} GFLOP each",
        ),
        (
            "token shard, written",
            f"{1 / shard.write:,.0f} documents/s, {shard.size:,.0f} bytes each",
        ),
        ("token shard, read and checked", f"{tokens_rate:,.0f} M tokens/s"),
        ("SHA-256", f"{1 / digest / 1e9:.2f} GB/s"),
        ("strategy, a document and variant", f"{1 / strategy:,.0f} /s"),
        ("search, from index.py", given(options.search, "{:,.0f} queries/s")),
        ("vectors added, from index.py", given(options.add, "{:,.0f} /s")),
        (
            f"vectors of a candidate, from rescoring.py; {read_candidates} a search",
            given(options.candidate, "{:,.1f} µs"),
        ),
    ):
        print(f"| {name} | {value} |")

    print_corpus(options, decode, networks, shard, digest, strategy, read_candidates)


def given(value: float, text: str) -> str:
    """The value of an option as the table shows it."""
    return text.format(value) if value else "not given"


def measure_networks(retriever: Retriever, rng: np.random.Generator) -> Networks:
    """Measure the encoder and the image tokenizer, each on a few documents at once."""
    encoder = retriever.encoder.eval()
    images = rng.integers(0, 256, (8, 256, 256, 3), dtype=np.uint8)
    texts = ["a photograph of a thing in some place, seen from not too far away"] * 8
    clip_image = seconds(lambda: encoder.encode_images(images)) / 8
    clip_text = seconds(lambda: encoder.encode_texts(texts)) / 8
    image_flops = flops(lambda: encoder.encode_images(images))
    text_flops = flops(lambda: encoder.encode_texts(texts))

    # The registered tokenizer at the paper's size: 32 x 32 codes of 8192.
    settings = {
        "name": "vq",
        "image_size": 256,
        "downsampling": 8,
        "codebook_size": 8192,
        "code_dim": 256,
        "channels": 128,
    }
    tokenizer = IMAGE_TOKENIZERS.build(settings).eval()
    codes = seconds(lambda: tokenizer.encode(images[:2]), 1) / 2
    codes_flops = flops(lambda: tokenizer.encode(images[:1]))
    return Networks(clip_image, clip_text, (image_flops + text_flops) / 8, codes, codes_flops)


def measure_shard(rng: np.random.Generator) -> Shard:
    """Measure how a token shard is written, and read with its checksums."""
    documents = []
    for row in range(SHARD):
        text = TokenSegment("text", rng.integers(4, 56_320, TEXT_TOKENS))
        image = TokenSegment("image", rng.integers(56_320, 64_512, CODES))
        documents.append(TokenDocument(f"00000.tar/{row:08d}", (text, image)))

    made_by = Tokenizers("text", "image", 56_320, 8_192, 512)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_plan(folder, {"tokenizers": vars(made_by)})
        path = shard_path(folder, 0, 1)
        write = seconds(lambda: write_token_shard(path, documents, made_by)) / SHARD

        # Reading compares each document with its checksum.
        finish_tokens(folder, 1)
        size = path.stat().st_size / SHARD
        shards = TokenShards(folder, made_by)
        read = seconds(lambda: [shards.document(row) for row in range(SHARD)]) / SHARD
    return Shard(write, read, size)


def measure_strategy(retriever: Retriever, rng: np.random.Generator) -> float:
    """Seconds in which neighbours of a document are chosen among those that searches found."""
    text_BD = unit(rng.standard_normal((INDEXED, WIDTH), dtype=np.float32))
    image_BD = unit(rng.standard_normal((INDEXED, WIDTH), dtype=np.float32))
    vectors = Parts(text_BD, image_BD)
    header = {"encoder": "", "width": WIDTH}
    with tempfile.TemporaryDirectory() as place:
        index = Path(place) / "index"
        index.mkdir()
        write_plan(Path(place), header)
        ids = [str(row) for row in range(INDEXED)]
        write_vector_shard(shard_path(Path(place), 0, 1), ids, vectors, header)
        finish_vectors(Path(place), 1)
        merge(VectorShards(Path(place)), index, IndexConfig(), seed=0)
        bank = Bank(Path(place), index)

        # All of it less its two searches, by text and by image, whose time depends on the corpus.
        # The bank opens its files when they are first read, so they have to be there until then.
        queries, rows = vectors.rows(slice(0, 256)), np.arange(256)
        search = seconds(lambda: bank.search(queries.text_BD, retriever.config.candidates))
        both = seconds(lambda: neighbours_of(retriever, bank, [queries], rows, like=queries))
    return (both - 2 * search) / 256


def print_corpus(
    options: argparse.Namespace,
    decode: float,
    networks: Networks,
    shard: Shard,
    digest: float,
    strategy: float,
    read_candidates: int,
) -> None:
    """Print what each stage takes for the corpus of so many documents.

    Args:
        decode: seconds to decode an image.
        digest: seconds to hash a byte.
        strategy: seconds to choose the neighbours of a document.
        read_candidates: rows whose vectors a search reads.
    """
    n = options.documents
    print(f"\n| {n:,} documents | disk | CPU core hours ", end="")
    print(f"| GPU hours at {UTILISATION:.0%} of an A100's peak |\n|---|---|---|---|")

    # Rates that were not given are unknown, and so are the hours that follow from them.
    per_query = 1 / options.search if options.search else float("nan")
    per_vector = 1 / options.add if options.add else float("nan")

    # The rates of index.py are of one shard in memory. In a corpus of many, each candidate lies in
    # another one.
    per_query += read_candidates * (options.candidate or float("nan")) * 1e-6

    # Vectors have 16 bits; a variant has four neighbours of 32 bits.
    gpu = A100_BF16 * UTILISATION * HOUR
    vector_bytes = 4 * WIDTH
    code_bytes = IndexConfig().code_bytes + 8
    neighbour_bytes = 4 * 4 * VARIANTS
    tokens = decode + shard.write + digest * shard.size
    vectors = decode + digest * vector_bytes
    neighbours = decode + VARIANTS * (strategy + 2 * per_query)
    for name, disk, cpu, accelerator in (
        ("tokens", shard.size, tokens, networks.codes_flops),
        ("vectors", vector_bytes, vectors, networks.clip_flops),
        (f"index ({lists_for(n, IndexConfig()):,} lists)", code_bytes, per_vector, 0),
        ("neighbours", neighbour_bytes, neighbours, VARIANTS * networks.clip_flops),
    ):
        gpu_hours = n * accelerator / gpu
        print(f"| {name} | {n * disk / 1e12:.3f} TB | {n * cpu / HOUR:,.0f} | {gpu_hours:,.0f} |")
    passes = 1 + VARIANTS
    print(f"\n{passes} passes of CLIP: the document, and {VARIANTS} variants of query dropout.")


def unit(vectors: np.ndarray) -> np.ndarray:
    """The rows divided by their lengths."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
