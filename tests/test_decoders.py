"""Decoding: each formula against brute force in float64, and batches against each prompt alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, kstest

from cm3leon.config import from_mapping
from cm3leon.decoders.base import Decoder
from cm3leon.decoders.decoders import Beam, ContrastiveK, Greedy, TopP, TwoConditions
from cm3leon.decoders.engine import FinishedSample
from cm3leon.decoders.generate import generate, is_truncated
from cm3leon.decoders.guidance import classifier_free, contrastive_k
from cm3leon.decoders.processors import draw, gumbel_noise, keep_top_p, random_bits, stream_key
from cm3leon.models.transformer import Transformer
from cm3leon.registry import DECODERS, discover
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Prompt, UserError

pytestmark = pytest.mark.stack

discover()

VOCAB = Vocab(text_size=40, image_size=16, sentinels=4)
SEQ_LEN = 64


def normal(*shape: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    """Normally distributed numbers in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def kept(logits_BV: torch.Tensor) -> list[set[int]]:
    """The columns of each row that can still be drawn."""
    return [set(np.flatnonzero(row_V > -np.inf).tolist()) for row_V in logits_BV.numpy()]


# ------------------------------------------------------------------------------------------- top-p


@given(
    size=st.integers(1, 40),
    seed=st.integers(0, 999),
    top_p=st.floats(0.001, 0.999),
    scale=st.floats(0, 8),
)
@settings(max_examples=150)
def test_top_p_keeps_the_fewest_likeliest_tokens(
    size: int, seed: int, top_p: float, scale: float
) -> None:
    logits_BV = normal(3, size, seed=seed, scale=scale)
    result_BV = keep_top_p(logits_BV, top_p)

    for row, stay in enumerate(kept(result_BV)):
        p_V = np.exp(logits_BV[row].numpy() - logits_BV[row].numpy().max())
        p_V /= p_V.sum()
        sums = np.cumsum(sorted(p_V, reverse=True))

        # Where rounding decides whether a sum reaches top_p, either count is right.
        assert sums[len(stay) - 1] >= top_p - 1e-12
        assert len(stay) == 1 or sums[len(stay) - 2] < top_p + 1e-12

        others = [p for v, p in enumerate(p_V) if v not in stay]
        assert min(p_V[list(stay)]) >= max(others, default=0)
        assert torch.equal(result_BV[row, list(stay)], logits_BV[row, list(stay)])


def test_top_p_by_hand() -> None:
    logits_BV = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]]).double().log()
    assert kept(keep_top_p(logits_BV, 0.45))[0] == {1}
    assert kept(keep_top_p(logits_BV, 0.6))[0] == {1, 3}
    assert kept(keep_top_p(logits_BV, 0.8))[0] == {1, 2, 3}

    # Of four equals, the result keeps as many as it takes.
    assert [len(stay) for stay in kept(keep_top_p(logits_BV, 0.7))] == [2, 3]
    assert torch.equal(keep_top_p(logits_BV, 1.0), logits_BV)


@pytest.mark.parametrize("top_p", [0.0, 1e-30])
def test_the_smallest_top_p_keeps_the_likeliest(top_p: float) -> None:
    assert kept(keep_top_p(torch.tensor([[0.1, 3.0, 0.2]]), top_p)) == [{1}]


def test_top_p_in_float32_over_a_large_vocabulary() -> None:
    logits_BV = normal(4, 8192, seed=0)
    for top_p in (0.1, 0.9, 0.99):
        single = kept(keep_top_p(logits_BV.float(), top_p))
        double = kept(keep_top_p(logits_BV, top_p))
        for one, other in zip(single, double, strict=True):
            assert len(one ^ other) <= 3


# ---------------------------------------------------------------------------------------- guidance


def test_guidance_of_weight_zero_is_unconditional_and_of_one_conditional() -> None:
    conditional_BV, unconditional_BV = normal(2, 9, seed=0), normal(2, 9, seed=1)
    assert torch.equal(classifier_free(conditional_BV, unconditional_BV, 0), unconditional_BV)
    torch.testing.assert_close(classifier_free(conditional_BV, unconditional_BV, 1), conditional_BV)
    by_hand_BV = 3 * conditional_BV - 2 * unconditional_BV
    torch.testing.assert_close(classifier_free(conditional_BV, unconditional_BV, 3), by_hand_BV)


