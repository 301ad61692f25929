"""Corruption of samples, the loss, packing into blocks, and the stream of batches."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from cm3leon.objectives.base import Corrupted
from cm3leon.objectives.cm3 import EXTRA, Span, rotate, unrotate
from cm3leon.objectives.packing import BlockStream, collate, fit, pack
from cm3leon.registry import OBJECTIVES, discover
from cm3leon.tokenizers.document import LaidOut, lay_out, sample_length
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Batch, Sample, TokenDocument, TokenSegment, UserError

discover()

VOCAB = Vocab(text_size=40, image_size=16, sentinels=8)
CPU = torch.device("cpu")


def cm3(vocab: Vocab = VOCAB, **fields: Any) -> Any:
    return OBJECTIVES.build({"name": "cm3", **fields}, vocab=vocab)


def segment(modality: Any, length: int) -> TokenSegment:
    low, high = VOCAB.id_range(modality)
    return TokenSegment(modality, low + np.arange(length) % (high - low))


def document(*lengths: int, name: str = "document") -> TokenDocument:
    """Segments of these lengths, text and image in turn."""
    return TokenDocument(name, tuple(segment(("text", "image")[k % 2], n) for k, n in enumerate(lengths)))


segments = st.builds(segment, st.sampled_from(["text", "image"]), st.integers(0, 9))
documents = st.lists(segments, min_size=1, max_size=4).map(lambda parts: TokenDocument("any", tuple(parts)))
laid_out = st.builds(Sample, documents, st.lists(documents, max_size=3).map(tuple)).map(lambda s: lay_out(s, VOCAB))
settings_of_cm3 = st.fixed_dictionaries(
    {
        "mean_spans": st.sampled_from([0.0, 1.0, 4.0, 30.0]),
        "placement": st.sampled_from(["segment", "block"]),
        "whole_segment": st.sampled_from([0.0, 0.3, 1.0]),
        "retrieved_weight": st.sampled_from([0.0, 0.1, 1.0]),
    }
)
seeds = st.integers(0, 2**32)


@st.composite
def ids_and_spans(draw: st.DrawFn) -> tuple[np.ndarray, list[Span]]:
    """Any ids without sentinels, and any spans that are in order and apart; touching and empty ones too."""
    ids = draw(st.lists(st.integers(0, VOCAB.sentinel_start - 1), min_size=1, max_size=40))
    ends = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=2 * (VOCAB.sentinels - 1))))
    return np.array(ids, dtype=np.int64), list(zip(ends[::2], ends[1::2], strict=False))


# ------------------------------------------------------------------------------------------------ rotation


def test_the_papers_example_literally() -> None:
    words = {"a": 10, "red": 11, "dog": 12, "<eos>": VOCAB.eos, "<break>": VOCAB.brk, "<mask:0>": VOCAB.sentinel(0)}
    words |= {f"I{n}": VOCAB.image_start + n for n in range(16)} | {"<end_of_span>": VOCAB.end_of_span}
    sample = "<eos> a red dog <break> I7 I2 I9 I4 <eos>"
    rotated = "<eos> a <mask:0> <break> I7 I2 I9 I4 <eos> <mask:0> red dog <end_of_span>"
    ids_T = np.array([words[word] for word in sample.split()])
    rotated_T, source_T = rotate(ids_T, [(2, 4)], VOCAB)
    assert rotated_T.tolist() == [words[word] for word in rotated.split()]
    assert source_T.tolist() == [0, 1, -1, 4, 5, 6, 7, 8, 9, -1, 2, 3, -1]
    assert unrotate(rotated_T, VOCAB).tolist() == ids_T.tolist()


@given(ids_and_spans())
@settings(max_examples=300)
def test_rotation_written_with_lists(drawn: tuple[np.ndarray, list[Span]]) -> None:
    ids_T, spans = drawn
    ids, kept, moved, position = ids_T.tolist(), [], [], 0
    for number, (start, end) in enumerate(spans):
        kept += [*ids[position:start], VOCAB.sentinel(number)]
        moved += [VOCAB.sentinel(number), *ids[start:end], VOCAB.end_of_span]
        position = end
    rotated_T, source_T = rotate(ids_T, spans, VOCAB)
    assert rotated_T.tolist() == kept + ids[position:] + moved
    assert len(rotated_T) == len(ids) + EXTRA * len(spans)
    assert EXTRA == 3
    from_sample = source_T >= 0
    assert rotated_T[from_sample].tolist() == ids_T[source_T[from_sample]].tolist()
    assert sorted(source_T[from_sample].tolist()) == list(range(len(ids)))


@given(ids_and_spans())
@settings(max_examples=300)
def test_any_ids_come_back_from_their_rotation(drawn: tuple[np.ndarray, list[Span]]) -> None:
    ids_T, spans = drawn
    rotated_T, _ = rotate(ids_T, spans, VOCAB)
    assert unrotate(rotated_T, VOCAB).tolist() == ids_T.tolist()


@given(laid_out, settings_of_cm3, seeds, st.integers(0, 40))
@settings(max_examples=300)
def test_any_corrupted_sample_is_whole_and_fits(
    sample: LaidOut, fields: dict[str, Any], seed: int, more_room: int
) -> None:
    corrupted = cm3(**fields).corrupt(sample, np.random.default_rng(seed), len(sample.ids_T) + more_room)
    assert len(corrupted.ids_T) == len(corrupted.weight_T) <= len(sample.ids_T) + more_room
    assert unrotate(corrupted.ids_T, VOCAB).tolist() == sample.ids_T.tolist()
    assert corrupted.weight_T.dtype == np.float32
    again = cm3(**fields).corrupt(sample, np.random.default_rng(seed), len(sample.ids_T) + more_room)
    assert again.ids_T.tolist() == corrupted.ids_T.tolist()


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([1, 56, 10, 1], "sentinels must occur twice"),
        ([1, 56, 57, 1, 57, 10, 3, 56, 11, 3], "in the same order"),
        ([1, 56, 1, 56, 10, 11], "span 0 does not end in <end_of_span>"),
        ([1, 56, 57, 1, 56, 10, 57, 11, 3], "span 0 does not end in <end_of_span>"),
    ],
)
def test_what_no_rotation_made_is_refused(ids: list[int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        unrotate(np.array(ids), VOCAB)


# ------------------------------------------------------------------------------------------------ spans


@given(laid_out, settings_of_cm3, seeds)
@settings(max_examples=300)
def test_spans_are_in_order_apart_and_inside_one_segment(sample: LaidOut, fields: dict[str, Any], seed: int) -> None:
    spans = cm3(**fields).draw_spans(sample, np.random.default_rng(seed), 10_000)
    assert len(spans) <= VOCAB.sentinels - 1
    position = 0
    for start, end in spans:
        assert position <= start < end
        position = end
        assert any(s.start <= start and end <= s.end for s in sample.segments)
        assert not np.isin(sample.ids_T[start:end], [VOCAB.brk, VOCAB.eos]).any()


@given(laid_out, settings_of_cm3, seeds, st.integers(-5, EXTRA - 1))
def test_without_room_for_a_span_the_sample_stays_as_it_is(
    sample: LaidOut, fields: dict[str, Any], seed: int, room: int
) -> None:
    rng = np.random.default_rng(seed)
    corrupted = cm3(**fields).corrupt(sample, rng, len(sample.ids_T) + room)
    assert corrupted.ids_T.tolist() == sample.ids_T.tolist()


# Every span is a whole segment of one token, of so many that two spans hardly ever meet.
MANY_SEGMENTS = lay_out(Sample(document(*[1] * 400)), VOCAB)


@pytest.mark.parametrize(
    ("sentinels", "room", "mean", "most"),
    [(8, 100, 1.0, 7), (8, 9, 1.0, 3), (8, 11, 1.0, 3), (3, 100, 1.0, 2), (8, 100, 3.0, 7), (1, 100, 1.0, 0)],
)
def test_number_of_spans_is_poisson_clamped(sentinels: int, room: int, mean: float, most: int) -> None:
    objective = cm3(Vocab(40, 16, sentinels), mean_spans=mean, whole_segment=1.0)
    rng = np.random.default_rng(0)
    limit = len(MANY_SEGMENTS.ids_T) + room
    draws = 1500
    counts = Counter(len(objective.draw_spans(MANY_SEGMENTS, rng, limit)) for _ in range(draws))
    expected = stats.poisson(mean).pmf(np.arange(most + 1))
    expected[most] = stats.poisson(mean).sf(most - 1)
    assert max(counts) <= most
    for count in range(most + 1):
        deviation = (draws * expected[count] * (1 - expected[count])) ** 0.5
        assert abs(counts[count] - draws * expected[count]) <= 4 * deviation + 1, count


def spans_of(sample: LaidOut, draws: int, **fields: Any) -> list[Span]:
    """The spans of those of many draws that have exactly one."""
    objective, rng = cm3(**fields), np.random.default_rng(1)
    drawn = (objective.draw_spans(sample, rng, 10_000) for _ in range(draws))
    return [spans[0] for spans in drawn if len(spans) == 1]


def near(count: int, draws: int, share: float) -> bool:
    """Whether a count is within four standard deviations of a binomial's mean."""
    return abs(count - draws * share) <= 4 * (draws * share * (1 - share)) ** 0.5


