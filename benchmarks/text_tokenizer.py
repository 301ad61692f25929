"""Patterns of the text tokenizer: how many tokens they make of kinds of text, and how fast.

    python benchmarks/text_tokenizer.py prose.jsonl code.jsonl --bytes 600_000 --vocab-size 8192
    python benchmarks/text_tokenizer.py corpus.jsonl --bytes 1_000_000_000 --vocab-size 56320

Each TEXT is a kind of text: a file of JSON lines with `text` in each, or a folder of .txt, .md,
.rst and .py files. One document in sixteen is held out, by the hash of its text. Every pattern
learns from the same documents of all kinds, in a process of its own, so that the peak memory is its
own, and encodes the held-out ones of each kind. Seconds are those of the processors, in one thread,
so that other work on them counts as little as it can.

The encoders of others are measured where they are installed: pip install tiktoken gigatoken.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tokenizers import ByteLevelBPETokenizer, Tokenizer

from cm3leon.tokenizers.layout import SPECIALS
from cm3leon.tokenizers.patterns import Pattern, expression
from cm3leon.tokenizers.text import FILE, TextTokenizer, TextTokenizerConfig

SUFFIXES = (".txt", ".md", ".rst", ".py")
HELD_OUT = 16
"""One document in so many is held out."""
LIBRARY = "tokenizers.ByteLevelBPETokenizer"
"""Row of the library's own byte-level BPE, whose pattern is GPT-2's."""
RUNS = 3


class Measured(NamedTuple):
    """What learning by one pattern took, and what came of it."""

    bytes: int
    """Of the text that it learned from."""
    seconds: float
    """Of a processor, for learning."""
    memory: float
    """MiB at the peak of the process."""
    pieces: int
    tokens: list[int]
    """Of the held-out documents of each kind."""


def documents(place: Path) -> Iterator[str]:
    """The texts of a file of JSON lines, or of the text files in a folder."""
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
        if (hashlib.sha256(content).digest()[0] % HELD_OUT == 0) == held_out:
            yield text
            limit -= len(content)
            if limit <= 0:
                return


def train(pattern: str, texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Learn one tokenizer and save it as the library's file."""
    if pattern == LIBRARY:
        learner = ByteLevelBPETokenizer()
        learner.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
        learner.save(str(folder / FILE))
    else:
        config = TextTokenizerConfig(vocab_size=vocab_size, pattern=pattern)  # type: ignore[arg-type]
        TextTokenizer.train(config, texts).save(folder)


def measure(
    pattern: str, places: list[Path], limits: tuple[int, int], vocab_size: int, folder: Path
) -> Measured:
    """Learn a tokenizer by a pattern, and encode held-out documents with it.

    Args:
        places: files or folders, one for each kind of text.
        limits: bytes of each kind to learn from, and to encode.
        folder: where the tokenizer is saved.
    """
    size = 0

    def texts() -> Iterator[str]:
        nonlocal size
        for place in places:
            for text in sample(place, limits[0], held_out=False):
                size += len(text.encode())
                yield text

    start = time.process_time()
    train(pattern, texts(), vocab_size, folder)
    seconds = time.process_time() - start

    # Of this process alone, which is why every pattern has one.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    tokenizer = Tokenizer.from_file(str(folder / FILE))
    tokens = []
    for place in places:
        held_out = list(sample(place, limits[1], held_out=True))
        tokens.append(sum(len(each.ids) for each in tokenizer.encode_batch_fast(held_out)))
    return Measured(size, seconds, memory, tokenizer.get_vocab_size(), tokens)


# ---------------------------------------------------------------------------------------- encoders

Encode = Callable[[list[str]], list[Any]]


def encoders(folder: Path, pattern: Pattern, vocab_size: int) -> dict[str, Encode | str]:
    """Encoders of texts to ids by the saved tokenizer; a sentence for one that refuses the file."""
    config = TextTokenizerConfig(vocab_size=vocab_size)
    ours = TextTokenizer.load(folder, config)
    found: dict[str, Encode | str] = {
        "ours, one by one": lambda texts: [ours.encode(text) for text in texts],
        "ours, in batches (the library's encode_batch_fast)": ours.encode_all,
    }
    if importlib.util.find_spec("tiktoken"):
        found["tiktoken"] = _tiktoken(folder, expression(pattern, config.max_word))
    if importlib.util.find_spec("gigatoken"):
        found["gigatoken"] = _gigatoken(folder)
    return found


