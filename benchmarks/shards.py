"""Token shards against what else such documents could be kept in: writing, size, reading in order and at random.

    python benchmarks/shards.py

Documents are 16 text tokens and about 1,024 codes of 16 bits. Every format is read in one process from a warm cache,
three times, the best counts. Ours compares a checksum of every document it reads; the others check nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import logging
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cm3leon.data.shards import shard_path, write_plan
from cm3leon.data.token_shards import Tokenizers, TokenShards, finish_tokens, write_token_shard
from cm3leon.types import TokenDocument, TokenSegment

TOKENIZERS = Tokenizers(text="text", image="image", text_size=56_320, image_size=8_192, sentinels=512)
SHARD = 4096


class Format(NamedTuple):
    """How documents are written into a folder, and read: all in order, and those at some places."""

    name: str
    write: Callable[[Path, list[np.ndarray]], None]
    in_order: Callable[[Path], Iterable[np.ndarray]]
    at: Callable[[Path, np.ndarray], Iterable[np.ndarray]] | None
    properties: str


# ------------------------------------------------------------------------------------------------ ours


def write_ours(folder: Path, documents: list[np.ndarray]) -> None:
    write_plan(folder, {"tokenizers": asdict(TOKENIZERS)})
    count = -(-len(documents) // SHARD)
    for number in range(count):
        shard = [
            TokenDocument(str(place), (TokenSegment("text", ids[:16]), TokenSegment("image", ids[16:])))
            for place, ids in enumerate(documents[number * SHARD : (number + 1) * SHARD])
        ]
        write_token_shard(shard_path(folder, number, count), shard, TOKENIZERS)
    finish_tokens(folder, count)


def ours_at(folder: Path, places: np.ndarray) -> Iterator[np.ndarray]:
    shards = TokenShards(folder, TOKENIZERS)
    for place in places.tolist():
        yield from (segment.ids_T for segment in shards.document(place).segments)


def ours_in_order(folder: Path) -> Iterator[np.ndarray]:
    return ours_at(folder, np.arange(len(TokenShards(folder))))


# ------------------------------------------------------------------------------------------------ peers


def write_memmap(folder: Path, documents: list[np.ndarray]) -> None:
    np.concatenate(documents).tofile(folder / "ids.bin")
    np.save(folder / "ends.npy", np.cumsum([0, *map(len, documents)]))


def memmap_at(folder: Path, places: np.ndarray | None) -> Iterator[np.ndarray]:
    ids, ends = np.memmap(folder / "ids.bin", np.uint16, "r"), np.load(folder / "ends.npy")
    for place in range(len(ends) - 1) if places is None else places.tolist():
        yield ids[ends[place] : ends[place + 1]].astype(np.int64)


def write_litdata(folder: Path, documents: list[np.ndarray]) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="8MB")
    for place, ids in enumerate(documents):
        writer[place] = ids
    writer.done()
    writer.merge()


def litdata_at(folder: Path, places: np.ndarray | None) -> Iterator[np.ndarray]:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder))
    for item in dataset if places is None else map(dataset.__getitem__, places.tolist()):
        yield np.asarray(item).astype(np.int64)


def write_webdataset(folder: Path, documents: list[np.ndarray]) -> None:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for place, ids in enumerate(documents):
            file = io.BytesIO()
            np.save(file, ids)
            info = tarfile.TarInfo(f"{place:08d}.npy")
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)


def webdataset_in_order(folder: Path) -> Iterator[np.ndarray]:
    import webdataset

    for item in webdataset.WebDataset(str(folder / "0.tar"), shardshuffle=False).decode():
        yield item["npy"].astype(np.int64)


def write_datasets(folder: Path, documents: list[np.ndarray]) -> None:
    import datasets

    datasets.Dataset.from_dict({"ids": documents}).save_to_disk(folder / "saved")


def datasets_at(folder: Path, places: np.ndarray | None) -> Iterator[np.ndarray]:
    import datasets

    saved = datasets.load_from_disk(str(folder / "saved")).with_format("numpy")
    for place in range(len(saved)) if places is None else places.tolist():
        yield saved[place]["ids"].astype(np.int64)


FORMATS = (
    Format(
        "ours", write_ours, ours_in_order, ours_at, "a document's and a shard's checksum; any order; whole or absent"
    ),
    Format("numpy", write_memmap, lambda f: memmap_at(f, None), memmap_at, "none; any order"),
    Format("litdata", write_litdata, lambda f: litdata_at(f, None), litdata_at, "none; any order in its chunks"),
    Format("webdataset", write_webdataset, webdataset_in_order, None, "none; in order only, no state"),
    Format("datasets", write_datasets, lambda f: datasets_at(f, None), datasets_at, "none; any order"),
)
MISSING = ("mosaicml-streaming", "grain")


def tokens_per_second(read: Callable[[], Iterable[np.ndarray]]) -> float:
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        tokens = sum(len(ids) for ids in read())
        best = max(best, tokens / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=24_576)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    rng = np.random.default_rng(0)
    lengths = rng.integers(1030, 1061, options.documents)
    documents = [rng.integers(0, 64_512, length, dtype=np.uint16) for length in lengths]
    places = rng.permutation(options.documents)
    print(f"{options.documents:,} documents, {lengths.sum():,} tokens of 16 bits\n")
    print("| format | written, MB/s | bytes a token | in order, M tokens/s | at random, M tokens/s | checks; order |")
    print("|---|---|---|---|---|---|")
    for format_ in FORMATS:
        version = "" if format_.name == "ours" else _version(format_.name)
        if version is None:
            print(f"| {format_.name} | not installed | | | | |")
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            start = time.perf_counter()
            format_.write(folder, documents)
            os.sync()
            speed = 2 * lengths.sum() / (time.perf_counter() - start) / 1e6
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / lengths.sum()
            in_order = tokens_per_second(lambda: format_.in_order(folder)) / 1e6  # noqa: B023
            at = "-"
            if format_.at:
                at = f"{tokens_per_second(lambda: format_.at(folder, places)) / 1e6:.0f}"  # noqa: B023
            name = f"{format_.name} {version}".strip()
            print(f"| {name} | {speed:.0f} | {size:.3f} | {in_order:.0f} | {at} | {format_.properties} |", flush=True)
    for name in MISSING:
        if _version(name) is None:
            print(f"| {name} | not installed | | | | |")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