def test_half_the_spans_are_the_querys_and_its_segments_are_even() -> None:
    sample = lay_out(Sample(document(20, 20), (document(20, 20), document(20, 20, 20))), VOCAB)
    spans = spans_of(sample, 6000, mean_spans=0.5)
    owner = Counter(
        next(n for n, s in enumerate(sample.segments) if s.start <= start and end <= s.end) for start, end in spans
    )
    query, retrieved = [5, 6], [0, 1, 2, 3, 4]
    assert near(sum(owner[n] for n in query), len(spans), 0.5)
    assert all(near(owner[n], len(spans), 0.25) for n in query)
    assert all(near(owner[n], len(spans), 0.1) for n in retrieved)


def test_without_retrieved_documents_all_spans_are_the_querys() -> None:
    sample = lay_out(Sample(document(20, 20)), VOCAB)
    owner = Counter(start > 21 for start, _ in spans_of(sample, 3000, mean_spans=0.5))
    assert near(owner[True], owner.total(), 0.5)
    empty_query = lay_out(Sample(document(0, 0), (document(5, 5),)), VOCAB)
    assert {start < 13 for start, _ in spans_of(empty_query, 100)} == {True}


def test_share_of_whole_segments_and_ends_of_the_others() -> None:
    length, draws = 30, 8000
    spans = spans_of(lay_out(Sample(document(length)), VOCAB), draws, mean_spans=0.5)
    pairs = length * (length + 1) / 2  # two different ends of length + 1
    whole = sum(span == (1, 1 + length) for span in spans)
    assert near(whole, len(spans), 0.3 + 0.7 / pairs)
    parts = [(start - 1, end - 1) for start, end in spans if (start, end) != (1, 1 + length)]
    for end in range(length + 1):  # every end is as likely as every other, up to the one pair left out
        share = (length - (end in (0, length))) / (pairs - 1)
        assert near(sum(end in span for span in parts), len(parts), share), end
    assert min(e - s for s, e in parts) == 1