def _tiktoken(folder: Path, words: str) -> Encode:
    """Its encoder, which ranks pieces by number: ours are numbered in the order of merges."""
    import tiktoken

    # Its pieces are bytes. Those of the file are letters, one for each byte.
    byte_of = _byte_of_letter()
    vocab = json.loads((folder / FILE).read_text())["model"]["vocab"]
    ranks = {}
    for piece, id_ in vocab.items():
        if id_ >= len(SPECIALS):
            ranks[bytes(byte_of[letter] for letter in piece)] = id_ - len(SPECIALS)
    encoding = tiktoken.Encoding("ours", pat_str=words, mergeable_ranks=ranks, special_tokens={})

    def encode(texts: list[str]) -> list[list[int]]:
        rows = []
        for ranks_T in encoding.encode_ordinary_batch(texts, num_threads=1):
            rows.append([rank + len(SPECIALS) for rank in ranks_T])
        return rows

    return encode


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet of bytes: printable ones are themselves, the others count from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    byte_of, others = {}, 0
    for byte in range(256):
        if byte in printing:
            byte_of[chr(byte)] = byte
        else:
            byte_of[chr(256 + others)] = byte
            others += 1
    return byte_of


def _gigatoken(folder: Path) -> Encode | str:
    """Its encoder, or the reason why it refuses the file."""
    import gigatoken

    try:
        tokenizer = gigatoken.Tokenizer(str(folder / FILE))
    except RuntimeError as error:
        return str(error).partition(":")[0]
    return lambda texts: tokenizer.encode_batch(texts, parallel=False).to_list()


def encode_all_ways(
    folder: Path, pattern: Pattern, vocab_size: int, places: list[Path], limit: int
) -> list[str]:
    """Rows of a table: each encoder's speed on held-out texts, and how many of them get our ids."""
    texts: list[str] = []
    for place in places:
        texts += sample(place, limit, held_out=True)
    size = sum(len(text.encode()) for text in texts)

    # The first encoder is ours, and the ids of the others are compared with its ids.
    rows, expected = [], None
    for name, encode in encoders(folder, pattern, vocab_size).items():
        if isinstance(encode, str):
            rows.append(f"| {pattern} | {name} | refused: {encode} | | |")
            continue
        seconds = []
        for _ in range(RUNS):
            start = time.process_time()
            ids = encode(texts)
            seconds.append(time.process_time() - start)

        # Encoders return lists or arrays; the conversion is not timed.
        ids = [list(map(int, row)) for row in ids]
        expected = expected or ids
        same = sum(map(list.__eq__, ids, expected))
        tokens = sum(map(len, ids))
        rows.append(
            f"| {pattern} | {name} | {size / min(seconds) / 1e6:.2f} "
            f"| {tokens / min(seconds) / 1e3:,.0f} | {same:,} of {len(texts):,} |"
        )
    return rows


# -------------------------------------------------------------------------------------- the tables


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _cells(tokens: Sequence[int], sizes: Sequence[int]) -> str:
    """Tokens for each 1,000 bytes, of each kind and of all kinds together with equal weight."""
    rates = [1000 * count / size for count, size in zip(tokens, sizes, strict=True)]
    return " | ".join(f"{rate:.1f}" for rate in [*rates, sum(rates) / len(rates)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = get_args(Pattern)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--bytes", type=int, default=600_000, help="of each kind, to learn from")
    parser.add_argument("--held-out", type=int, default=100_000, help="bytes of each kind")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument(
        "--patterns", nargs="+", default=[*known, LIBRARY], choices=[*known, LIBRARY]
    )
    parser.add_argument("--encoders", nargs="*", default=["words", "qwen3_5"], choices=known)
    options = parser.parse_args()

    # The library counts in one thread, unless the user says otherwise, and shows no bars.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")

    sizes = []
    for place in options.text:
        texts = sample(place, options.held_out, held_out=True)
        sizes.append(sum(len(text.encode()) for text in texts))
    kinds = " | ".join(place.stem for place in options.text)
    print(f"| pattern | MB | processor s | peak MiB | pieces | {kinds} | mean |")
    print("|---" * (6 + len(options.text)) + "|", flush=True)
    with tempfile.TemporaryDirectory() as made:
        for pattern in options.patterns:
            folder = Path(made) / pattern
            folder.mkdir()
            limits = options.bytes, options.held_out
            each = alone(measure, pattern, options.text, limits, options.vocab_size, folder)
            print(
                f"| {pattern} | {each.bytes / 1e6:.1f} | {each.seconds:.1f} | {each.memory:,.0f} "
                f"| {each.pieces:,} | {_cells(each.tokens, sizes)} |",
                flush=True,
            )

        # The saved tokenizers of some patterns, as several libraries apply them.
        print("\n| pattern | encoder | MB/s | thousand tokens/s | texts with our ids |")
        print("|---|---|---|---|---|", flush=True)
        for pattern in options.encoders:
            if pattern in options.patterns:
                folder = Path(made) / pattern
                given = folder, pattern, options.vocab_size, options.text, options.held_out
                print("\n".join(alone(encode_all_ways, *given)), flush=True)


if __name__ == "__main__":
    main()
