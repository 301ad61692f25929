"""How samples and pieces of them are corrupted, and how the loss is computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import VOCAB, document, documents, unrotate
from scipy import stats

from cm3leon.objectives.base import cut
from cm3leon.objectives.cm3 import EXTRA, Span, rotate
from cm3leon.registry import OBJECTIVES, discover
from cm3leon.tokenizers.document import LaidOut, lay_out
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Batch, Sample

discover()

CPU = torch.device("cpu")


def cm3(vocab: Vocab = VOCAB, **fields: Any) -> Any:
    return OBJECTIVES.build({"name": "cm3", **fields}, vocab=vocab)


laid_out = st.builds(Sample, documents, st.lists(documents, max_size=3).map(tuple)).map(
    lambda s: lay_out(s, VOCAB)
)
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
    """Any ids without sentinels, with any spans in order that do not overlap.

    Spans may touch each other, and may be empty.
    """
    ids = draw(st.lists(st.integers(0, VOCAB.sentinel_start - 1), min_size=1, max_size=40))
    ends = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=2 * (VOCAB.sentinels - 1))))
    return np.array(ids, dtype=np.int64), list(zip(ends[::2], ends[1::2], strict=False))


# ----------------------------------------------------------------------------------------- rotation


def test_the_papers_example_literally() -> None:
    words = {"a": 10, "red": 11, "dog": 12}
    words |= {"<eos>": VOCAB.eos, "<break>": VOCAB.brk}
    words |= {"<mask:0>": VOCAB.sentinel(0), "<end_of_span>": VOCAB.end_of_span}
    words |= {f"I{n}": VOCAB.image_start + n for n in range(16)}

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
    # Each span is replaced by its sentinel and goes to the end, between the sentinel and the close.
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
    room = len(sample.ids_T) + more_room
    corrupted = cm3(**fields).corrupt(sample, np.random.default_rng(seed), room)
    assert len(corrupted.ids_T) == len(corrupted.weight_T) <= room
    assert unrotate(corrupted.ids_T, VOCAB).tolist() == sample.ids_T.tolist()
    assert corrupted.weight_T.dtype == np.float32

    # The draw depends on the generator alone.
    again = cm3(**fields).corrupt(sample, np.random.default_rng(seed), room)
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


# -------------------------------------------------------------------------------------------- spans


@given(laid_out, settings_of_cm3, seeds)
@settings(max_examples=300)
def test_spans_are_in_order_apart_and_inside_one_segment(
    sample: LaidOut, fields: dict[str, Any], seed: int
) -> None:
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


# Every segment has one token, and each span takes a whole one. There are so many that two spans
# hardly ever meet.
MANY_SEGMENTS = lay_out(Sample(document(*[1] * 400)), VOCAB)


@pytest.mark.parametrize(
    ("sentinels", "room", "mean", "most"),
    [
        (8, 100, 1.0, 7),
        (8, 9, 1.0, 3),
        (8, 11, 1.0, 3),
        (3, 100, 1.0, 2),
        (8, 100, 3.0, 7),
        (1, 100, 1.0, 0),
    ],
)
def test_number_of_spans_is_poisson_clamped(
    sentinels: int, room: int, mean: float, most: int
) -> None:
    objective = cm3(Vocab(40, 16, sentinels), mean_spans=mean, whole_segment=1.0)
    rng = np.random.default_rng(0)
    limit = len(MANY_SEGMENTS.ids_T) + room
    draws = 1500
    counts = Counter(len(objective.draw_spans(MANY_SEGMENTS, rng, limit)) for _ in range(draws))

    # All draws beyond `most` count as `most`, so its share is the whole upper tail.
    expected = stats.poisson(mean).pmf(np.arange(most + 1))
    expected[most] = stats.poisson(mean).sf(most - 1)

    assert max(counts) <= most
    for count in range(most + 1):
        deviation = (draws * expected[count] * (1 - expected[count])) ** 0.5
        assert abs(counts[count] - draws * expected[count]) <= 4 * deviation + 1, count


def spans_of(sample: LaidOut, draws: int, **fields: Any) -> list[Span]:
    """The spans of those draws that have exactly one span."""
    objective, rng = cm3(**fields), np.random.default_rng(1)
    drawn = (objective.draw_spans(sample, rng, 10_000) for _ in range(draws))
    return [spans[0] for spans in drawn if len(spans) == 1]


def near(count: int, draws: int, share: float) -> bool:
    """Whether a count is within four standard deviations of the mean of a binomial."""
    return abs(count - draws * share) <= 4 * (draws * share * (1 - share)) ** 0.5


def test_half_the_spans_are_the_querys_and_its_segments_are_even() -> None:
    # The query comes last: segments 0 to 4 are the retrieved documents', 5 and 6 are the query's.
    sample = lay_out(Sample(document(20, 20), (document(20, 20), document(20, 20, 20))), VOCAB)
    query, retrieved = [5, 6], [0, 1, 2, 3, 4]

    spans = spans_of(sample, 6000, mean_spans=0.5)
    owner: Counter[int] = Counter()
    for start, end in spans:
        inside = (n for n, s in enumerate(sample.segments) if s.start <= start and end <= s.end)
        owner[next(inside)] += 1

    assert near(sum(owner[n] for n in query), len(spans), 0.5)
    assert all(near(owner[n], len(spans), 0.25) for n in query)
    assert all(near(owner[n], len(spans), 0.1) for n in retrieved)


def test_without_retrieved_documents_all_spans_are_the_querys() -> None:
    sample = lay_out(Sample(document(20, 20)), VOCAB)
    owner = Counter(start > 21 for start, _ in spans_of(sample, 3000, mean_spans=0.5))
    assert near(owner[True], owner.total(), 0.5)

    # A query without tokens has no segment to draw from, so the spans are the retrieved one's.
    empty_query = lay_out(Sample(document(0, 0), (document(5, 5),)), VOCAB)
    assert {start < 13 for start, _ in spans_of(empty_query, 100)} == {True}


def test_share_of_whole_segments_and_ends_of_the_others() -> None:
    length, draws = 30, 8000
    spans = spans_of(lay_out(Sample(document(length)), VOCAB), draws, mean_spans=0.5)

    # A span that is not the whole segment has two different ends of length + 1. One pair of them
    # gives the whole segment, too.
    pairs = length * (length + 1) / 2
    whole = sum(span == (1, 1 + length) for span in spans)
    assert near(whole, len(spans), 0.3 + 0.7 / pairs)

    # Every end is as likely as every other, up to the one pair that is left out here.
    parts = [(start - 1, end - 1) for start, end in spans if (start, end) != (1, 1 + length)]
    for end in range(length + 1):
        share = (length - (end in (0, length))) / (pairs - 1)
        assert near(sum(end in span for span in parts), len(parts), share), end
    assert min(e - s for s, e in parts) == 1


def test_whole_segment_one_and_zero() -> None:
    sample = lay_out(Sample(document(12, 4)), VOCAB)
    assert set(spans_of(sample, 300, whole_segment=1.0)) == {(1, 13), (14, 18)}
    assert len(set(spans_of(sample, 300, whole_segment=0.0))) > 30


def test_literal_placement_hardly_ever_masks_a_caption() -> None:
    """Two ends are drawn over the whole sample, and the span between them is clipped.

    It is clipped to the segment that it overlaps most, which is hardly ever the short caption.
    """
    sample = lay_out(Sample(document(20, 1000)), VOCAB)
    spans = spans_of(sample, 4000, mean_spans=0.5, placement="block")
    assert sum(start < 21 for start, _ in spans) < 0.02 * len(spans)

    # The same by hand for the image's segment: its spans are as long as those that were drawn.
    # Short ones are left out, for which the caption could be the longer overlap.
    start, end, rng = sample.segments[1].start, sample.segments[1].end, np.random.default_rng(5)
    ends = np.sort(rng.integers(end + 1, size=(20_000, 2)), axis=1)
    clipped = np.maximum(ends, start)
    lengths = clipped[:, 1] - clipped[:, 0]
    lengths = lengths[lengths > 20]
    drawn = [e - s for s, e in spans if s > 21 and e - s > 20]
    assert stats.ks_2samp(drawn, lengths).pvalue > 1e-4


# ------------------------------------------------------------------------------------------- pieces


@given(laid_out, st.data())
def test_a_cut_keeps_the_parts_of_segments_that_lie_in_it(
    sample: LaidOut, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(sample.ids_T)))
    end = data.draw(st.integers(start, len(sample.ids_T)))
    piece = cut(sample, start, end)
    assert piece.ids_T.tolist() == sample.ids_T.tolist()[start:end]

    def owners(of: LaidOut) -> list[tuple[str, bool] | None]:
        """Modality and side (query or retrieved) of the segment that each position lies in."""
        found: list[tuple[str, bool] | None] = [None] * len(of.ids_T)
        for s in of.segments:
            found[s.start : s.end] = [(s.modality, s.is_query)] * (s.end - s.start)
        return found

    assert owners(piece) == owners(sample)[start:end]


@given(laid_out, settings_of_cm3, seeds, st.sampled_from(["cm3", "causal"]), st.data())
@settings(max_examples=300)
def test_pieces_fill_their_room_and_together_are_the_sample(
    sample: LaidOut, fields: dict[str, Any], seed: int, name: str, data: st.DataObject
) -> None:
    objective = cm3(**fields) if name == "cm3" else OBJECTIVES.build("causal", vocab=VOCAB)
    start, parts = 0, []
    while start < len(sample.ids_T):
        # Take as much as there is room for; the same generator takes the same.
        room = data.draw(st.integers(1, 60))
        piece, end = objective.take(sample, start, room, np.random.default_rng([seed, start]))
        again, same_end = objective.take(sample, start, room, np.random.default_rng([seed, start]))
        assert (again.ids_T.tolist(), again.weight_T.tolist(), same_end) == (
            piece.ids_T.tolist(),
            piece.weight_T.tolist(),
            end,
        )

        # The room is filled unless the sample ends, and what fits is not cut.
        assert len(piece.weight_T) == len(piece.ids_T) <= room
        assert len(piece.ids_T) == room or end == len(sample.ids_T)
        assert end == len(sample.ids_T) or len(sample.ids_T) - start > room

        parts += unrotate(piece.ids_T, VOCAB).tolist()
        assert len(parts) == end > start
        assert (piece.weight_T[VOCAB.is_sentinel(piece.ids_T)] == 0).all()
        start = end

    assert parts == sample.ids_T.tolist()


def test_weights_of_a_piece_are_those_of_its_tokens() -> None:
    sample = lay_out(Sample(document(9, 9), (document(9, 9), document(9, 9))), VOCAB)
    retrieved = {p for s in sample.segments if not s.is_query for p in range(s.start, s.end)}
    objective = cm3(mean_spans=3.0, retrieved_weight=0.25)
    for seed in range(200):
        start, room = seed % 50, 10 + seed % 31
        piece, end = objective.take(sample, start, room, np.random.default_rng(seed))

        # Each span has two sentinels, of weight 0, and a close, of weight 1.
        sentinels = np.flatnonzero(VOCAB.is_sentinel(piece.ids_T))
        spans = len(sentinels) // 2
        expected = [0.25 if p in retrieved else 1.0 for p in range(start, end)]
        expected += [0.0] * 2 * spans + [1.0] * spans
        assert sorted(piece.weight_T) == sorted(expected)


def test_number_of_spans_of_a_piece_is_poisson_clamped() -> None:
    """Pieces of many segments, in which spans hardly ever meet.

    Each piece is cut from a longer sample, so that the spans' extra tokens take from its length.
    """
    objective, rng, draws, room = cm3(whole_segment=1.0), np.random.default_rng(0), 1500, 700
    counts: Counter[int] = Counter()
    for _ in range(draws):
        piece, end = objective.take(MANY_SEGMENTS, 5, room, rng)
        spans = int(VOCAB.is_sentinel(piece.ids_T).sum()) // 2
        assert end == 5 + room - EXTRA * spans
        counts[spans] += 1

    for count, share in enumerate(stats.poisson(1.0).pmf(np.arange(5))):
        assert abs(counts[count] - draws * share) <= 4 * (draws * share * (1 - share)) ** 0.5 + 1, (
            count
        )


# ------------------------------------------------------------------------------------------ weights


@given(laid_out, settings_of_cm3, seeds)
@settings(max_examples=200)
def test_weights(sample: LaidOut, fields: dict[str, Any], seed: int) -> None:
    corrupted = cm3(**fields).corrupt(sample, np.random.default_rng(seed), 10_000)
    spans = cm3(**fields).draw_spans(sample, np.random.default_rng(seed), 10_000)
    assert corrupted.ids_T.tolist() == rotate(sample.ids_T, spans, VOCAB)[0].tolist()
    retrieved = {p for s in sample.segments if not s.is_query for p in range(s.start, s.end)}
    sources = rotate(sample.ids_T, spans, VOCAB)[1].tolist()

    # Sentinels carry no loss, tokens of retrieved documents less than the query's.
    for id_, weight, source in zip(corrupted.ids_T, corrupted.weight_T, sources, strict=True):
        if VOCAB.sentinel_start <= id_ < VOCAB.used:
            assert weight == 0
        else:
            assert weight == np.float32(fields["retrieved_weight"] if source in retrieved else 1.0)


def test_causal_leaves_the_sample_as_it_is() -> None:
    sample = lay_out(Sample(document(5, 4), (document(2, 4),)), VOCAB)
    for seed in range(20):
        corrupted = OBJECTIVES.build("causal", vocab=VOCAB).corrupt(
            sample, np.random.default_rng(seed), 100
        )
        assert corrupted.ids_T.tolist() == sample.ids_T.tolist()
        assert (corrupted.weight_T == 1).all()


# --------------------------------------------------------------------------------------------- loss


def batch_of(target_BT: np.ndarray, weight_BT: np.ndarray, sample_BT: np.ndarray) -> Batch:
    tensors = (torch.from_numpy(a) for a in (target_BT, weight_BT.astype(np.float32), sample_BT))
    target, weight, sample = tensors
    return Batch(torch.zeros_like(target), target, weight, sample, torch.zeros_like(target))


def test_all_of_a_batch_but_the_samples_numbers_goes_to_the_device() -> None:
    values_BT = np.arange(6).reshape(2, 3)
    batch = batch_of(values_BT, values_BT, values_BT)
    there = batch.to(torch.device("meta"))
    places = {field.name: getattr(there, field.name).device.type for field in fields(Batch)}
    assert places == {
        "ids_BT": "meta",
        "target_BT": "meta",
        "weight_BT": "meta",
        "sample_BT": "cpu",
        "position_BT": "meta",
    }
    assert there.sample_BT is batch.sample_BT


LOGITS = torch.nn.Linear(VOCAB.size, VOCAB.size, bias=False)
"""A head whose logits are the hidden states."""
torch.nn.init.eye_(LOGITS.weight)


def mean(pair: Any) -> float:
    return (pair[0] / pair[1]).item()


@pytest.mark.parametrize("name", ["cm3", "causal"])
@pytest.mark.parametrize("seed", range(5))
def test_loss_against_its_formula_in_float64(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    target_BT = rng.integers(VOCAB.size, size=(3, 11))
    weight_BT = rng.choice([0.0, 0.1, 1.0], size=(3, 11))
    sample_BT = rng.integers(-1, 3, size=(3, 11))
    logits_BTV = rng.normal(size=(3, 11, VOCAB.size)) * 5

    # The negative log-likelihood from the definition of the softmax.
    log_sum_BT = np.log(np.exp(logits_BTV).sum(2))
    nll_BT = log_sum_BT - np.take_along_axis(logits_BTV, target_BT[..., None], 2)[..., 0]

    objective = OBJECTIVES.build(name, vocab=VOCAB)
    logits = torch.from_numpy(logits_BTV).float().requires_grad_()
    loss, figures = objective.loss(logits, LOGITS, batch_of(target_BT, weight_BT, sample_BT))
    assert loss.item() == pytest.approx((nll_BT * weight_BT).sum() / weight_BT.sum(), rel=1e-5)

    # Ids below 40 are text, from 40 to 55 codes; what has no weight counts in neither mean.
    counted = weight_BT > 0
    text_BT, image_BT = counted & (target_BT < 40), counted & (target_BT >= 40) & (target_BT < 56)
    assert mean(figures["loss_text"]) == pytest.approx(nll_BT[text_BT].mean(), rel=1e-5)
    assert mean(figures["loss_image"]) == pytest.approx(nll_BT[image_BT].mean(), rel=1e-5)
    assert figures["tokens"] == (sample_BT >= 0).sum()

    # The gradient of a token's loss for its logits is the softmax less the one-hot target.
    loss.backward()
    p_BTV = np.exp(logits_BTV) / np.exp(logits_BTV).sum(2, keepdims=True)
    one_hot_BTV = np.eye(VOCAB.size)[target_BT]
    expected = (p_BTV - one_hot_BTV) * weight_BT[..., None] / weight_BT.sum()
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-6)


def test_a_modality_without_targets_counts_none_and_no_weight_is_no_loss() -> None:
    logits_BTV = torch.zeros(1, 3, VOCAB.size)
    only_text = batch_of(np.array([[5, 6, 41]]), np.array([[1, 1, 0]]), np.zeros((1, 3), int))

    loss, figures = cm3().loss(logits_BTV, LOGITS, only_text)
    assert mean(figures["loss_text"]) == pytest.approx(np.log(VOCAB.size))
    assert figures["loss_image"][1] == 0

    only_image = batch_of(np.array([[41, 41, 41]]), np.array([[1, 1, 0]]), np.zeros((1, 3), int))
    assert cm3().loss(logits_BTV, LOGITS, only_image)[1]["loss_text"][1] == 0

    no_weight = batch_of(np.array([[5, 6, 41]]), np.zeros((1, 3)), np.zeros((1, 3), int))
    loss, _ = cm3().loss(logits_BTV, LOGITS, no_weight)
    assert loss.item() == 0