def test_whole_segment_one_and_zero() -> None:
    sample = lay_out(Sample(document(12, 4)), VOCAB)
    assert set(spans_of(sample, 300, whole_segment=1.0)) == {(1, 13), (14, 18)}
    assert len(set(spans_of(sample, 300, whole_segment=0.0))) > 30


def test_literal_placement_hardly_ever_masks_a_caption() -> None:
    """The span of two ends drawn over the whole sample, clipped to the segment that it overlaps most."""
    sample = lay_out(Sample(document(20, 1000)), VOCAB)
    spans = spans_of(sample, 4000, mean_spans=0.5, placement="block")
    assert sum(start < 21 for start, _ in spans) < 0.02 * len(spans)
    start, end, rng = sample.segments[1].start, sample.segments[1].end, np.random.default_rng(5)
    ends = np.sort(rng.integers(end + 1, size=(20_000, 2)), axis=1)
    clipped = np.maximum(ends, start)
    lengths = (clipped[:, 1] - clipped[:, 0])[clipped[:, 1] - clipped[:, 0] > 20]
    drawn = [e - s for s, e in spans if s > 21 and e - s > 20]
    assert stats.ks_2samp(drawn, lengths).pvalue > 1e-4


# ------------------------------------------------------------------------------------------------ weights


