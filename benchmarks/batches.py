"""Speed, memory and fill of the stream of training batches over a simulated corpus, on one core.

    python benchmarks/batches.py

A document has 16 text tokens and 1,024 codes, which follow from its row alone, and each sample has
0 to 3 retrieved documents. In the mixture half of the samples are texts of 50 to 500 tokens,
without retrieved documents. The stream is entered at positions spread over an epoch of all
documents. Three rows read real shards instead, from a warm cache.

Peers neither retrieve nor rotate: the `group_texts` recipe of Hugging Face's run_clm (concatenate
and cut), in lists as `datasets` runs it and in numpy; and whole documents one after the other,
padded. Best fill is that of the fewest blocks that could hold the same samples, by the lower bound
L2 of Martello and Toth.

The last table says how much of the retrieved documents a query sees by each way of packing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
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
MARKED_CAPTIONS = (20, 70, 140)
"""Text tokens of the documents that are followed through the packing."""
POOL = 1 << 20
"""Random ids of which documents are cut."""
LANES = 2
"""Blocks of a batch."""


class Corpus:
    """Documents that follow from their rows.

    They are cut out of pools of random ids of 16 bits, and widened as the shard reader does.
    """

    def __init__(self, documents: int) -> None:
        rng = np.random.default_rng(0)
        self.documents = documents
        self._mixture = Mixture([documents // 2, documents - documents // 2], [1.0, 1.0], seed=0)
        self._text = rng.integers(*VOCAB.id_range("text"), size=POOL, dtype=np.uint16)
        self._image = rng.integers(*VOCAB.id_range("image"), size=POOL, dtype=np.uint16)

    def pair(self, row: int) -> TokenDocument:
        """A caption and an image."""
        start = mixed(row) % (POOL - CODES)
        text = TokenSegment("text", self._text[start : start + CAPTION].astype(np.int64))
        image = TokenSegment("image", self._image[start : start + CODES].astype(np.int64))
        return TokenDocument(str(row), (text, image))

    def text(self, row: int) -> TokenDocument:
        """50 to 500 tokens of text."""
        start = mixed(row) % (POOL - CODES)
        text = self._text[start : start + 50 + start % 451].astype(np.int64)
        return TokenDocument(str(row), (TokenSegment("text", text),))

    def draw_pairs(self, position: int, rng: np.random.Generator) -> Sample:
        """Draw a sample of pairs alone."""
        return self._with_retrieved(shuffled(0, position, self.documents), rng)

    def draw_mixed(self, position: int, rng: np.random.Generator) -> Sample:
        """Draw a sample; half of all are pairs, half are texts."""
        source, row, _ = self._mixture.at(position)
        return Sample(self.text(row)) if source else self._with_retrieved(row, rng)

    def _with_retrieved(self, row: int, rng: np.random.Generator) -> Sample:
        retrieved = rng.integers(self.documents, size=rng.integers(4)).tolist()
        return Sample(self.pair(row), tuple(self.pair(other) for other in retrieved))


class OnDisk:
    """Some of the pairs in real shards with neighbours, read and checked as training does."""

    def __init__(self, corpus: Corpus, documents: int, folder: Path) -> None:
        made_by = Tokenizers("text", "image", VOCAB.text_size, VOCAB.image_size, VOCAB.sentinels)
        rng = np.random.default_rng(0)
        tokens, neighbours = folder / "tokens", folder / "neighbours"
        write_plan(tokens, {"tokenizers": asdict(made_by)})
        write_plan(neighbours, {})

        shards = np.array_split(np.arange(documents), max(1, documents // 4096))
        for number, rows in enumerate(shards):
            pairs = [corpus.pair(row) for row in rows.tolist()]
            write_token_shard(shard_path(tokens, number, len(shards)), pairs, made_by)

            # Four variants of four neighbours each; any documents will do.
            found_VBK = rng.integers(documents, size=(4, len(rows), 4))
            write_neighbour_shard(shard_path(neighbours, number, len(shards)), found_VBK, {})
        finish_tokens(tokens, len(shards))
        finish_neighbours(neighbours, len(shards))

        self._tokens, self._neighbours = TokenShards(tokens, made_by), NeighbourShards(neighbours)

    def draw(self, position: int, rng: np.random.Generator) -> Sample:
        """Draw a pair with up to three of its neighbours."""
        row = shuffled(0, position, len(self._tokens))
        rows = self._neighbours.draw(row, most=3, random_count=True, rng=rng)
        retrieved = tuple(self._tokens.document(other) for other in rows)
        return Sample(self._tokens.document(row), retrieved)


# -------------------------------------------------------------------------------------------- ours


def stream_at(start: int, draw: Draw, packing: PackingConfig) -> BlockStream:
    """The stream of batches whose lanes begin `start` samples later than at the first step."""
    objective = OBJECTIVES.build("cm3", vocab=VOCAB)
    cpu = torch.device("cpu")
    stream = BlockStream(
        draw, objective, packing, seq_len=SEQ_LEN, batch_size=LANES, seed=0, device=cpu
    )

    # A state knows how far each lane has come; counted on, it is a state of later in the epoch.
    state = stream.state_dict()
    for lane in state["lanes"].values():
        lane["position" if packing.method == "stream" else "next"] += start
    stream.load_state_dict(state)
    return stream


def measure(draw: Draw, packing: PackingConfig, documents: int, places: int, batches: int) -> str:
    """The columns of a row: tokens/s, fill, best fill, seconds to resume, and memory.

    Args:
        places: positions of an epoch at which the stream is entered; the memory is that at the
            first and at the last one.
        batches: to time at each of them.
    """
    tokens, seconds, resume = 0, 0.0, 0.0
    lengths: list[np.ndarray] = []
    memory: list[float] = []
    for place in range(places):
        stream = stream_at(place * documents // places // LANES * LANES, draw, packing)

        # The fill is to be that of a stream long under way, whose pool has collected the samples
        # for which room is hard to find.
        for _ in range(1 if packing.method == "stream" else 2 * packing.window):
            stream.next()
        for _ in range(batches):
            start = time.perf_counter()
            batch = stream.next()
            seconds += time.perf_counter() - start
            for sample_T in batch.sample_BT.numpy():
                lengths.append(np.bincount(sample_T[sample_T >= 0]))
                tokens += int(lengths[-1].sum())

        # Resuming is timed up to the first batch.
        state, again = stream.state_dict(), stream_at(0, draw, packing)
        start = time.perf_counter()
        again.load_state_dict(state)
        again.next()
        resume = max(resume, time.perf_counter() - start)
        memory.append(resident())

    # The bound is for samples that stay whole; where they are cut, the best is what was reached.
    blocks = best = len(lengths)
    if packing.method == "whole":
        best = fewest_blocks(np.concatenate(lengths), SEQ_LEN)
    fill, best_fill = tokens / blocks / SEQ_LEN, tokens / best / SEQ_LEN
    return (
        f"{tokens / seconds / 1e6:.1f} M | {fill:.2%} | {best_fill:.2%} | "
        f"{resume:.3f} | {memory[0]:.0f} -> {memory[-1]:.0f}"
    )


def fewest_blocks(lengths: np.ndarray, seq_len: int) -> int:
    """Martello and Toth's bound L2: no packing of samples of these lengths has fewer blocks.

    For blocks of 10 and samples of 8, 6, 5 and 3, counting those of 3 or more: the 8 is alone, as
    none of them fits beside it. The 6 needs a block, too, and leaves 4 of it. The 5 and the 3 have
    8 tokens, 4 more than that, which takes a third block. The bound is the largest one by any
    shortest length that is counted.
    """

    def bound(least: int) -> int:
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


# -------------------------------------------------------------------------------- what queries see


def draw_marked(length: int, position: int, rng: np.random.Generator) -> Sample:
    """Draw a pair with 0 to 3 retrieved ones, whose ids tell the document that they are of.

    Their captions have `length` tokens.

    Document k has the k-th text id and the k-th code over and over; the query is document 0, and
    the one before it is document 1.
    """
    text, image = VOCAB.id_range("text")[0], VOCAB.id_range("image")[0]
    documents = []
    for k in range(int(rng.integers(4)) + 1):
        caption = TokenSegment("text", np.full(length, text + k))
        codes = TokenSegment("image", np.full(CODES, image + k))
        documents.append(TokenDocument(f"{position}-{k}", (caption, codes)))
    return Sample(documents[0], tuple(reversed(documents[1:])))


def measure_sight(method: str, length: int, blocks: int) -> str:
    """The columns of a row on what the image tokens of queries see,
    with captions of `length` tokens.

    They are the fill; the shares of these tokens with 0, 1, 2 and 3 whole documents before them;
    the same with documents of which at least 90 % is there; the share without their whole caption;
    and the share of positions with a loss.
    """
    objective = OBJECTIVES.build("causal", vocab=VOCAB)
    packing = PackingConfig(method=method)  # type: ignore[arg-type]
    stream = BlockStream(
        partial(draw_marked, length),
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
            # What of each document of the sample is in this block.
            piece_T = batch.ids_BT[batch.sample_BT == number].numpy()
            captions_K = np.array([(piece_T == text + k).sum() for k in range(4)])
            codes_K = np.array([(piece_T == image + k).sum() for k in range(4)])
            share_K = (captions_K[1:] + codes_K[1:]) / (length + CODES)

            # The query's tokens in the block see the same documents.
            asked = int(codes_K[0])
            queries += asked
            without_caption += asked * (captions_K[0] < length)
            whole[(share_K == 1).sum()] += asked
            nearly[(share_K >= 0.9).sum()] += asked

    shares = []
    for counts in (whole, nearly):
        shares.append(" / ".join(f"{100 * count / queries:.1f}" for count in counts))
    positions = blocks * SEQ_LEN
    return (
        f"{filled / positions:.2%} | {' | '.join(shares)} | {without_caption / queries:.1%} | "
        f"{targets / positions:.1%}"
    )


# ------------------------------------------------------------------------------------------- peers


def group_texts(documents: list[list[int]]) -> torch.Tensor:
    """Blocks (B, T) by run_clm's recipe for a batch of documents, and tensors as it makes them."""
    concatenated = list(chain(*documents))
    total = len(concatenated) // SEQ_LEN * SEQ_LEN
    blocks = [concatenated[i : i + SEQ_LEN] for i in range(0, total, SEQ_LEN)]

    # The recipe copies the blocks as labels, and its collator makes tensors of both.
    labels = blocks.copy()
    return torch.stack([torch.tensor(blocks), torch.tensor(labels)])[0]


