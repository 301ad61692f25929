"""The text tokenizer at the paper's size, against the library's own byte-level BPE: time, memory, compression, speed.

    python benchmarks/text_tokenizer.py TEXT --bytes 1_000_000_000

TEXT is a file of JSON lines with `text` in each, or a folder of .txt, .md, .rst and .py files. About one document in a
hundred is held out, by the hash of its text. Each tokenizer is trained in a process of its own, so that the peak memory
is its own, and encodes the held-out text in another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from cm3leon.tokenizers.text import TextTokenizer, TextTokenizerConfig

SUFFIXES = (".txt", ".md", ".rst", ".py")
HELD_OUT_BYTES = 10_000_000
RUNS = 3


class Trained(NamedTuple):
    """What one training took: `seconds` in all, `reading` until the last text was counted, peak memory in MiB."""

    documents: int
    bytes: int
    reading: float
    seconds: float
    memory: float


class Encoded(NamedTuple):
    """On held-out text: pieces in the vocabulary, bytes a token, MB/s one by one in one thread and as a batch."""

    pieces: int
    bytes_a_token: float
    one_thread: float
    batch: float


def documents(place: Path) -> Iterator[str]:
    if place.is_file():
        with place.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
    else:
        for path in sorted(place.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                yield path.read_text(encoding="utf-8", errors="replace")


def sample(place: Path, limit: int, *, held_out: bool) -> Iterator[str]:
    """Documents of one side of the split until they have `limit` bytes."""
    for text in documents(place):
        content = text.encode()
        if (hashlib.sha256(content).digest()[0] < 3) == held_out:
            yield text
            limit -= len(content)
            if limit <= 0:
                return


def train_ours(texts: Iterator[str], vocab_size: int, folder: Path) -> None:
    TextTokenizer.train(TextTokenizerConfig(vocab_size=vocab_size), texts).save(folder)


def train_plain(texts: Iterator[str], vocab_size: int, folder: Path) -> None:
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    learner.save(str(folder / "tokenizer.json"))


def train(
    method: Callable[..., None], place: Path, limit: int, vocab_size: int, folder: Path
) -> Trained:
    count = size = 0
    read = 0.0
    start = time.perf_counter()

    def texts() -> Iterator[str]:
        nonlocal count, size, read
        for text in sample(place, limit, held_out=False):
            count, size = count + 1, size + len(text.encode())
            yield text
        read = time.perf_counter() - start

    method(texts(), vocab_size, folder)
    seconds = time.perf_counter() - start
    return Trained(
        count, size, read, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )


def encode_ours(
    folder: Path, vocab_size: int
) -> tuple[int, Callable[[str], Any], Callable[[list[str]], Any]]:
    tokenizer = TextTokenizer.load(folder, TextTokenizerConfig(vocab_size=vocab_size))
    return tokenizer.pieces, tokenizer.encode, tokenizer.encode_all


def encode_plain(
    folder: Path, _: int
) -> tuple[int, Callable[[str], Any], Callable[[list[str]], Any]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return (
        tokenizer.get_vocab_size(),
        lambda text: np.asarray(tokenizer.encode(text).ids, dtype=np.int64),
        lambda texts: [
            np.asarray(each.ids, dtype=np.int64) for each in tokenizer.encode_batch_fast(texts)
        ],
    )


def encode(method: Callable[..., Any], place: Path, vocab_size: int, folder: Path) -> Encoded:
    pieces, one, batch = method(folder, vocab_size)
    texts = list(sample(place, HELD_OUT_BYTES, held_out=True))
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(one(text)) for text in texts)
    alone = min(_seconds(lambda: [one(text) for text in texts]) for _ in range(RUNS))
    together = min(_seconds(lambda: batch(texts)) for _ in range(RUNS))
    return Encoded(pieces, size / tokens, size / alone / 1e6, size / together / 1e6)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a function in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--bytes", type=int, default=1_000_000_000)
    parser.add_argument("--vocab-size", type=int, default=56_320)
    options = parser.parse_args()
    print(
        "| tokenizer | documents | MB | read, s | in all, s | peak memory, MiB | pieces | bytes a token, held out "
        "| one thread, MB/s | batch, MB/s |\n|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name, train_method, encode_method in (
        ("ours", train_ours, encode_ours),
        ("tokenizers.ByteLevelBPETokenizer", train_plain, encode_plain),
    ):
        with tempfile.TemporaryDirectory() as place:
            folder, size = Path(place), options.vocab_size
            trained = alone(train, train_method, options.text, options.bytes, size, folder)
            encoded = alone(encode, encode_method, options.text, size, folder)
        print(
            f"| {name} | {trained.documents:,} | {trained.bytes / 1e6:,.0f} | {trained.reading:,.0f} "
            f"| {trained.seconds:,.0f} | {trained.memory:,.0f} | {encoded.pieces:,} | {encoded.bytes_a_token:.3f} "
            f"| {encoded.one_thread:.2f} | {encoded.batch:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