@given(laid_out, settings_of_cm3, seeds)
@settings(max_examples=200)
def test_weights(sample: LaidOut, fields: dict[str, Any], seed: int) -> None:
    corrupted = cm3(**fields).corrupt(sample, np.random.default_rng(seed), 10_000)
    spans = cm3(**fields).draw_spans(sample, np.random.default_rng(seed), 10_000)
    assert corrupted.ids_T.tolist() == rotate(sample.ids_T, spans, VOCAB)[0].tolist()
    retrieved = {p for s in sample.segments if not s.is_query for p in range(s.start, s.end)}
    sources = rotate(sample.ids_T, spans, VOCAB)[1].tolist()
    for id_, weight, source in zip(corrupted.ids_T, corrupted.weight_T, sources, strict=True):
        if VOCAB.sentinel_start <= id_ < VOCAB.used:
            assert weight == 0
        else:
            assert weight == np.float32(fields["retrieved_weight"] if source in retrieved else 1.0)


def test_causal_leaves_the_sample_as_it_is() -> None:
    sample = lay_out(Sample(document(5, 4), (document(2, 4),)), VOCAB)
    for seed in range(20):
        corrupted = OBJECTIVES.build("causal", vocab=VOCAB).corrupt(sample, np.random.default_rng(seed), 100)
        assert corrupted.ids_T.tolist() == sample.ids_T.tolist()
        assert (corrupted.weight_T == 1).all()


# ------------------------------------------------------------------------------------------------ loss


def batch_of(target_BT: np.ndarray, weight_BT: np.ndarray, sample_BT: np.ndarray) -> Batch:
    tensors = (torch.from_numpy(a) for a in (target_BT, weight_BT.astype(np.float32), sample_BT))
    target, weight, sample = tensors
    return Batch(torch.zeros_like(target), target, weight, sample, torch.zeros_like(target))


@pytest.mark.parametrize("name", ["cm3", "causal"])
@pytest.mark.parametrize("seed", range(5))
def test_loss_against_its_formula_in_float64(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    target_BT = rng.integers(VOCAB.size, size=(3, 11))
    weight_BT = rng.choice([0.0, 0.1, 1.0], size=(3, 11))
    sample_BT = rng.integers(-1, 3, size=(3, 11))
    logits_BTV = rng.normal(size=(3, 11, VOCAB.size)) * 5
    nll_BT = np.log(np.exp(logits_BTV).sum(2)) - np.take_along_axis(logits_BTV, target_BT[..., None], 2)[..., 0]
    objective = OBJECTIVES.build(name, vocab=VOCAB)
    logits = torch.from_numpy(logits_BTV).float().requires_grad_()
    loss, figures = objective.loss(logits, batch_of(target_BT, weight_BT, sample_BT))
    assert loss.item() == pytest.approx((nll_BT * weight_BT).sum() / weight_BT.sum(), rel=1e-5)
    counted = weight_BT > 0
    text_BT, image_BT = counted & (target_BT < 40), counted & (target_BT >= 40) & (target_BT < 56)
    assert figures["loss_text"].item() == pytest.approx(nll_BT[text_BT].mean(), rel=1e-5)
    assert figures["loss_image"].item() == pytest.approx(nll_BT[image_BT].mean(), rel=1e-5)
    assert figures["tokens"] == (sample_BT >= 0).sum()
    loss.backward()
    p_BTV = np.exp(logits_BTV) / np.exp(logits_BTV).sum(2, keepdims=True)
    one_hot_BTV = np.eye(VOCAB.size)[target_BT]
    expected = (p_BTV - one_hot_BTV) * weight_BT[..., None] / weight_BT.sum()
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-6)