def group_arrays(documents: list[np.ndarray]) -> torch.Tensor:
    """The same blocks in numpy."""
    concatenated = np.concatenate(documents)
    total = len(concatenated) // SEQ_LEN * SEQ_LEN
    blocks = concatenated[:total].reshape(-1, SEQ_LEN)
    return torch.stack([torch.from_numpy(blocks), torch.from_numpy(blocks.copy())])[0]


def padded(documents: list[np.ndarray]) -> torch.Tensor:
    """Blocks (B, T) of whole documents in their order; one that does not fit begins a new block."""
    blocks: list[list[torch.Tensor]] = [[]]
    room = SEQ_LEN
    for ids_T in documents:
        if len(ids_T) > room:
            blocks.append([])
            room = SEQ_LEN
        blocks[-1].append(torch.from_numpy(ids_T))
        room -= len(ids_T)

    rows = []
    for block in blocks:
        ids_T = torch.cat(block)
        rows.append(torch.nn.functional.pad(ids_T, (0, SEQ_LEN - len(ids_T)), value=VOCAB.pad))
    return torch.stack(rows)


def thousands(corpus: Corpus, count: int) -> Iterator[list[np.ndarray]]:
    """Batches of a thousand documents, laid out without retrieved ones."""
    for first in range(0, count, 1000):
        batch = []
        for position in range(first, first + 1000):
            pair = corpus.pair(shuffled(0, position, corpus.documents))
            batch.append(lay_out(Sample(pair), VOCAB).ids_T)
        yield batch