@given(
    size=st.integers(1, 30),
    seed=st.integers(0, 999),
    alpha=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    k=st.integers(1, 40),
)
@settings(max_examples=150)
def test_cd_k_is_equation_3(size: int, seed: int, alpha: float, k: int) -> None:
    conditional_BV, unconditional_BV = normal(2, size, seed=seed), normal(2, size, seed=seed + 1000)

    scores_BV = contrastive_k(conditional_BV, unconditional_BV, alpha=alpha, k=k).numpy()
    for row in range(2):
        c_V = np.exp(conditional_BV[row].numpy())
        u_V = np.exp(unconditional_BV[row].numpy())
        c_V, u_V = c_V / c_V.sum(), u_V / u_V.sum()

        # The k-th largest probability, or the smallest if there are fewer than k.
        threshold = alpha * sorted(c_V, reverse=True)[min(k, size) - 1]
        for v in range(size):
            if c_V[v] >= threshold:
                assert scores_BV[row, v] == pytest.approx(np.log(c_V[v]) - np.log(u_V[v]), abs=1e-9)
            else:
                assert scores_BV[row, v] == -np.inf


def test_cd_k_with_k_1_is_contrastive_decoding() -> None:
    """Li et al. 2023: log p - log q over the tokens with p >= alpha * max p."""
    conditional_BV, unconditional_BV = normal(3, 20, seed=3), normal(3, 20, seed=4)
    p_BV, q_BV = conditional_BV.softmax(-1), unconditional_BV.softmax(-1)
    too_small_BV = p_BV < 0.2 * p_BV.amax(-1, keepdim=True)
    expected_BV = (p_BV / q_BV).log().masked_fill(too_small_BV, -torch.inf)
    scores_BV = contrastive_k(conditional_BV, unconditional_BV, alpha=0.2, k=1)
    torch.testing.assert_close(scores_BV, expected_BV)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1 / 3, 0.7])
def test_the_threshold_of_cd_k_is_as_exact_as_the_logits(alpha: float) -> None:
    """A token just above or below alpha times the largest probability, too near for float32."""
    for factor, stays in ((1 + 1e-10, True), (1 - 1e-10, False)):
        logits_BV = torch.tensor([[1.0, alpha * factor, 0.01]], dtype=torch.float64).log()
        scores_BV = contrastive_k(logits_BV, torch.zeros_like(logits_BV), alpha=alpha, k=1)
        assert (1 in kept(scores_BV)[0]) is stays


def built(name: str, **fields: Any) -> Any:
    """The decoder of this name with these settings."""
    return DECODERS.build({"name": name, **fields})


def test_top_p_decoder_puts_its_parts_together() -> None:
    conditional_BV, unconditional_BV = normal(2, 30, seed=5), normal(2, 30, seed=6)
    decoder = built("top_p", cfg=2.5, temperature=0.7, top_p=0.8)
    guided_BV = unconditional_BV + 2.5 * (conditional_BV - unconditional_BV)
    expected_BV = keep_top_p(guided_BV / 0.7, 0.8)
    torch.testing.assert_close(decoder.logits(conditional_BV, unconditional_BV), expected_BV)

    # Without a second stream there is nothing to guide by.
    expected_BV = keep_top_p(conditional_BV / 0.7, 0.8)
    torch.testing.assert_close(decoder.logits(conditional_BV, None), expected_BV)

    assert [built("top_p", cfg=weight).streams for weight in (2.5, 0, 1)] == [2, 2, 1]


@given(
    size=st.integers(1, 30),
    seed=st.integers(0, 999),
    alpha=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    weight=st.sampled_from([0.0, 1.0, 3.0, 7.5]),
)
@settings(max_examples=100)
def test_alpha_keeps_what_is_likely_without_guidance(
    size: int, seed: int, alpha: float, weight: float
) -> None:
    streams = [normal(2, size, seed=seed + 1000 * number) for number in range(3)]
    for name, weights in (("top_p", {"cfg": weight}), ("edit", {"text": weight, "image": 1.5})):
        given_BV = streams if name == "edit" else streams[:2]
        all_BV = built(name, top_p=1.0, **weights).logits(*given_BV)
        some_BV = built(name, top_p=1.0, alpha=alpha, **weights).logits(*given_BV)
        for row in range(2):
            c_V = np.exp(streams[0][row].numpy())
            stays_V = c_V >= alpha * c_V.max() * (1 - 1e-12)
            expected_V = np.where(stays_V, all_BV[row].numpy(), -np.inf)
            np.testing.assert_array_equal(some_BV[row].numpy(), expected_V)