def test_loss_is_taken_in_float32_of_bf16_logits() -> None:
    logits_BTV = torch.randn(2, 4, VOCAB.size, generator=torch.Generator().manual_seed(0)).bfloat16()
    batch = batch_of(np.full((2, 4), 5), np.ones((2, 4)), np.zeros((2, 4), int))
    objective = cm3()
    assert objective.loss(logits_BTV, batch)[0].dtype == torch.float32
    assert torch.equal(objective.loss(logits_BTV, batch)[0], objective.loss(logits_BTV.float(), batch)[0])


def test_a_modality_without_targets_is_not_a_number_and_no_weight_is_no_loss() -> None:
    logits_BTV = torch.zeros(1, 3, VOCAB.size)
    only_text = batch_of(np.array([[5, 6, 41]]), np.array([[1, 1, 0]]), np.zeros((1, 3), int))
    loss, figures = cm3().loss(logits_BTV, only_text)
    assert figures["loss_text"].item() == pytest.approx(np.log(VOCAB.size))
    assert figures["loss_image"].isnan()
    only_image = batch_of(np.array([[41, 41, 41]]), np.array([[1, 1, 0]]), np.zeros((1, 3), int))
    assert cm3().loss(logits_BTV, only_image)[1]["loss_text"].isnan()
    loss, _ = cm3().loss(logits_BTV, batch_of(np.array([[5, 6, 41]]), np.zeros((1, 3)), np.zeros((1, 3), int)))
    assert loss.item() == 0


# ------------------------------------------------------------------------------------------------ packing

packable = st.lists(st.integers(1, 9), max_size=6).flatmap(
    lambda lengths: st.tuples(st.just(lengths), st.integers(sum(lengths), sum(lengths) + 7).filter(bool))
)


@given(packable)
def test_packing(drawn: tuple[list[int], int]) -> None:
    lengths, seq_len = drawn
    samples = [Corrupted(np.arange(n) + 100 * k, (np.arange(n) + 1.0) / 8 + k) for k, n in enumerate(lengths)]
    block = pack(samples, seq_len, pad=77)
    for array in (block.ids_T, block.target_T, block.weight_T, block.sample_T, block.position_T):
        assert array.shape == (seq_len,)
    start = 0
    for number, sample in enumerate(samples):
        end = start + len(sample.ids_T)
        assert block.ids_T[start:end].tolist() == sample.ids_T.tolist()
        assert block.position_T[start:end].tolist() == list(range(end - start))
        assert (block.sample_T[start:end] == number).all()
        # each token but the first is the target of the one before it, with its own weight
        assert block.target_T[start : end - 1].tolist() == sample.ids_T[1:].tolist()
        assert block.weight_T[start : end - 1].tolist() == sample.weight_T[1:].tolist()
        assert block.weight_T[end - 1] == 0
        start = end
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
    assume(sample_length(Sample(query)) <= seq_len)
    fitted = fit(sample, seq_len)
    assert fitted.query is query
    kept = len(fitted.retrieved)
    assert all(a is b for a, b in zip(fitted.retrieved, retrieved[len(retrieved) - kept :], strict=True))
    assert len(lay_out(fitted, VOCAB).ids_T) <= seq_len
    if kept < len(retrieved):  # one more would not fit
        assert len(lay_out(Sample(query, retrieved[len(retrieved) - kept - 1 :]), VOCAB).ids_T) > seq_len


def test_a_query_that_does_not_fit_is_one_sentence() -> None:
    query = document(6, 4, name="photo 7")  # 2 <eos>, 6 + 4 tokens, a <break>
    assert fit(Sample(query, (document(1),)), 13).retrieved == ()
    with pytest.raises(UserError) as refusal:
        fit(Sample(query, (document(1),)), 12)
    assert str(refusal.value) == (
        "model.seq_len: document photo 7 takes 13 tokens, a block holds 12; raise model.seq_len"
    )


# ------------------------------------------------------------------------------------------------ stream

COUNT = 13


def numbered(number: int, rng: np.random.Generator) -> Sample:
    """A document whose text spells its number, with up to two retrieved ones drawn anew each time."""
    query = TokenDocument(f"{number}", (TokenSegment("text", np.full(1 + number % 4, 4 + number)), segment("image", 4)))
    return Sample(query, tuple(document(2, 4) for _ in range(int(rng.integers(3)))))