def measure_peer(make: Callable[[list], torch.Tensor], batches: Iterator[list]) -> str:
    """The first two columns of a row; only `make` is timed, not how documents are laid out."""
    tokens, positions, seconds = 0, 0, 0.0
    for documents in batches:
        start = time.perf_counter()
        blocks_BT = make(documents)
        seconds += time.perf_counter() - start
        tokens += int((blocks_BT != VOCAB.pad).sum())
        positions += blocks_BT.numel()
    return f"{tokens / seconds / 1e6:.1f} M | {tokens / positions:.2%} | | | "


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
    parser.add_argument("--sight", action="store_true", help="make only the last table")
    arguments = parser.parse_args()
    places, batches = arguments.places, arguments.batches

    torch.set_num_threads(1)
    discover()
    if arguments.sight:
        print_sight(10 * batches)
        return
    corpus = Corpus(arguments.documents)
    print(f"{arguments.documents:,} documents, blocks of {SEQ_LEN:,}, ", end="")
    print(f"{LANES} blocks a batch, one core\n")
    print("| batches | tokens/s | fill | best fill | resume, s | memory, MB |")
    print("|---|---|---|---|---|---|")
    stream, whole = PackingConfig(method="stream"), PackingConfig()
    together = PackingConfig(method="together")
    for name, draw in (("pairs", corpus.draw_pairs), ("pairs and text", corpus.draw_mixed)):
        for packing in (stream, whole, PackingConfig(window=256), together):
            window = "" if packing.method == "stream" else f", window {packing.window}"
            columns = measure(draw, packing, arguments.documents, places, batches)
            print(f"| {name}, CM3, {packing.method}{window} | {columns} |", flush=True)

    title = f"{arguments.on_disk:,} pairs in shards on disk, CM3"
    with tempfile.TemporaryDirectory() as folder:
        draw = OnDisk(corpus, arguments.on_disk, Path(folder)).draw
        for packing in (stream, whole, together):
            columns = measure(draw, packing, arguments.on_disk, places, batches)
            print(f"| {title}, {packing.method} | {columns} |", flush=True)

    # Lists are made of arrays before they are timed.
    lists = ([ids_T.tolist() for ids_T in documents] for documents in thousands(corpus, 5000))
    print(f"| peer: group_texts, lists | {measure_peer(group_texts, lists)} |")
    print(f"| peer: group_texts, numpy | {measure_peer(group_arrays, thousands(corpus, 5000))} |")
    columns = measure_peer(padded, thousands(corpus, 5000))
    print(f"| peer: whole documents in order, padded | {columns} |")

    print_sight(10 * batches)


def print_sight(blocks: int) -> None:
    """Print the table of what queries see, for captions of several lengths."""
    print(f"\nDocuments of a caption and {CODES} codes, 0 to 3 retrieved, causal:\n")
    print("| caption | packing | fill | 0/1/2/3 whole documents, % | 90 % of them, % ", end="")
    print("| no caption | loss |\n|---|---|---|---|---|---|---|")
    for length in MARKED_CAPTIONS:
        for method in ("stream", "whole", "together"):
            columns = measure_sight(method, length, blocks)
            print(f"| {length} | {method} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
