"""Samples are packed into blocks, and any number of ranks share one stream of batches of them."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from samples import VOCAB, document, documents, segment, unrotate

from cm3leon.config import from_mapping
from cm3leon.data.shuffle import shuffled
from cm3leon.experiment import load_experiment
from cm3leon.objectives.base import Corrupted
from cm3leon.objectives.block_stream import BlockStream, merge_states
from cm3leon.objectives.packing import PackingConfig, choose, collate, fit, pack, shorten
from cm3leon.registry import OBJECTIVES, discover
from cm3leon.tokenizers.document import lay_out, sample_length
from cm3leon.tokenizers.layout import PAPER
from cm3leon.types import Batch, Sample, TokenDocument, TokenSegment, UserError

discover()

CPU = torch.device("cpu")
METHODS = ["stream", "whole", "together"]

# ---------------------------------------------------------------------------------------- one block

packable = st.lists(st.integers(1, 9), max_size=6).flatmap(
    lambda lengths: st.tuples(
        st.just(lengths), st.integers(sum(lengths), sum(lengths) + 7).filter(bool)
    )
)


def test_samples_are_packed_together_unless_it_is_said_otherwise() -> None:
    assert PackingConfig().method == "together"
    assert not PackingConfig().run_on

    # What was measured with another method still names it.
    for name in (
        "digits",
        "demo",
        "experiments/scenes/model.yaml",
        "experiments/entities/model.yaml",
    ):
        assert load_experiment(name).packing.method == "whole", name


@given(packable, st.booleans())
def test_packing(drawn: tuple[list[int], int], run_on: bool) -> None:
    lengths, seq_len = drawn
    samples = [
        Corrupted(np.arange(n) + 100 * k, (np.arange(n) + 1.0) / 8 + k)
        for k, n in enumerate(lengths)
    ]

    block = pack(samples, seq_len, pad=77, run_on=run_on)
    for array in (block.ids_T, block.target_T, block.weight_T, block.sample_T, block.position_T):
        assert array.shape == (seq_len,)

    start = 0
    for number, sample in enumerate(samples):
        end = start + len(sample.ids_T)
        assert block.ids_T[start:end].tolist() == sample.ids_T.tolist()
        first = start if run_on else 0
        assert block.position_T[start:end].tolist() == list(range(first, first + end - start))
        assert (block.sample_T[start:end] == number).all()

        # Each token but the first is the target of the one before it, with its own weight.
        assert block.target_T[start : end - 1].tolist() == sample.ids_T[1:].tolist()
        assert block.weight_T[start : end - 1].tolist() == sample.weight_T[1:].tolist()
        assert block.weight_T[end - 1] == 0

        start = end

    # What is left of the block is padding without loss.
    assert (block.ids_T[start:] == 77).all()
    assert (block.sample_T[start:] == -1).all()
    assert (block.weight_T[start:] == 0).all()


def test_blocks_become_a_batch_with_their_types() -> None:
    blocks = [pack([Corrupted(np.arange(3), np.ones(3, np.float32))], 5, 0), pack([], 5, 0)]
    batch = collate(blocks, CPU)
    assert batch.ids_BT.shape == (2, 5)
    assert (batch.ids_BT.dtype, batch.weight_BT.dtype) == (torch.int64, torch.float32)
    assert batch.ids_BT.tolist() == [block.ids_T.tolist() for block in blocks]
    assert batch.target_BT.tolist() == [block.target_T.tolist() for block in blocks]
    assert batch.weight_BT.tolist() == [block.weight_T.tolist() for block in blocks]
    assert batch.sample_BT.tolist() == [block.sample_T.tolist() for block in blocks]
    assert batch.position_BT.tolist() == [block.position_T.tolist() for block in blocks]


@given(documents, st.lists(documents, max_size=4).map(tuple), st.integers(1, 120))
def test_fit_drops_retrieved_documents_from_the_left(
    query: TokenDocument, retrieved: tuple[TokenDocument, ...], seq_len: int
) -> None:
    sample = Sample(query, retrieved)
    assume(sample_length(Sample(query), PAPER) <= seq_len)

    fitted = fit(sample, seq_len, PAPER)
    assert fitted.query is query
    kept = len(fitted.retrieved)
    nearest = retrieved[len(retrieved) - kept :]
    assert all(a is b for a, b in zip(fitted.retrieved, nearest, strict=True))
    assert len(lay_out(fitted, VOCAB).ids_T) <= seq_len

    # One document more would not fit.
    if kept < len(retrieved):
        one_more = Sample(query, retrieved[len(retrieved) - kept - 1 :])
        assert len(lay_out(one_more, VOCAB).ids_T) > seq_len


def test_a_query_that_does_not_fit_is_one_sentence() -> None:
    query = document(6, 4, name="photo 7")  # 2 <eos>, 6 + 4 tokens, a <break>
    assert fit(Sample(query, (document(1),)), 13, PAPER).retrieved == ()
    with pytest.raises(UserError) as refusal:
        fit(Sample(query, (document(1),)), 12, PAPER)
    assert str(refusal.value) == (
        "model.seq_len: document photo 7 takes 13 tokens, a block holds 12; raise model.seq_len"
    )


# -------------------------------------------------------------------------------- stream of batches


def numbered(position: int, rng: np.random.Generator) -> Sample:
    """A sample whose last text spells its position, with up to two random retrieved documents."""
    spelled = np.array([4 + position // 30, 4 + position % 30])
    retrieved = tuple(document(int(n), 5) for n in rng.integers(1, 12, size=int(rng.integers(3))))
    query = (TokenSegment("text", spelled), segment("image", 4 + position % 4))
    return Sample(TokenDocument(f"{position}", query), retrieved)


def stream(
    method: str = "whole",
    *,
    seed: int = 0,
    batch_size: int = 4,
    seq_len: int = 64,
    draw: Any = numbered,
    objective: Any = "cm3",
    rank: int = 0,
    ranks: int = 1,
    **packing: Any,
) -> BlockStream:
    return BlockStream(
        draw,
        OBJECTIVES.build(objective, vocab=VOCAB),
        from_mapping(PackingConfig, {"method": method, "window": 6, **packing}),
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        device=CPU,
        rank=rank,
        ranks=ranks,
    )


def laid_out(
    position: int, seed: int = 0, draw: Any = numbered, seq_len: int | None = None
) -> list[int]:
    """Ids of the sample at a position of the stream."""
    sample = draw(position, np.random.default_rng([seed, 1, position]))
    if seq_len is not None:
        sample = fit(sample, seq_len, PAPER)
    return lay_out(sample, VOCAB).ids_T.tolist()


def pieces(ids_T: torch.Tensor, sample_T: torch.Tensor) -> Iterator[list[int]]:
    """The pieces of a block in order, each as the part of a sample from which it was made."""
    for number in range(int(sample_T.max()) + 1):
        yield unrotate(ids_T[sample_T == number].numpy(), VOCAB).tolist()


def position_of(whole: list[int]) -> int:
    """Position of a `numbered` sample in the stream."""
    last = len(whole) - 1 - whole[::-1].index(VOCAB.brk)
    return (whole[last - 2] - 4) * 30 + whole[last - 1] - 4


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def interleaved(batches: list[Batch]) -> Batch:
    """The global batch, of which rank r of R has every R-th block from r on."""
    fields = {}
    for name in vars(batches[0]):
        of_ranks = [getattr(batch, name) for batch in batches]
        fields[name] = torch.stack(of_ranks, 1).flatten(0, 1)
    return Batch(**fields)


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_and_seeds_differ(method: str) -> None:
    first, second, other = stream(method), stream(method), stream(method, seed=1)
    batches = [(first.next(), second.next(), other.next()) for _ in range(5)]
    assert all(same(a, b) for a, b, _ in batches)
    assert not any(same(a, c) for a, _, c in batches)


@pytest.mark.parametrize("objective", ["cm3", "causal", {"name": "cm3", "mean_spans": 5.0}])
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 40), (3, 40), (4, 64), (2, 9), (2, 200)])
def test_stream_lanes_are_their_samples_end_to_end(
    batch_size: int, seq_len: int, objective: Any
) -> None:
    """A lane's pieces, put together, are the samples at its positions; no position is padding."""
    blocks = stream("stream", batch_size=batch_size, seq_len=seq_len, objective=objective)
    lanes: list[list[int]] = [[] for _ in range(batch_size)]
    for _ in range(600 // seq_len + 2):
        batch = blocks.next()
        assert (batch.sample_BT >= 0).all()
        assert batch.position_BT.tolist() == [list(range(seq_len))] * batch_size
        for lane, ids_T, sample_T in zip(lanes, batch.ids_BT, batch.sample_BT, strict=True):
            for part in pieces(ids_T, sample_T):
                lane += part

    # Lane k of B holds the samples k, k + B, k + 2 B and so on.
    for first, lane in enumerate(lanes):
        expected: list[int] = []
        for position in range(first, 900, batch_size):
            if len(expected) >= len(lane):
                break
            expected += laid_out(position)
        assert lane == expected[: len(lane)]


def test_stream_pieces_of_different_samples_are_apart() -> None:
    blocks = stream("stream", seq_len=48)
    for _ in range(30):
        batch = blocks.next()
        for ids_T, sample_T in zip(batch.ids_BT, batch.sample_BT, strict=True):
            found = list(pieces(ids_T, sample_T))
            assert all(VOCAB.eos not in part[1:-1] for part in found)
            assert all(part[0] == VOCAB.eos for part in found[1:])
            assert all(part[-1] == VOCAB.eos for part in found[:-1])


def test_stream_has_every_token_of_an_epoch_once() -> None:
    """Four lanes with ten samples each hold each of 40 shuffled documents once."""
    count = 40

    def draw(position: int, _: np.random.Generator) -> Sample:
        return numbered(shuffled(5, position, count), np.random.default_rng(0))

    blocks = stream("stream", draw=draw, seq_len=32)
    lanes: list[list[int]] = [[], [], [], []]
    while not all(lane.count(VOCAB.eos) >= 20 for lane in lanes):
        batch = blocks.next()
        for lane, ids_T, sample_T in zip(lanes, batch.ids_BT, batch.sample_BT, strict=True):
            lane += itertools.chain.from_iterable(pieces(ids_T, sample_T))

    # A sample stands between two `<eos>`.
    found = []
    for lane in lanes:
        ends = np.flatnonzero(np.array(lane) == VOCAB.eos)
        found += [tuple(lane[ends[k] : ends[k + 1] + 1]) for k in range(0, 20, 2)]
    expected = []
    for number in range(count):
        sample = numbered(number, np.random.default_rng(0))
        expected.append(tuple(lay_out(sample, VOCAB).ids_T.tolist()))
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("objective", ["cm3", "causal"])
@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 40), (3, 40), (4, 64), (2, 200)])
def test_whole_has_each_sample_once_and_uncut(
    batch_size: int, seq_len: int, objective: str
) -> None:
    blocks = stream("whole", batch_size=batch_size, seq_len=seq_len, objective=objective)
    seen: list[list[int]] = [[] for _ in range(batch_size)]
    for _ in range(2400 // seq_len // batch_size):
        batch = blocks.next()
        for lane, ids_T, sample_T in zip(seen, batch.ids_BT, batch.sample_BT, strict=True):
            for whole in pieces(ids_T, sample_T):
                lane.append(position_of(whole))
                assert whole == laid_out(lane[-1], seq_len=seq_len)

    # What a lane has drawn was either in a block or waits in the lane's pool.
    state = blocks.state_dict()["lanes"]
    for first, lane in enumerate(seen):
        drawn = range(first, state[str(first)]["next"], batch_size)
        assert sorted(lane + state[str(first)]["pool"]) == list(drawn)


# ----------------------------------------------------------------------------------------- together

CAPTION, CODES = 20, 1024
"""Tokens of a document at the paper's size."""


def marked(position: int, rng: np.random.Generator) -> Sample:
    """A sample of the paper's size with 0 to 3 retrieved documents, whose tokens name the document.

    The ids of document k, counted from the query, are 4 + k in its text and code k in its image.
    """
    return marked_with([CAPTION] * (int(rng.integers(4)) + 1), position)


def marked_with(captions: list[int], position: int) -> Sample:
    """A `marked` sample whose documents, the query first, have captions of these lengths."""
    text, image = VOCAB.id_range("text")[0], VOCAB.id_range("image")[0]
    documents_ = []
    for k, length in enumerate(captions):
        caption = TokenSegment("text", np.full(length, text + k))
        codes = TokenSegment("image", np.full(CODES, image + k))
        documents_.append(TokenDocument(f"{position}-{k}", (caption, codes)))
    return Sample(documents_[0], tuple(reversed(documents_[1:])))


def whole_documents(piece_T: np.ndarray) -> list[int]:
    """Number of tokens of each document in a piece of a `marked` sample; the query comes first."""
    text, image = VOCAB.id_range("text")[0], VOCAB.id_range("image")[0]
    return [int(np.isin(piece_T, (text + k, image + k)).sum()) for k in range(4)]


def test_together_fills_blocks_and_keeps_queries_whole() -> None:
    """At the paper's size blocks are 99 % full, and most retrieved documents are whole.

    Each query is whole and follows its caption.
    """
    seq_len = 4096
    blocks = stream(
        "together", draw=marked, objective="causal", seq_len=seq_len, batch_size=2, window=64
    )

    used, seen, lost = 0, np.zeros(4), []
    for _ in range(150):
        batch = blocks.next()
        used += int((batch.sample_BT >= 0).sum())
        for ids_T, sample_T in zip(batch.ids_BT, batch.sample_BT, strict=True):
            cut = 0
            for part in pieces(ids_T, sample_T):
                query, *retrieved = whole_documents(np.array(part))
                assert query == CAPTION + CODES
                seen[sum(tokens == CAPTION + CODES for tokens in retrieved)] += 1

                # All documents but the farthest are whole.
                there = [tokens for tokens in retrieved if tokens]
                assert there[:-1] == [CAPTION + CODES] * len(there[:-1])
                if there and there[-1] < CAPTION + CODES:
                    cut += 1
                    lost.append(CAPTION + CODES - there[-1])
            assert cut <= 1

    assert used / (300 * seq_len) >= 0.99

    # A quarter of the samples each was drawn with 0, 1, 2 and 3 documents. Three of them and the
    # query make 4,185 tokens, so that the third loses 89. A sample with two shares its block with
    # one that has none, two samples with one share a block, and one document of each such block
    # loses 90. The `<break>` between text and image may be among these.
    shares = seen / seen.sum()
    assert shares == pytest.approx([0.375, 0.375, 0.25, 0], abs=0.04)
    assert set(lost) == {88, 89}


@pytest.mark.parametrize(
    ("captions", "objective"),
    [((20, 20), "cm3"), ((70, 70), "causal"), ((140, 140), "causal"), ((20, 120), "cm3")],
)
def test_together_fills_blocks_whatever_the_length_of_captions(
    captions: tuple[int, int], objective: str
) -> None:
    def draw(position: int, rng: np.random.Generator) -> Sample:
        count = int(rng.integers(4)) + 1
        lengths = rng.integers(captions[0], captions[1] + 1, size=count)
        return marked_with(lengths.tolist(), position)

    blocks = stream(
        "together", draw=draw, objective=objective, seq_len=4096, batch_size=1, window=64
    )
    filled = [float((blocks.next().sample_BT >= 0).float().mean()) for _ in range(60)]
    assert np.mean(filled) >= 0.99


def test_whole_and_stream_hide_what_was_retrieved() -> None:
    """The figures for which `together` exists: the documents that queries see without it."""
    seen = {}
    for method in ("stream", "whole"):
        blocks = stream(
            method, draw=marked, objective="causal", seq_len=4096, batch_size=2, window=64
        )

        tokens = np.zeros(4)
        for _ in range(150):
            batch = blocks.next()
            for ids_T, sample_T in zip(batch.ids_BT, batch.sample_BT, strict=True):
                for part in pieces(ids_T, sample_T):
                    query, *retrieved = whole_documents(np.array(part))

                    # Count the query's tokens by the number of whole documents that they see.
                    tokens[sum(n == CAPTION + CODES for n in retrieved)] += query

        seen[method] = tokens / tokens.sum()
    assert seen["stream"][0] == pytest.approx(0.54, abs=0.05)
    assert seen["stream"][3] < 0.06
    assert seen["whole"][3] == 0


@given(documents, st.lists(documents, max_size=4).map(tuple), st.integers(1, 120))
def test_shortening_takes_from_the_beginning_of_the_farthest_document(
    query: TokenDocument, retrieved: tuple[TokenDocument, ...], length: int
) -> None:
    sample = Sample(query, retrieved)
    assume(sample_length(Sample(query), PAPER) <= length)
    short, is_cut = shorten(sample, length, PAPER)
    full_T = lay_out(sample, VOCAB).ids_T.tolist()
    ids_T = lay_out(short, VOCAB).ids_T.tolist()
    assert short.query is query
    assert len(ids_T) <= length

    # What is left is the sample's end, behind its opening <eos>.
    assert ids_T[0] == VOCAB.eos
    assert ids_T[1:] == full_T[len(full_T) - len(ids_T) + 1 :]

    # Nothing is lost that had room, except a <break> with nothing before it.
    if len(full_T) > length:
        begins = len(full_T) - len(ids_T)
        separators = 0
        while separators < length - len(ids_T):
            assert full_T[begins - separators] == VOCAB.brk
            separators += 1
    else:
        assert short == sample

    kept = short.retrieved[is_cut:]
    assert kept == retrieved[len(retrieved) - len(kept) :]


first_text = VOCAB.id_range("text")[0]


@pytest.mark.parametrize(
    ("length", "begins"),
    [
        (30, [first_text, first_text + 1, first_text + 2]),  # all of it
        (29, [first_text + 1, first_text + 2]),
        (28, [first_text + 2]),
        (27, [VOCAB.image_start]),  # with the text, its <break> is lost: 26 tokens are left
        (26, [VOCAB.image_start]),
        (25, [VOCAB.image_start + 1]),
        (23, [VOCAB.image_start + 3]),
        (22, [7, 8]),  # the image is used up: the next document, whole
    ],
)
def test_where_a_cut_document_begins(length: int, begins: list[int]) -> None:
    farthest = document(3, 4)
    near = TokenDocument("near", (TokenSegment("text", np.array([7, 8])), segment("image", 6)))
    query = document(4, 4)
    sample = Sample(query, (farthest, near))

    # The documents' 7 + 8 + 8 tokens, five <break> and two <eos>.
    assert sample_length(sample, PAPER) == 30
    short, is_cut = shorten(sample, length, PAPER)

    ids_T = lay_out(short, VOCAB).ids_T.tolist()
    assert ids_T[1 : 1 + len(begins)] == begins
    assert is_cut == (22 < length < 30)


@pytest.mark.parametrize("objective", ["causal", {"name": "cm3", "mean_spans": 0.0}])
def test_a_document_without_its_beginning_is_no_target(objective: Any) -> None:
    """A sample of 30 tokens loses the first two of its farthest document in a block of 28.

    What is left of that document, `T <break> I I I I <break>` behind `<eos>`, carries no loss.
    """
    sample = Sample(document(4, 4), (document(3, 4), document(2, 6)))

    def weights(seq_len: int) -> list[float]:
        blocks = stream(
            "together",
            draw=lambda *_: sample,
            objective=objective,
            batch_size=1,
            seq_len=seq_len,
            window=1,
        )
        return blocks.next().weight_BT[0].tolist()

    # A target stands one position before its token: the first is the near document's first token.
    assert weights(28) == [0] * 7 + [1] * 20 + [0]
    assert weights(30) == [1] * 29 + [0]


@given(st.integers(0, 2**16), st.sampled_from(["cm3", "causal", "instruct"]))
@settings(max_examples=30)
def test_together_masks_spans_of_whole_documents_only(seed: int, objective: str) -> None:
    """A cut document stays as it is, and no span of it is taken.

    So every piece, rotated back, is the end of a sample.
    """
    blocks = stream("together", seed=seed, seq_len=33, objective=objective, batch_size=1, window=3)
    for _ in range(6):
        batch = blocks.next()
        for part in pieces(batch.ids_BT[0], batch.sample_BT[0]):
            full = laid_out(position_of(part), seed=seed)
            assert part[0] == VOCAB.eos
            assert part[1:] == full[len(full) - len(part) + 1 :]


def test_together_has_each_sample_once() -> None:
    blocks = stream("together", batch_size=2, seq_len=64)
    seen: list[list[int]] = [[], []]
    for _ in range(20):
        batch = blocks.next()
        for lane, ids_T, sample_T in zip(seen, batch.ids_BT, batch.sample_BT, strict=True):
            lane += [position_of(part) for part in pieces(ids_T, sample_T)]

    state = blocks.state_dict()["lanes"]
    for first, lane in enumerate(seen):
        drawn = range(first, state[str(first)]["next"], 2)
        assert sorted(lane + state[str(first)]["pool"]) == list(drawn)


def test_together_refuses_a_query_longer_than_a_block() -> None:
    sample = Sample(document(6, 4, name="photo 7"), (document(1),))
    blocks = stream("together", draw=lambda *_: sample, batch_size=1, seq_len=12)
    with pytest.raises(UserError, match="document photo 7 takes 13 tokens, a block holds 12"):
        blocks.next()


@given(
    st.lists(st.integers(1, 30), max_size=8),
    st.integers(1, 40),
    st.integers(0, 5),
    st.integers(0, 9),
)
@settings(max_examples=200)
def test_choice_that_may_exceed_the_room(
    lengths: list[int], room: int, tolerance: int, over: int
) -> None:
    chosen = choose(lengths, room, tolerance, over)

    # The best total by trying all subsets.
    sizes = range(len(lengths) + 1)
    subsets = itertools.chain.from_iterable(itertools.combinations(lengths, n) for n in sizes)
    nearest = min(abs(room - total) for total in map(sum, subsets) if total <= room + over)

    total = sum(lengths[k] for k in chosen)
    assert len(set(chosen)) == len(chosen)
    assert total <= room + over
    assert abs(room - total) <= nearest + tolerance


def lengths_draw(lengths: np.ndarray) -> Any:
    """A source of documents of one text each, whose lengths with both `<eos>` are these in turn."""
    return lambda position, _: Sample(document(int(lengths[position % len(lengths)]) - 2))


def blocks_of_lengths(batch: Batch) -> list[list[int]]:
    found = []
    for ids_T, sample_T in zip(batch.ids_BT, batch.sample_BT, strict=True):
        found.append([len(part) for part in pieces(ids_T, sample_T)])
    return found


@given(st.lists(st.integers(1, 30), max_size=9), st.integers(0, 40), st.integers(0, 5))
@settings(max_examples=200)
def test_choice_against_all_choices(lengths: list[int], room: int, tolerance: int) -> None:
    chosen = choose(lengths, room, tolerance)

    # The best total by trying all subsets.
    sizes = range(len(lengths) + 1)
    subsets = itertools.chain.from_iterable(itertools.combinations(lengths, n) for n in sizes)
    best = max(total for total in map(sum, subsets) if total <= room)
    assert len(set(chosen)) == len(chosen)
    assert best - tolerance <= sum(lengths[k] for k in chosen) <= best
    left = room - sum(lengths[k] for k in chosen)
    assert all(length > left for k, length in enumerate(lengths) if k not in chosen)

    # Where any total is tolerated, the longest that fits is taken each time.
    greedy: list[int] = []
    for length in sorted(lengths, reverse=True):
        if sum(greedy) + length <= room:
            greedy.append(length)
    assert [lengths[k] for k in choose(lengths, room, room)] == greedy


def test_choice_of_the_longest_and_of_the_first_of_equals() -> None:
    assert choose([5, 4, 4, 3], 8, 0) == [0, 3]
    assert choose([5, 4, 4, 3], 9, 0) == [0, 1]
    assert choose([6, 4, 4], 8, 0) == [1, 2]
    assert choose([6, 4, 4], 8, 2) == [0]


@given(st.lists(st.integers(2, 64), min_size=1, max_size=40), st.integers(1, 12))
@settings(max_examples=30)
def test_whole_starts_with_the_oldest_of_its_pool(lengths: list[int], window: int) -> None:
    blocks = stream(
        draw=lengths_draw(np.array(lengths)), objective="causal", batch_size=1, window=window
    )

    # The pool of the packer, kept by hand: a block takes its oldest and some of the others, and
    # no length that is left over would still fit.
    pool: list[int] = []
    position = 0
    for _ in range(10):
        while len(pool) < window:
            pool.append(lengths[position % len(lengths)])
            position += 1
        (block,) = blocks_of_lengths(blocks.next())
        assert block[0] == pool.pop(0)
        for length in block[1:]:
            pool.remove(length)
        assert all(sum(block) + length > 64 for length in pool)


def first_fit(lengths: list[int], seq_len: int) -> int:
    """Number of blocks that first-fit opens for samples that come in this order."""
    room: list[int] = []
    for length in lengths:
        place = next((k for k, left in enumerate(room) if left >= length), None)
        if place is None:
            room.append(seq_len - length)
        else:
            room[place] -= length
    return len(room)


@pytest.mark.parametrize(("low", "high"), [(2, 64), (2, 30), (10, 40), (20, 33)])
@pytest.mark.parametrize("seed", range(3))
def test_whole_fills_blocks_at_least_as_first_fit_does(low: int, high: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(low, high + 1, 3000)
    blocks = stream(draw=lengths_draw(lengths), objective="causal", batch_size=1, window=256)
    packed: list[list[int]] = []
    while sum(map(len, packed)) < 2700:
        packed += blocks_of_lengths(blocks.next())

    fill = sum(map(sum, packed)) / (64 * len(packed))
    assert fill >= lengths.sum() / (64 * first_fit(lengths.tolist(), 64))


@pytest.mark.parametrize("method", METHODS)
def test_positions_as_configured(method: str) -> None:
    run_on = stream(method, positions="run_on").next()
    restart = stream(method, positions="restart").next()
    auto = stream(method).next()
    assert same(auto, run_on if method == "stream" else restart)

    assert (run_on.position_BT == torch.arange(64)).all()
    for position_T, sample_T in zip(restart.position_BT, restart.sample_BT, strict=True):
        for number in range(int(sample_T.max()) + 1):
            length = int((sample_T == number).sum())
            assert position_T[sample_T == number].tolist() == list(range(length))

    # The positions are all that differs, and only `stream` promises full blocks.
    assert torch.equal(run_on.ids_BT, restart.ids_BT)
    used_BT = run_on.sample_BT >= 0
    assert used_BT.all() or method != "stream"


@pytest.mark.parametrize("method", METHODS)
def test_targets_are_the_next_tokens_of_the_same_piece(method: str) -> None:
    blocks = stream(method)
    for _ in range(10):
        batch = blocks.next()

        # A position is followed if the next one is of the same piece and not padding.
        sample_BT = batch.sample_BT
        followed_BT = torch.zeros_like(batch.ids_BT, dtype=torch.bool)
        followed_BT[:, :-1] = (sample_BT[:, 1:] == sample_BT[:, :-1]) & (sample_BT[:, 1:] >= 0)
        next_BT = batch.ids_BT.roll(-1, 1)
        assert torch.equal(batch.target_BT[followed_BT], next_BT[followed_BT])

        # Sentinels carry no loss; neither do documents that lack their beginning, which only
        # `together` makes.
        sentinel_BT = torch.from_numpy(VOCAB.is_sentinel(next_BT.numpy()))
        expected_BT = (followed_BT & ~sentinel_BT).float()
        if method == "together":
            assert (batch.weight_BT <= expected_BT).all()
        else:
            assert torch.equal(batch.weight_BT, expected_BT)


def test_a_document_is_corrupted_anew_each_time() -> None:
    for method in METHODS:
        blocks = stream(method, draw=lambda position, rng: Sample(document(8, 16)))
        found = []
        for _ in range(20):
            batch = blocks.next()
            found += [tuple(ids_T.tolist()) for ids_T in batch.ids_BT]
        assert len(set(found)) > len(found) / 2


# --------------------------------------------------------------------------------- resume and ranks


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(copy.deepcopy(state)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", range(8))
def test_resumes_bit_for_bit(method: str, step: int) -> None:
    whole = stream(method)
    for _ in range(step):
        whole.next()

    # A stream that was already used can be set back, too.
    resumed = stream(method)
    resumed.next()

    resumed.load_state_dict(through_json(whole.state_dict()))
    for _ in range(6):
        assert same(whole.next(), resumed.next())
    assert whole.state_dict() == resumed.state_dict()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", [(1, 2, 4), (4, 1, 2), (2, 4, 1)])
def test_the_number_of_ranks_may_change_midway(method: str, path: tuple[int, ...]) -> None:
    """Ranks that start from the merged state make the same global batches, however many."""
    alone, state = stream(method), None
    for ranks in path:
        shares = [stream(method, rank=rank, ranks=ranks) for rank in range(ranks)]
        for share in shares:
            if state is not None:
                share.load_state_dict(state)

        for _ in range(5):
            batches = [share.next() for share in shares]
            assert all(batch.ids_BT.shape == (4 // ranks, 64) for batch in batches)
            assert same(interleaved(batches), alone.next())

        state = through_json(merge_states([share.state_dict() for share in shares]))
        assert state == alone.state_dict()


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_goes_on_from_its_own_state(method: str) -> None:
    share, again = (stream(method, rank=1, ranks=2) for _ in range(2))
    for _ in range(3):
        share.next()
    again.load_state_dict(through_json(share.state_dict()))
    assert same(share.next(), again.next())


def test_a_state_stays_small() -> None:
    blocks = stream("stream")
    assert blocks.state_dict()["lanes"]["3"] == {"position": 3, "offset": 0}
    for _ in range(50):
        blocks.next()
    assert len(json.dumps(blocks.state_dict())) < 300


def test_packing_and_batch_size_stay() -> None:
    whole = stream("whole").state_dict()
    for other in (stream("stream"), stream("whole", batch_size=2)):
        with pytest.raises(UserError, match=r"batch_size=.* packing\.method=.* must stay the same"):
            other.load_state_dict(whole)
    with pytest.raises(UserError, match=r"packing\.method=None"):
        stream("whole").load_state_dict({"position": 3})
    with pytest.raises(UserError, match="lacks lane 1 of the batch: merge all ranks' states"):
        stream(rank=1, ranks=2).load_state_dict(stream(rank=0, ranks=2).state_dict())


def test_ranks_share_batches_evenly() -> None:
    with pytest.raises(UserError) as refusal:
        stream(batch_size=6, ranks=4)
    assert str(refusal.value) == "training.batch_size is 6; it must be a multiple of the 4 ranks"


def test_a_document_that_does_not_fit_is_one_sentence_in_whole_and_cut_in_stream() -> None:
    def draw(position: int, rng: np.random.Generator) -> Sample:
        return Sample(document(8, 16, name="photo 7"))

    with pytest.raises(
        UserError,
        match=r"^model\.seq_len: document photo 7 takes 27 tokens, a block holds 20; raise",
    ):
        stream("whole", draw=draw, seq_len=20).next()
    assert (stream("stream", draw=draw, seq_len=20).next().sample_BT >= 0).all()