def test_alpha_leaves_a_token_where_the_likely_one_would_repeat() -> None:
    """After 1 2 1, the token 2 would repeat a pair; the next likely one is 3."""
    conditional_BV = torch.tensor([[0.0, 0.0, 9.0, 5.0]], dtype=torch.float64)
    decoder = built("top_p", cfg=1, top_p=1.0, alpha=0.5, no_repeat=2)
    assert kept(decoder.logits(conditional_BV, None, past=[[1, 2, 1]])) == [{3}]


def test_cd_k_decoder_puts_its_parts_together() -> None:
    conditional_BV, unconditional_BV = normal(2, 30, seed=5), normal(2, 30, seed=6)
    decoder = built("cd_k", alpha=0.2, k=4, temperature=0.5)
    scores_BV = contrastive_k(conditional_BV, unconditional_BV, alpha=0.2, k=4)
    torch.testing.assert_close(decoder.logits(conditional_BV, unconditional_BV), scores_BV / 0.5)
    torch.testing.assert_close(decoder.logits(conditional_BV, None), conditional_BV / 0.5)


def test_greedy_keeps_the_likeliest_alone() -> None:
    logits_BV = normal(5, 12, seed=7)
    expected = [{int(best)} for best in logits_BV.argmax(-1)]
    assert kept(built("greedy").logits(logits_BV, None)) == expected


# -------------------------------------------------------------------------------------------- draw


def test_numbers_are_those_of_split_mix() -> None:
    """The stream from 1234567, as published for Java's generator and by the authors of Xoshiro."""
    found_N = random_bits(torch.tensor(1234567), torch.arange(5))
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [number % 2**64 for number in found_N.tolist()] == expected


def test_noise_is_gumbels_and_each_place_its_own() -> None:
    keys = [stream_key(seed) for seed in (0, 1, 2**40)]
    noise_KN = gumbel_noise(torch.tensor(keys)[:, None], torch.arange(200_000))
    assert noise_KN.dtype == torch.float32
    for noise_N in noise_KN:
        assert kstest(noise_N.numpy(), "gumbel_r").pvalue > 1e-3

    # Neither streams of other seeds nor neighbours in one stream are correlated.
    neighbours = [
        (noise_KN[0], noise_KN[1]),
        (noise_KN[0], noise_KN[2]),
        (noise_KN[0, 1:], noise_KN[0, :-1]),
    ]
    for one_N, other_N in neighbours:
        assert abs(np.corrcoef(one_N, other_N)[0, 1]) < 0.01

    alone = gumbel_noise(torch.tensor(keys[1]), torch.tensor(77))
    assert alone == noise_KN[1, 77]


def test_draws_have_the_distribution() -> None:
    logits_V = torch.tensor([0.0, 1.0, -torch.inf, 2.5, -3.0, 1.0, -torch.inf])
    p_V = logits_V.double().softmax(-1).numpy()
    noise_BV = gumbel_noise(torch.tensor(stream_key(0)), torch.arange(50_000 * 7).view(-1, 7))
    counts_V = torch.bincount(draw(logits_V.expand(50_000, 7), noise_BV), minlength=7).numpy()

    possible = p_V > 0
    assert counts_V[~possible].sum() == 0
    expected_V = 50_000 * p_V[possible]
    statistic = ((counts_V[possible] - expected_V) ** 2 / expected_V).sum()
    assert statistic < chi2.ppf(0.999, possible.sum() - 1)


@given(
    size=st.integers(1, 300),
    seed=st.integers(0, 999),
    bits=st.sampled_from([0, 1, 2**31, 2**32 - 1]),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=200)
