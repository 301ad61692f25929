"""Speed, memory and fill of the stream of training batches over a simulated corpus, on one core.

    python benchmarks/batches.py

Documents are 16 text tokens and 1,024 codes, made from their row alone; each sample has 0 to 3 retrieved ones. The
mix has as many documents of 50 to 500 text tokens, without retrieved ones. The stream is entered at places spread over
an epoch of all documents. Two rows read real shards instead, from a warm cache. Peers, without retrieval and rotation:
the `group_texts` recipe of Hugging Face's run_clm (concatenate and cut), in lists as `datasets` runs it and in numpy,
and whole documents one after the other, padded. Best fill: all tokens over the Martello-Toth lower bound L2 of the
number of blocks for the lengths that were packed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from cm3leon.data.mixture import Mixture
from cm3leon.data.shards import shard_path, write_plan
from cm3leon.data.shuffle import shuffled
from cm3leon.data.token_shards import Tokenizers, TokenShards, finish_tokens, write_token_shard
from cm3leon.objectives.block_stream import BlockStream, Draw
from cm3leon.objectives.packing import PackingConfig
from cm3leon.registry import OBJECTIVES, discover
from cm3leon.retrievers.neighbours import NeighbourShards, finish_neighbours, write_neighbour_shard
from cm3leon.seeds import mixed
from cm3leon.tokenizers.document import lay_out
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Sample, TokenDocument, TokenSegment

VOCAB = Vocab(text_size=56_320, image_size=8_192)
SEQ_LEN = 4096
CAPTION, CODES = 16, 1024
MARKED_CAPTION = 20
"""Text tokens of the documents that are followed through the packing."""
POOL = 1 << 20
LANES = 2


class Corpus:
    """Documents as functions of their row, cut out of pools of random ids and widened as the shard reader does."""

    def __init__(self, documents: int) -> None:
        rng = np.random.default_rng(0)
        self.documents = documents
        self._mixture = Mixture([documents // 2, documents - documents // 2], [1.0, 1.0], seed=0)
        self._text = rng.integers(*VOCAB.id_range("text"), size=POOL, dtype=np.uint16)
        self._image = rng.integers(*VOCAB.id_range("image"), size=POOL, dtype=np.uint16)

    def pair(self, row: int) -> TokenDocument:
        """A caption and an image."""
        place = mixed(row) % (POOL - CODES)
        text = TokenSegment("text", self._text[place : place + CAPTION].astype(np.int64))
        image = TokenSegment("image", self._image[place : place + CODES].astype(np.int64))
        return TokenDocument(str(row), (text, image))

    def text(self, row: int) -> TokenDocument:
        """50 to 500 tokens of text."""
        place = mixed(row) % (POOL - CODES)
        text = self._text[place : place + 50 + place % 451].astype(np.int64)
        return TokenDocument(str(row), (TokenSegment("text", text),))

    def draw_pairs(self, position: int, rng: np.random.Generator) -> Sample:
        """Pairs only."""
        return self._with_retrieved(shuffled(0, position, self.documents), rng)

    def draw_mixed(self, position: int, rng: np.random.Generator) -> Sample:
        """Half of the samples pairs, half text."""
        source, row, _ = self._mixture.at(position)
        return Sample(self.text(row)) if source else self._with_retrieved(row, rng)

    def _with_retrieved(self, row: int, rng: np.random.Generator) -> Sample:
        retrieved = rng.integers(self.documents, size=rng.integers(4)).tolist()
        return Sample(self.pair(row), tuple(self.pair(other) for other in retrieved))


class OnDisk:
    """Some of the pairs in real shards, with neighbours: read, checked and drawn as training does."""

    def __init__(self, corpus: Corpus, documents: int, folder: Path) -> None:
        made_by = Tokenizers("text", "image", VOCAB.text_size, VOCAB.image_size, VOCAB.sentinels)
        rng = np.random.default_rng(0)
        tokens, neighbours = folder / "tokens", folder / "neighbours"
        write_plan(tokens, {"tokenizers": asdict(made_by)})
        write_plan(neighbours, {})
        shards = np.array_split(np.arange(documents), max(1, documents // 4096))
        for number, rows in enumerate(shards):
            write_token_shard(
                shard_path(tokens, number, len(shards)),
                [corpus.pair(row) for row in rows.tolist()],
                made_by,
            )
            found_VBK = rng.integers(documents, size=(4, len(rows), 4))
            write_neighbour_shard(shard_path(neighbours, number, len(shards)), found_VBK, {})
        finish_tokens(tokens, len(shards))
        finish_neighbours(neighbours, len(shards))
        self._tokens, self._neighbours = TokenShards(tokens, made_by), NeighbourShards(neighbours)

    def draw(self, position: int, rng: np.random.Generator) -> Sample:
        """A pair with up to three of its neighbours."""
        row = shuffled(0, position, len(self._tokens))
        rows = self._neighbours.draw(row, most=3, random_count=True, rng=rng)
        return Sample(
            self._tokens.document(row), tuple(self._tokens.document(other) for other in rows)
        )


# ------------------------------------------------------------------------------------------------ ours


def stream_at(start: int, draw: Draw, packing: PackingConfig) -> BlockStream:
    """The stream of batches from a position on."""
    objective = OBJECTIVES.build("cm3", vocab=VOCAB)
    cpu = torch.device("cpu")
    stream = BlockStream(
        draw, objective, packing, seq_len=SEQ_LEN, batch_size=LANES, seed=0, device=cpu
    )
    state = stream.state_dict()
    for lane in state["lanes"].values():
        lane["position" if packing.method == "stream" else "next"] += start
    stream.load_state_dict(state)
    return stream


def measure(draw: Draw, packing: PackingConfig, documents: int, places: int, batches: int) -> str:
    """The columns of a row: tokens/s, fill, best fill, seconds to resume, memory at the first place and at the last."""
    tokens, seconds, resume = 0, 0.0, 0.0
    lengths: list[np.ndarray] = []
    memory: list[float] = []
    for place in range(places):
        stream = stream_at(place * documents // places // LANES * LANES, draw, packing)
        # A pool fills with samples that are hard to place; the fill is that of a stream long under way.
        for _ in range(1 if packing.method == "stream" else 2 * packing.window):
            stream.next()
        for _ in range(batches):
            start = time.perf_counter()
            batch = stream.next()
            seconds += time.perf_counter() - start
            for sample_T in batch.sample_BT.numpy():
                lengths.append(np.bincount(sample_T[sample_T >= 0]))
                tokens += int(lengths[-1].sum())
        state, again = stream.state_dict(), stream_at(0, draw, packing)
        start = time.perf_counter()
        again.load_state_dict(state)
        again.next()
        resume = max(resume, time.perf_counter() - start)
        memory.append(resident())
    blocks = len(lengths)
    best = blocks if packing.method != "whole" else fewest_blocks(np.concatenate(lengths), SEQ_LEN)
    return (
        f"{tokens / seconds / 1e6:.1f} M | {tokens / blocks / SEQ_LEN:.2%} | {tokens / best / SEQ_LEN:.2%} | "
        f"{resume:.3f} | {memory[0]:.0f} -> {memory[-1]:.0f}"
    )


def fewest_blocks(lengths: np.ndarray, seq_len: int) -> int:
    """Martello and Toth's bound L2: no packing of samples of these lengths has fewer blocks."""

    def bound(least: int) -> int:
        """Samples over half a block have one each; those of `least` up to half fill what these leave, then more."""
        alone = lengths > seq_len - least
        large = lengths[(lengths > seq_len / 2) & ~alone]
        small = lengths[(lengths <= seq_len / 2) & (lengths >= least)]
        rest = small.sum() - (len(large) * seq_len - large.sum())
        return int(alone.sum() + len(large) + max(0, -(-rest // seq_len)))

    return max(bound(int(least)) for least in {0, *lengths[lengths <= seq_len / 2]})


def resident() -> float:
    """Memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


# ------------------------------------------------------------------------------------------------ what queries see


def draw_marked(position: int, rng: np.random.Generator) -> Sample:
    """A pair with 0 to 3 retrieved ones whose ids tell which document of the sample they are of.

    The ids of document k, counted from the query, which is 0, are the k-th ones of text and images.
    """
    text, image = VOCAB.id_range("text")[0], VOCAB.id_range("image")[0]
    documents = []
    for k in range(int(rng.integers(4)) + 1):
        caption = TokenSegment("text", np.full(MARKED_CAPTION, text + k))
        codes = TokenSegment("image", np.full(CODES, image + k))
        documents.append(TokenDocument(f"{position}-{k}", (caption, codes)))
    return Sample(documents[0], tuple(reversed(documents[1:])))


def measure_sight(method: str, blocks: int) -> str:
    """Fill; shares of the query's image tokens with 0 to 3 whole documents before them, with 0 to 3
    of which at least 90 % is there, and without their whole caption; share of positions with a loss."""
    objective = OBJECTIVES.build("causal", vocab=VOCAB)
    packing = PackingConfig(method=method)  # type: ignore[arg-type]
    stream = BlockStream(
        draw_marked,
        objective,
        packing,
        seq_len=SEQ_LEN,
        batch_size=1,
        seed=0,
        device=torch.device("cpu"),
    )
    text, image = VOCAB.id_range("text")[0], VOCAB.id_range("image")[0]
    filled = targets = queries = without_caption = 0
    whole, nearly = np.zeros(4), np.zeros(4)
    for _ in range(blocks):
        batch = stream.next()
        filled += int((batch.sample_BT >= 0).sum())
        targets += int((batch.weight_BT > 0).sum())
        for number in range(int(batch.sample_BT.max()) + 1):
            piece_T = batch.ids_BT[batch.sample_BT == number].numpy()
            parts = [
                (int((piece_T == text + k).sum()), int((piece_T == image + k).sum()))
                for k in range(4)
            ]
            (caption, codes), *retrieved = parts
            share = [(t + c) / (MARKED_CAPTION + CODES) for t, c in retrieved]
            queries += codes
            without_caption += codes * (caption < MARKED_CAPTION)
            whole[sum(each == 1 for each in share)] += codes
            nearly[sum(each >= 0.9 for each in share)] += codes
    shares = " | ".join(
        " / ".join(f"{100 * n / queries:.1f}" for n in counts) for counts in (whole, nearly)
    )
    places = blocks * SEQ_LEN
    return (
        f"{filled / places:.2%} | {shares} | {without_caption / queries:.1%} | "
        f"{targets / places:.1%}"
    )


# ------------------------------------------------------------------------------------------------ peers


def group_texts(documents: list[list[int]]) -> torch.Tensor:
    """run_clm's recipe for a batch of documents, then tensors as its collator makes them: (B, T)."""
    concatenated = list(chain(*documents))
    total = len(concatenated) // SEQ_LEN * SEQ_LEN
    blocks = [concatenated[i : i + SEQ_LEN] for i in range(0, total, SEQ_LEN)]
    labels = blocks.copy()
    return torch.stack([torch.tensor(blocks), torch.tensor(labels)])[0]


def group_arrays(documents: list[np.ndarray]) -> torch.Tensor:
    """The same in numpy."""
    concatenated = np.concatenate(documents)
    total = len(concatenated) // SEQ_LEN * SEQ_LEN
    blocks = concatenated[:total].reshape(-1, SEQ_LEN)
    return torch.stack([torch.from_numpy(blocks), torch.from_numpy(blocks.copy())])[0]


def padded(documents: list[np.ndarray]) -> torch.Tensor:
    """Whole documents one after the other, a new block where one does not fit."""
    blocks: list[list[torch.Tensor]] = [[]]
    room = SEQ_LEN
    for ids_T in documents:
        if len(ids_T) > room:
            blocks.append([])
            room = SEQ_LEN
        blocks[-1].append(torch.from_numpy(ids_T))
        room -= len(ids_T)
    joined = [torch.cat(block) for block in blocks]
    return torch.stack(
        [
            torch.nn.functional.pad(ids_T, (0, SEQ_LEN - len(ids_T)), value=VOCAB.pad)
            for ids_T in joined
        ]
    )


def thousands(corpus: Corpus, count: int) -> Iterator[list[np.ndarray]]:
    """Batches of a thousand documents, laid out without retrieved ones."""
    for first in range(0, count, 1000):
        rows = (shuffled(0, position, corpus.documents) for position in range(first, first + 1000))
        yield [lay_out(Sample(corpus.pair(row)), VOCAB).ids_T for row in rows]


def measure_peer(make: Callable[[list], torch.Tensor], batches: Iterator[list]) -> str:
    """The first two columns: only `make` is timed, reading and laying out are not."""
    tokens, places, seconds = 0, 0, 0.0
    for documents in batches:
        start = time.perf_counter()
        blocks_BT = make(documents)
        seconds += time.perf_counter() - start
        tokens += int((blocks_BT != VOCAB.pad).sum())
        places += blocks_BT.numel()
    return f"{tokens / seconds / 1e6:.1f} M | {tokens / places:.2%} | | | "


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--documents", type=int, default=10_000_000, help="documents of the simulated corpus"
    )
    parser.add_argument(
        "--places", type=int, default=5, help="places of an epoch at which the stream is entered"
    )
    parser.add_argument(
        "--batches", type=int, default=200, help="batches that are timed at each place"
    )
    parser.add_argument(
        "--on-disk",
        type=int,
        default=24_576,
        help="documents of the corpus that is read from shards",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    discover()
    corpus = Corpus(arguments.documents)
    print(
        f"{arguments.documents:,} documents, blocks of {SEQ_LEN:,}, {LANES} blocks a batch, one core\n"
    )
    print("| batches | tokens/s | fill | best fill | resume, s | memory, MB |")
    print("|---|---|---|---|---|---|")
    for name, draw in (("pairs", corpus.draw_pairs), ("pairs and text", corpus.draw_mixed)):
        for packing in (
            PackingConfig(method="stream"),
            PackingConfig(),
            PackingConfig(window=256),
            PackingConfig(method="together"),
        ):
            window = "" if packing.method == "stream" else f", window {packing.window}"
            columns = measure(
                draw, packing, arguments.documents, arguments.places, arguments.batches
            )
            print(f"| {name}, CM3, {packing.method}{window} | {columns} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        draw = OnDisk(corpus, arguments.on_disk, Path(folder)).draw
        for packing in (
            PackingConfig(method="stream"),
            PackingConfig(),
            PackingConfig(method="together"),
        ):
            columns = measure(draw, packing, arguments.on_disk, arguments.places, arguments.batches)
            print(
                f"| {arguments.on_disk:,} pairs in shards on disk, CM3, {packing.method} | {columns} |",
                flush=True,
            )
    lists = ([ids_T.tolist() for ids_T in documents] for documents in thousands(corpus, 5000))
    print(f"| peer: group_texts, lists | {measure_peer(group_texts, lists)} |")
    print(f"| peer: group_texts, numpy | {measure_peer(group_arrays, thousands(corpus, 5000))} |")
    print(
        f"| peer: whole documents in order, padded | {measure_peer(padded, thousands(corpus, 5000))} |"
    )

    print(f"\nDocuments of {MARKED_CAPTION} + {CODES} tokens, 0 to 3 retrieved, causal:\n")
    print("| packing | fill | 0/1/2/3 whole documents, % | 90 % of them, % | no caption | loss |")
    print("|---|---|---|---|---|---|")
    for method in ("stream", "whole", "together"):
        print(f"| {method} | {measure_sight(method, 10 * arguments.batches)} |", flush=True)


if __name__ == "__main__":
    main()