def stream(seed: int = 0, batch_size: int = 3, seq_len: int = 40, draw: Any = numbered, name: str = "cm3") -> Any:
    objective = OBJECTIVES.build(name, vocab=VOCAB)
    return BlockStream(COUNT, draw, objective, seq_len=seq_len, batch_size=batch_size, seed=seed, device=CPU)


def samples_in(batch: Batch) -> list[list[int]]:
    """Ids of the samples of a batch."""
    found = []
    for ids_T, sample_T in zip(batch.ids_BT.numpy(), batch.sample_BT.numpy(), strict=True):
        found += [ids_T[sample_T == number].tolist() for number in range(sample_T.max() + 1)]
    return found


def query_of(ids: list[int]) -> int:
    """Number of the document whose sample this is: the text of the last segment but one."""
    whole = unrotate(np.array(ids), VOCAB)
    last_image = np.flatnonzero(whole == VOCAB.brk)[-1]
    return int(whole[last_image - 1]) - 4


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def test_stream_is_deterministic_and_seeds_differ() -> None:
    first, second, other = stream(), stream(), stream(seed=1)
    batches = [(first.next(), second.next(), other.next()) for _ in range(5)]
    assert all(same(a, b) for a, b, _ in batches)
    assert not any(same(a, c) for a, _, c in batches)


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 40), (3, 40), (5, 64), (2, 200)])
@pytest.mark.parametrize("name", ["cm3", "causal"])
def test_every_epoch_is_a_permutation_of_whole_samples(batch_size: int, seq_len: int, name: str) -> None:
    asked: list[int] = []

    def draw(number: int, rng: np.random.Generator) -> Sample:
        asked.append(number)
        return numbered(number, rng)

    blocks = stream(batch_size=batch_size, seq_len=seq_len, name=name, draw=draw)
    seen: list[int] = []
    while len(seen) < 4 * COUNT:
        asked.clear()
        found = samples_in(blocks.next())
        for ids in found:
            whole = unrotate(np.array(ids), VOCAB)
            assert whole[0] == whole[-1] == VOCAB.eos
            assert (whole == VOCAB.eos).sum() == 2
        # All that were drawn are there, but the last, which did not fit and opens the next batch.
        assert sorted(query_of(ids) for ids in found) == sorted(asked[:-1])
        seen += asked[:-1]
        assert blocks.state_dict() == {"position": len(seen)}
    epochs = [seen[epoch * COUNT : (epoch + 1) * COUNT] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_is_filled_first_fit() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 20, COUNT)
    draws: list[int] = []

    def draw(number: int, _: np.random.Generator) -> Sample:
        draws.append(int(lengths[number]) + 2)
        return Sample(document(int(lengths[number])))

    blocks = stream(draw=draw, name="causal")
    for _ in range(10):
        draws.clear()
        batch = blocks.next()
        filled: list[list[int]] = [[], [], []]
        for length in draws[:-1]:
            next(block for block in filled if sum(block) + length <= 40).append(length)
        assert all(sum(block) + draws[-1] > 40 for block in filled)
        found = [
            [int((sample_T == number).sum()) for number in range(int(sample_T.max()) + 1)]
            for sample_T in batch.sample_BT
        ]
        assert found == filled


@pytest.mark.parametrize("step", range(8))
def test_stream_resumes_bit_for_bit(step: int) -> None:
    whole = stream()
    for _ in range(step):
        whole.next()
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = stream()
    resumed.load_state_dict(copy.deepcopy(state))
    for _ in range(6):
        assert same(whole.next(), resumed.next())
    assert whole.state_dict() == resumed.state_dict()


def test_a_document_is_corrupted_anew_in_every_epoch() -> None:
    blocks = stream(draw=lambda number, rng: Sample(document(8, 16)), seq_len=64)
    found = [tuple(ids) for _ in range(20) for ids in samples_in(blocks.next())]
    assert len(set(found)) > len(found) / 3


def test_a_stream_of_documents_that_do_not_fit_is_one_sentence() -> None:
    with pytest.raises(UserError, match="takes 27 tokens, a block holds 20"):
        stream(draw=lambda number, rng: Sample(document(8, 16)), seq_len=20).next()