def test_what_cannot_be_is_never_drawn(
    size: int, seed: int, bits: int, scale: float, dtype: torch.dtype
) -> None:
    """At both ends of the noise, too, and with impossible tokens anywhere, up to all but one."""
    generator = torch.Generator().manual_seed(seed)
    logits_BV = normal(4, size, seed=seed, scale=scale).to(dtype)
    gone_BV = torch.rand(4, size, generator=generator) < torch.tensor([0.0, 0.3, 0.9, 1.0])[:, None]

    # At least one token of each row may be drawn.
    gone_BV.scatter_(1, torch.randint(size, (4, 1), generator=generator), False)
    logits_BV = logits_BV.masked_fill(gone_BV, -torch.inf)

    numbers_BV = torch.full((4, size), bits, dtype=torch.int64) << 32
    with patch("cm3leon.decoders.processors.random_bits", lambda key, index: numbers_BV):
        noise_BV = gumbel_noise(torch.tensor(0), torch.tensor(0))
    assert noise_BV.isfinite().all()
    assert logits_BV.gather(1, draw(logits_BV, noise_BV)[:, None]).isfinite().all()


# ------------------------------------------------------------------------------------------ engine


def model(seed: int = 0) -> Transformer:
    """A model with large random weights, so that its answers depend on its input.

    A model of another seed shows whether an answer depends on the model.
    """
    config = Transformer.Config(layers=2, width=24, head_size=8, seq_len=SEQ_LEN)
    module = Transformer(config, vocab_size=VOCAB.size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            table = name.startswith(("embedding", "positions"))
            weight.normal_(std=1.0 if table else 2 * 24**-0.5, generator=generator)
    return module.eval()


def prompt(rng: np.random.Generator, size: int, modality: Any, length: int, guided: bool) -> Prompt:
    """A prompt of random ids, three fewer of them in its second stream."""

    def ids(count: int) -> np.ndarray:
        return np.concatenate([[VOCAB.eos], rng.integers(3, VOCAB.used, count - 1)])

    end = VOCAB.end_of_span if modality == "text" else VOCAB.eos
    ids_T = ids(size)
    unconditional_T = ids(max(1, size - 3)) if guided else None
    return Prompt(ids_T, modality, length, end, unconditional_T)


def prompts(seed: int = 0, *, guided: bool = True) -> list[Prompt]:
    """Prompts of many lengths and both modalities, with and without a second stream."""
    rng = np.random.default_rng(seed)
    return [
        prompt(rng, 9, "image", 16, guided),
        prompt(rng, 4, "text", 12, False),
        prompt(rng, 1, "image", 16, guided),
        prompt(rng, 20, "image", 7, guided),
        prompt(rng, 13, "text", 30, False),
        prompt(rng, 13, "image", 16, False),
        prompt(rng, 2, "text", 1, guided),
        prompt(rng, 6, "image", 1, guided),
    ]


def lists(answers: Sequence[np.ndarray]) -> list[list[int]]:
    """Answers as lists, which compare by value."""
    return [answer_T.tolist() for answer_T in answers]


class Recorder(Decoder):
    """Passes on to another decoder, and keeps what it was given and what it returned."""

    def __init__(self, inner: Decoder) -> None:
        self.inner = inner
        self.steps: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = []

    @property
    def streams(self) -> int:
        return self.inner.streams

    def logits(
        self, conditional_BV: torch.Tensor, unconditional_BV: torch.Tensor | None = None
    ) -> torch.Tensor:
        result_BV = self.inner.logits(conditional_BV, unconditional_BV)
        second = None
        if unconditional_BV is not None:
            second = unconditional_BV.clone()
        self.steps.append((conditional_BV.clone(), second, result_BV.clone()))
        return result_BV


@torch.inference_mode()
def alone(module: Transformer, ids_T: np.ndarray, answer_T: np.ndarray) -> torch.Tensor:
    """Logits (T, V) of each token of an answer, in one pass without cache or neighbours."""
    sequence_T = torch.from_numpy(np.concatenate([ids_T, answer_T[:-1]]))
    return module(sequence_T[None])[0, len(ids_T) - 1 :]


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("name", ["top_p", "cd_k"])
def test_batched_guidance_is_two_separate_passes(modality: str, name: str) -> None:
    """A batch gives the decoder what each stream of each prompt gives in a pass of its own."""
    module, rng = model(), np.random.default_rng(1)
    asked = [prompt(rng, size, modality, 10, True) for size in (4, 11, 7)]
    fields = {"alpha": 0.1, "k": 32} if name == "cd_k" else {}
    recorder = Recorder(built(name, **fields))
    answers = generate(module, asked, recorder, vocab=VOCAB, seeds=[5, 6, 7])

    # The decoder sees the columns that the grammar allows: a text may also end.
    low, high = VOCAB.id_range(asked[0].modality)
    allowed = list(range(low, high))
    if modality == "text":
        allowed.insert(0, VOCAB.end_of_span)

    # The end of a text takes a step, too, unless the answer has its full length.
    steps = [min(len(answer) + (modality == "text"), 10) for answer in answers]
    assert len(recorder.steps) == max(steps)

    order = sorted(range(3), key=lambda row: len(asked[row].ids_T))  # as the engine lays the rows
    for row in order:
        assert asked[row].unconditional_T is not None
        conditional_TV = alone(module, asked[row].ids_T, answers[row])[:, allowed]
        unconditional_TV = alone(module, asked[row].unconditional_T, answers[row])[:, allowed]
        assert len(answers[row]) > 2

        for step in range(len(answers[row])):
            given_BV, without_BV, result_BV = recorder.steps[step]
            # Rows that have ended leave the batch, and the others move up.
            index = [other for other in order if steps[other] > step].index(row)
            assert without_BV is not None
            torch.testing.assert_close(given_BV[index], conditional_TV[step], rtol=0, atol=1e-5)
            torch.testing.assert_close(without_BV[index], unconditional_TV[step], rtol=0, atol=1e-5)

            column = allowed.index(int(answers[row][step]))
            assert result_BV[index, column] > -torch.inf


@pytest.mark.parametrize(
    "fields", [{"name": "top_p"}, {"name": "top_p", "cfg": 1}, {"name": "cd_k"}, {"name": "greedy"}]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_batch_gives_what_each_prompt_gives_alone(fields: dict[str, Any], seed: int) -> None:
    module, decoder, asked = model(), DECODERS.build(fields), prompts(seed)
    seeds = [100 + row for row in range(len(asked))]
    together = lists(generate(module, asked, decoder, vocab=VOCAB, seeds=seeds))
    in_small_batches = lists(
        generate(module, asked, decoder, vocab=VOCAB, seeds=seeds, batch_size=2)
    )

    each = []
    for one, own_seed in zip(asked, seeds, strict=True):
        (answer_T,) = generate(module, [one], decoder, vocab=VOCAB, seeds=[own_seed])
        each.append(answer_T.tolist())
    assert together == each
    assert in_small_batches == each


def test_same_seeds_same_answers_and_others_others() -> None:
    module, asked = model(), prompts()
    decoder = built("top_p", top_p=1.0)
    seeds = list(range(len(asked)))

    def answers(module: Transformer, seeds: list[int]) -> list[list[int]]:
        return lists(generate(module, asked, decoder, vocab=VOCAB, seeds=seeds))

    first = answers(module, seeds)
    torch.manual_seed(123)  # no global state takes part
    assert answers(module, seeds) == first
    assert answers(module, [seed + 50 for seed in seeds]) != first
    assert answers(model(1), seeds) != first


def test_greedy_and_an_unguided_weight_do_not_look_at_the_second_stream() -> None:
    module = model()
    for decoder in (built("greedy"), built("top_p", cfg=1)):
        answers = generate(module, prompts(guided=True), decoder, vocab=VOCAB, seeds=range(8))
        without = generate(module, prompts(guided=True)[:1], decoder, vocab=VOCAB, seeds=[0])

        bare = Prompt(prompts()[0].ids_T, "image", 16, VOCAB.eos)
        unguided = generate(module, [bare], decoder, vocab=VOCAB, seeds=[0])
        assert lists(unguided) == lists(without) == lists(answers[:1])


def test_greedy_answers_are_the_likeliest_tokens() -> None:
    module, asked = model(), prompts()
    answers = generate(module, asked, built("greedy"), vocab=VOCAB, seeds=range(8))
    for one, answer_T in zip(asked, answers, strict=True):
        low, high = VOCAB.id_range(one.modality)
        allowed = list(range(low, high))
        full_T = answer_T
        if one.modality == "text":
            allowed.insert(0, VOCAB.end_of_span)
            # The answer leaves out the token that ended it.
            if len(answer_T) < one.length:
                full_T = np.append(answer_T, VOCAB.end_of_span)

        logits_TV = alone(module, one.ids_T, full_T)
        assert [allowed[column] for column in logits_TV[:, allowed].argmax(-1)] == full_T.tolist()


@pytest.mark.parametrize("name", DECODERS.names())
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_answers_keep_the_grammar(name: str, seed: int) -> None:
    asked = prompts(seed)
    answers = generate(
        model(seed), asked, built(name), vocab=VOCAB, seeds=range(seed, seed + len(asked))
    )
    for one, answer_T in zip(asked, answers, strict=True):
        low, high = VOCAB.id_range(one.modality)
        assert ((answer_T >= low) & (answer_T < high)).all()
        assert answer_T.dtype == np.int64
        if one.modality == "image":
            assert len(answer_T) == one.length
        else:
            assert len(answer_T) <= one.length


class Fixed(Decoder):
    """Gives each row the columns of a script, one a step; a row whose column was 0 has left."""

    def __init__(self, columns: Sequence[Sequence[int]]) -> None:
        self.columns, self.step = columns, 0

    def logits(
        self, conditional_BV: torch.Tensor, unconditional_BV: torch.Tensor | None = None
    ) -> torch.Tensor:
        columns = [row[self.step] for row in self.columns if 0 not in row[: self.step]]
        column_B1 = torch.tensor(columns)[:, None]
        self.step += 1
        return torch.full_like(conditional_BV, -torch.inf).scatter(1, column_B1, 0.0)


def test_text_stops_at_its_end_or_at_its_length() -> None:
    """Column 0 of text is `<end_of_span>`, column 1 the first text id, 4."""
    rng = np.random.default_rng(0)
    asked = [prompt(rng, size, "text", 5, False) for size in (2, 3, 4, 5)]
    decoder = Fixed([[2, 3, 0, 1, 1], [0, 1, 1, 1, 1], [1, 2, 3, 4, 5], [1, 1, 1, 1, 0]])
    answers = generate(model(), asked, decoder, vocab=VOCAB, seeds=range(4))
    assert lists(answers) == [[5, 6], [], [4, 5, 6, 7, 8], [4, 4, 4, 4]]


def test_it_stops_when_all_rows_have_ended() -> None:
    rng = np.random.default_rng(0)
    decoder = Fixed([[1, 0], [0, 1]])
    asked = [prompt(rng, size, "text", 20, False) for size in (2, 3)]
    assert lists(generate(model(), asked, decoder, vocab=VOCAB, seeds=[0, 1])) == [[4], []]
    assert decoder.step == 2


@pytest.mark.parametrize("modality", ["image", "text"])
def test_length_zero_is_an_empty_answer(modality: str) -> None:
    rng = np.random.default_rng(0)
    sizes_and_lengths = ((3, 0), (5, 4), (4, 0))
    asked = [prompt(rng, size, modality, length, True) for size, length in sizes_and_lengths]
    answers = generate(model(), asked, built("top_p"), vocab=VOCAB, seeds=[0, 1, 2])
    assert [len(answer_T) == 0 for answer_T in answers][::2] == [True, True]

    assert lists(generate(model(), asked[:1], built("top_p"), vocab=VOCAB, seeds=[0])) == [[]]
    assert answers[0].dtype == np.int64


def test_no_prompts_no_answers() -> None:
    assert generate(model(), [], built("top_p"), vocab=VOCAB, seeds=[]) == []


def test_answers_are_announced_as_they_end() -> None:
    announced: list[FinishedSample] = []
    asked = prompts()
    answers = generate(
        model(),
        asked,
        built("top_p"),
        vocab=VOCAB,
        seeds=range(8),
        batch_size=2,
        on_answer=announced.append,
    )
    assert sorted(answer.ticket for answer in announced) == list(range(len(asked)))
    assert sum(len(answer.tokens) for answer in announced) >= sum(map(len, answers))


def test_prompt_and_answer_may_fill_the_context() -> None:
    rng = np.random.default_rng(0)
    asked = [prompt(rng, SEQ_LEN - 16, "image", 16, True)]
    assert len(generate(model(), asked, built("top_p"), vocab=VOCAB, seeds=[0])[0]) == 16


def test_prompts_that_fit_alone_fit_together() -> None:
    """A long prompt with a short answer beside a short prompt with a long answer."""
    rng = np.random.default_rng(0)
    asked = [prompt(rng, SEQ_LEN - 3, "image", 3, True), prompt(rng, 2, "image", SEQ_LEN - 2, True)]
    decoder = built("top_p")
    each = [generate(model(), [one], decoder, vocab=VOCAB, seeds=[0])[0].tolist() for one in asked]
    assert [len(answer) for answer in each] == [3, SEQ_LEN - 2]
    assert lists(generate(model(), asked, decoder, vocab=VOCAB, seeds=[0, 0])) == each


class Endless(Decoder):
    """A decoder that never ends a text: always column 1, the first text id."""

    def __init__(self) -> None:
        pass

    def logits(
        self, conditional_BV: torch.Tensor, unconditional_BV: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.full_like(conditional_BV, -torch.inf).index_fill(1, torch.tensor([1]), 0.0)


def test_text_is_cut_where_the_positions_end_for_each_prompt_by_itself() -> None:
    rng = np.random.default_rng(0)
    asked = [
        prompt(rng, size, "text", 30, False)
        for size in (5, SEQ_LEN - 4, 20, SEQ_LEN - 1, SEQ_LEN - 30)
    ]
    answers = generate(model(), asked, Endless(), vocab=VOCAB, seeds=range(5))
    assert [len(answer_T) for answer_T in answers] == [30, 4, 30, 1, 30]

    # All of them are truncated: three by their length, two by the model's positions.
    cut = [is_truncated(*pair, SEQ_LEN) for pair in zip(asked, answers, strict=True)]
    assert cut == [True] * 5


class EndsAt(Decoder):
    """Ends a text after so many pieces."""

    def __init__(self, pieces: int) -> None:
        self.pieces, self.drawn = pieces, 0

    def logits(
        self, conditional_BV: torch.Tensor, unconditional_BV: torch.Tensor | None = None
    ) -> torch.Tensor:
        column = 0 if self.drawn == self.pieces else 1
        self.drawn += 1
        likely = torch.full_like(conditional_BV, -torch.inf)
        return likely.index_fill(1, torch.tensor([column]), 0.0)


@pytest.mark.parametrize(("pieces", "cut"), [(0, False), (4, False), (5, True), (6, True)])
def test_a_text_is_truncated_where_its_end_was_not_drawn(pieces: int, cut: bool) -> None:
    """The end is one of the five tokens: after five pieces there is no room to draw it."""
    asked = prompt(np.random.default_rng(0), 5, "text", 5, False)
    (answer_T,) = generate(model(), [asked], EndsAt(pieces), vocab=VOCAB, seeds=[0])
    assert len(answer_T) == min(pieces, 5)
    assert is_truncated(asked, answer_T, SEQ_LEN) is cut


def test_images_are_never_truncated() -> None:
    asked = prompt(np.random.default_rng(0), 5, "image", 4, False)
    (answer_T,) = generate(model(), [asked], built("greedy"), vocab=VOCAB, seeds=[0])
    assert (len(answer_T), is_truncated(asked, answer_T, SEQ_LEN)) == (4, False)


@pytest.mark.parametrize(
    ("size", "modality", "length"), [(SEQ_LEN - 4, "image", 16), (SEQ_LEN, "text", 5)]
)
def test_a_prompt_that_leaves_no_room_is_refused_in_a_sentence(
    size: int, modality: str, length: int
) -> None:
    asked = [prompt(np.random.default_rng(0), size, modality, length, False)]
    sentence = rf"^model.seq_len: a prompt of {size} tokens .* the model's {SEQ_LEN} positions"
    with pytest.raises(UserError, match=sentence):
        generate(model(), asked, built("top_p"), vocab=VOCAB, seeds=[0])


def test_configs_are_checked() -> None:
    for cls, fields in (
        (TopP, {"temperature": 0}),
        (TopP, {"cfg": -1}),
        (TopP, {"cfg": math.inf}),
        (TopP, {"cfg": 1e30}),
        (TopP, {"temperature": 1e-40}),
        (TopP, {"temperature": math.nan}),
        (TopP, {"repetition_penalty": 1e-40}),
        (TwoConditions, {"text": math.inf}),
        (Beam, {"length_penalty": 1e30}),
        (ContrastiveK, {"temperature": 1e-40}),
        (ContrastiveK, {"k": 0}),
        (Greedy, {"x": 1}),
    ):
        with pytest.raises(ValueError, match=r"^d\."):
            from_mapping(cls.Config, fields, "d")


# --------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_greedy_answers() -> None:
    asked = prompts()
    expected = lists(generate(model(), asked, built("greedy"), vocab=VOCAB, seeds=range(8)))
    found = generate(model().cuda(), asked, built("greedy"), vocab=VOCAB, seeds=range(8))
    assert lists(found) == expected
