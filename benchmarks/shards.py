"""Token shards beside other formats for such documents: writing, size, reading in order, at random.

    python benchmarks/shards.py

Documents are 16 text tokens and about 1,024 codes of 16 bits, which are returned as 64-bit ids.
Every format is written, opened and read in one process, from a warm cache. Each figure is the best
of three passes. A format is written when its bytes are on the disk, and open when it has returned
its first document.

In the end one bit in the middle of the largest file is flipped, and all is read again. The bit is
`named` if an error names the file, and `unnoticed` if other ids come out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cm3leon.data.shards import shard_path, write_plan
from cm3leon.data.token_shards import Tokenizers, TokenShards, finish_tokens, write_token_shard
from cm3leon.types import TokenDocument, TokenSegment

TOKENIZERS = Tokenizers(
    text="text", image="image", text_size=56_320, image_size=8_192, sentinels=512
)
SHARD = 4096
"""Documents of a shard of ours."""
TEXT = 16
"""Text tokens of a document; the rest are codes."""


class Format(NamedTuple):
    """How a format is written into a folder, and read from it."""

    name: str
    write: Callable[[Path, list[np.ndarray]], None]
    in_order: Callable[[Path], Iterable[np.ndarray]]
    """Ids of all documents; a document may come in several arrays."""
    at: Callable[[Path, np.ndarray], Iterable[np.ndarray]] | None
    """Ids of the documents at some positions; None if there is no random access."""
    resume: str
    """How its reader goes on where an interrupted one stopped."""


# -------------------------------------------------------------------------------------------- ours


def write_ours(folder: Path, documents: list[np.ndarray]) -> None:
    write_plan(folder, {"tokenizers": asdict(TOKENIZERS)})
    count = -(-len(documents) // SHARD)
    for number in range(count):
        shard = []
        for position, ids in enumerate(documents[number * SHARD : (number + 1) * SHARD]):
            segments = TokenSegment("text", ids[:TEXT]), TokenSegment("image", ids[TEXT:])
            shard.append(TokenDocument(str(position), segments))
        write_token_shard(shard_path(folder, number, count), shard, TOKENIZERS)

    finish_tokens(folder, count)


def ours_at(folder: Path, positions: np.ndarray) -> Iterator[np.ndarray]:
    shards = TokenShards(folder, TOKENIZERS)
    for position in positions.tolist():
        for segment in shards.document(position).segments:
            yield segment.ids_T


def ours_in_order(folder: Path) -> Iterator[np.ndarray]:
    return ours_at(folder, np.arange(len(TokenShards(folder))))


# ------------------------------------------------------------------------------------------- peers


def write_memmap(folder: Path, documents: list[np.ndarray]) -> None:
    np.concatenate(documents).tofile(folder / "ids.bin")
    np.save(folder / "ends.npy", np.cumsum([0, *map(len, documents)]))


def memmap_at(folder: Path, positions: np.ndarray | None) -> Iterator[np.ndarray]:
    ids, ends = np.memmap(folder / "ids.bin", np.uint16, "r"), np.load(folder / "ends.npy")
    for position in range(len(ends) - 1) if positions is None else positions.tolist():
        yield ids[ends[position] : ends[position + 1]].astype(np.int64)


def write_litdata(folder: Path, documents: list[np.ndarray]) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="8MB")
    for position, ids in enumerate(documents):
        writer[position] = ids
    writer.done()
    writer.merge()


def litdata_at(folder: Path, positions: np.ndarray | None) -> Iterator[np.ndarray]:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder))
    for item in dataset if positions is None else map(dataset.__getitem__, positions.tolist()):
        yield np.asarray(item).astype(np.int64)


def write_webdataset(folder: Path, documents: list[np.ndarray]) -> None:
    import webdataset

    with webdataset.TarWriter(str(folder / "0.tar")) as tar:
        for position, ids in enumerate(documents):
            tar.write({"__key__": f"{position:08d}", "npy": ids})


def webdataset_in_order(folder: Path) -> Iterator[np.ndarray]:
    import webdataset

    for item in webdataset.WebDataset(str(folder / "0.tar"), shardshuffle=False).decode():
        yield item["npy"].astype(np.int64)


def write_datasets(folder: Path, documents: list[np.ndarray]) -> None:
    import datasets

    datasets.Dataset.from_dict({"ids": documents}).save_to_disk(folder / "saved")


def datasets_at(folder: Path, positions: np.ndarray | None) -> Iterator[np.ndarray]:
    import datasets

    saved = datasets.load_from_disk(str(folder / "saved")).with_format("numpy")
    for position in range(len(saved)) if positions is None else positions.tolist():
        yield saved[position]["ids"].astype(np.int64)


FORMATS = (
    Format("ours", write_ours, ours_in_order, ours_at, "by position"),
    Format("numpy", write_memmap, lambda f: memmap_at(f, None), memmap_at, "by position"),
    Format(
        "litdata", write_litdata, lambda f: litdata_at(f, None), litdata_at, "by its loader's state"
    ),
    Format("webdataset", write_webdataset, webdataset_in_order, None, "no"),
    Format("datasets", write_datasets, lambda f: datasets_at(f, None), datasets_at, "by position"),
)
NOT_COMPARED = ("mosaicml-streaming", "grain")
"""Packages that the last line names with their versions."""
MISSING = "not installed"
PASSES = 3


def best_seconds(act: Callable[[], object]) -> float:
    """The shortest of three passes."""
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def tokens_in(documents: Iterable[np.ndarray]) -> int:
    return sum(map(len, documents))


def digest(documents: Iterable[np.ndarray]) -> int:
    """CRC-32 over all ids, however they are cut into arrays."""
    value = 0
    for ids in documents:
        value = zlib.crc32(ids.astype(np.int64), value)
    return value


def files_of(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def write_to_disk(format_: Format, folder: Path, documents: list[np.ndarray]) -> None:
    """Write documents into a new folder, and wait until they are on the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    format_.write(folder, documents)
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def what_a_flipped_bit_does(format_: Format, folder: Path, intact: int) -> str:
    """Flip a bit, read all, and say in a word or two what came of it."""
    path = max(files_of(folder), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    try:
        return "unnoticed" if digest(format_.in_order(folder)) != intact else "hit no id"
    except Exception as error:
        return "named" if path.name in str(error) else f"an error ({type(error).__name__})"


def row(
    format_: Format, folder: Path, documents: list[np.ndarray], positions: np.ndarray
) -> list[str]:
    """The figures of a format as cells of the table.

    Raises:
        SystemExit: for a format that returns other ids than were written.
    """
    tokens, intact = tokens_in(documents), digest(documents)
    writing = best_seconds(lambda: write_to_disk(format_, folder, documents))
    size = sum(file.stat().st_size for file in files_of(folder))
    if digest(format_.in_order(folder)) != intact:
        raise SystemExit(f"{format_.name} does not give back what was written")

    # That check has read every file, so the cache is warm.
    opening = best_seconds(lambda: next(iter(format_.in_order(folder))))
    in_order = best_seconds(lambda: tokens_in(format_.in_order(folder)))
    at_random = "-"
    if format_.at:
        taken = best_seconds(lambda: tokens_in(format_.at(folder, positions)))
        at_random = f"{tokens / taken / 1e6:.1f}"

    return [
        f"{2 * tokens / writing / 1e6:.0f}",
        f"{size / len(documents):.0f}",
        f"{1e3 * opening:.1f}",
        f"{tokens / in_order / 1e6:.1f}",
        at_random,
        "yes" if format_.at else "no",
        format_.resume,
        what_a_flipped_bit_does(format_, folder, intact),
    ]


COLUMNS = (
    "format",
    "written, MB/s",
    "bytes a document",
    "open, ms",
    "in order, M tokens/s",
    "at random, M tokens/s",
    "random access",
    "exact resume",
    "a flipped bit is",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=24_576)
    options = parser.parse_args()

    # What the libraries tell of themselves would stand between the rows.
    logging.disable(logging.WARNING)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

    rng = np.random.default_rng(0)
    lengths = rng.integers(1030, 1061, options.documents)
    documents = [rng.integers(0, 64_512, length, dtype=np.uint16) for length in lengths]
    positions = rng.permutation(options.documents)
    print(f"{options.documents:,} documents, {lengths.sum():,} tokens ", end="")
    print(f"of {2 * lengths.mean():.0f} bytes a document\n")

    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for format_ in FORMATS:
        version = "" if format_.name == "ours" else _version(format_.name)
        cells = [f"{format_.name} {version}".strip()]
        if version != MISSING:
            with tempfile.TemporaryDirectory() as folder:
                cells += row(format_, Path(folder) / "documents", documents, positions)
        print(f"| {' | '.join(cells)} |", flush=True)

    missing = ", ".join(f"{name} ({_version(name)})" for name in NOT_COMPARED)
    print(f"\nNot compared: {missing}.")


def _version(name: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


if __name__ == "__main__":
    main()
