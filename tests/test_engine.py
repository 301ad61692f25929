"""The engine against brute force and transformers: searches, sampling, grammars, shared prefixes,
queues, drafts, and the memory that it takes."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from test_decoders import SEQ_LEN, VOCAB, alone, model, prompt, prompts
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from cm3leon.decoders import grammar
from cm3leon.decoders import request as requests_module
from cm3leon.decoders.base import Decoder
from cm3leon.decoders.engine import Engine, FinishedSample
from cm3leon.decoders.generate import Answerer, answers, generate, request_for
from cm3leon.decoders.guidance import classifier_free, two_conditions
from cm3leon.decoders.processors import forbid_repeats, keep_top_k, penalize
from cm3leon.decoders.request import Request, Shape, shape_for
from cm3leon.decoders.score import log_likelihoods
from cm3leon.models.opt import OPT, to_opt_config
from cm3leon.registry import DECODERS
from cm3leon.tasks.prompts import (
    AskedSpan,
    box_spans,
    fill,
    spans_prompt,
    unconditional_spans_prompt,
)
from cm3leon.tokenizers.layout import PAPER
from cm3leon.types import TokenDocument, TokenSegment, UserError

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module", autouse=True)
def short_prefixes() -> Iterator[None]:
    """Let short prefixes be shared, too, as the prompts here are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests_module, "SHORTEST", 1)
        yield


def built(name: str, **fields: Any) -> Any:
    """The decoder of this name with these settings."""
    return DECODERS.build({"name": name, **fields})


def request(
    ids: Sequence[int],
    decoder: Any,
    *,
    samples: int = 1,
    length: int = 6,
    modality: Any = "image",
    **fields: Any,
) -> Request:
    """A request for samples of one prompt, each answered by one segment."""
    new = partial(grammar.image, VOCAB, length)
    if modality == "text":
        new = partial(grammar.text, VOCAB, length, VOCAB.end_of_span)

    streams = (np.array(ids), *fields.get("others", ()))
    decoders = [{modality: decoder.of(number)} for number in range(samples)]
    seed = fields.get("seed", 0)
    return Request(streams, new, length, decoders, range(seed, seed + samples))


# ----------------------------------------------------------------------------- search and sampling


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_many_beams_find_the_best_of_all_answers(penalty: float) -> None:
    """With a beam for each pair of pieces, every answer of up to two tokens is compared."""
    module, ids_T = model(3), np.array([VOCAB.eos, 7, 9])
    pieces = list(range(4, VOCAB.text_size))
    beams = len(pieces) ** 2
    decoder = built("beam", beams=beams, length_penalty=penalty)
    one = request(ids_T, decoder, length=2, modality="text")
    ((found,),) = answers(module, [one], vocab=VOCAB)
    allowed = torch.tensor([VOCAB.end_of_span, *pieces])

    def log_p(begun: tuple[int, ...]) -> torch.Tensor:
        sequence_T = torch.from_numpy(np.concatenate([ids_T, np.array(begun, np.int64)]))
        with torch.inference_mode():
            return module(sequence_T[None])[0, -1, allowed].double().log_softmax(0)

    # Brute force: the score of each answer is its log-probability over its length.
    scores: dict[tuple[int, ...], float] = {}
    first = log_p(())
    scores[(VOCAB.end_of_span,)] = first[0].item()
    for index, piece in enumerate(pieces):
        second = log_p((piece,))
        for other, token in enumerate(allowed.tolist()):
            scores[piece, token] = ((first[1 + index] + second[other]) / 2**penalty).item()
    assert tuple(found) == max(scores, key=lambda tokens: scores[tokens])


def test_one_beam_is_greedy() -> None:
    asked = [one for one in prompts(guided=False) if one.modality == "text"]
    greedy = generate(model(), asked, built("greedy"), vocab=VOCAB, seeds=range(len(asked)))
    beam = generate(model(), asked, built("beam", beams=1), vocab=VOCAB, seeds=range(len(asked)))
    assert [each.tolist() for each in greedy] == [each.tolist() for each in beam]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_beams_inside_a_grammar_find_the_best_of_each_run_of_tokens(
    seed: int, penalty: float
) -> None:
    """Against every run that the grammar allows; each run continues the best one before it."""
    module, ids_T = model(seed), np.array([VOCAB.eos, 7, VOCAB.sentinel(0)])
    gaps = [grammar.Gap("text", 2), grammar.Gap("image", 2), grammar.Gap("text", 1)]
    new = partial(grammar.infilling, VOCAB, gaps)
    beam = built("beam", beams=VOCAB.text_size**2, length_penalty=penalty)
    asked = Request((ids_T,), new, 9, [{"text": beam, "image": beam}], [0])
    ((found,),) = answers(module, [asked], vocab=VOCAB)

    # The grammar by its rules alone, and all runs that it allows with their scores by the model.
    def state(tokens: Sequence[int]) -> grammar.Allowed | None:
        """What the grammar allows after these tokens; None if they end the answer."""
        running = new()
        allowed = next(running)
        try:
            for token in tokens:
                allowed = running.send(token)
        except StopIteration:
            return None
        return allowed

    def runs(begun: list[int], run: list[int], total: float) -> Iterator[tuple[float, list[int]]]:
        """All ways to finish a run of tokens, with their scores."""
        allowed = state(begun)
        assert allowed is not None
        ids = [each for each in range(allowed.low, allowed.high) if each not in allowed.closed]

        with torch.inference_mode():
            logits = module(torch.tensor([[*ids_T.tolist(), *begun, *run]]))[0, -1, ids].double()

        # A run ends where the grammar allows something else.
        for token, log_p in zip(ids, logits.log_softmax(0).tolist(), strict=True):
            longer = [*run, token]
            if state([*begun, *longer]) == allowed:
                yield from runs(begun, longer, total + log_p)
            else:
                yield (total + log_p) / len(longer) ** penalty, longer

    # Run by run, the best one is kept.
    expected: list[int] = []
    while state(expected) is not None:
        expected += max(runs(expected, [], 0.0))[1]
    assert found == expected


@pytest.mark.parametrize("window", [1, 3])
def test_one_beam_is_greedy_through_all_segments(window: int) -> None:
    """Texts and images, also with drafts: a search leaves in the cache what its tokens leave."""
    new = partial(grammar.interleaved, VOCAB, first="text", grid=(2, 2), text_length=5, segments=4)
    found = []
    for name, fields in (("greedy", {}), ("beam", {"beams": 1}), ("beam", {"beams": 3})):
        decoder = built(name, **fields)
        mixed = {"text": decoder, "image": built("greedy")}
        asked = []
        for ids in ([VOCAB.eos], [VOCAB.eos, 9, 11, 12]):
            decoders = [{"text": decoder, "image": decoder}, mixed]
            asked.append(Request((np.array(ids),), new, 24, decoders, [0, 1]))
        found.append(answers(model(2), asked, vocab=VOCAB, window=window))
    assert found[0] == found[1]

    # Three beams may find other answers, but only such as the grammar allows.
    for tokens in itertools.chain.from_iterable(found[2]):
        running = new()
        allowed = next(running)
        for number, token in enumerate(tokens, 1):
            assert allowed.low <= token < allowed.high
            assert token not in allowed.closed
            if number < len(tokens):
                allowed = running.send(token)

        with pytest.raises(StopIteration):
            running.send(tokens[-1])


def test_samples_of_a_mixture_have_as_many_beams_as_they_alone_would_have() -> None:
    """Beams of two widths, beside samples of two streams."""
    parts = [
        {"name": "beam", "beams": 2},
        {"name": "beam", "beams": 5},
        {"name": "top_p", "cfg": 3.0},
        {"name": "mixture", "decoders": ["greedy", {"name": "beam", "beams": 3}]},
    ]
    others = (np.array([VOCAB.eos, VOCAB.sentinel(0), VOCAB.brk]),)
    ids = [VOCAB.eos, 9, 12, 20, VOCAB.brk]
    together = request(ids, built("mixture", decoders=parts), samples=8, others=others)
    (found,) = answers(model(2), [together], vocab=VOCAB)

    # The mixture takes its parts in turn, and the inner one its own as well.
    taken = [parts[0], parts[1], parts[2], {"name": "greedy"}] * 2
    taken[7] = {"name": "beam", "beams": 3}
    for number, part in enumerate(taken):
        single = request(ids, DECODERS.build(part), others=others, seed=number)
        assert answers(model(2), [single], vocab=VOCAB) == [[found[number]]]


@pytest.mark.once
def test_sampling_has_the_distribution_of_the_model() -> None:
    """Two codes in a row, 4,000 times, against their exact joint probabilities."""
    module, ids_T, count = model(1), np.array([VOCAB.eos, 5, VOCAB.brk]), 4000
    one = request(ids_T, built("top_p", cfg=1, top_p=1), samples=count, length=2)
    (drawn,) = answers(module, [one], vocab=VOCAB)

    codes = list(range(*VOCAB.id_range("image")))
    expected = {}
    with torch.inference_mode():
        first = module(torch.from_numpy(ids_T)[None])[0, -1, codes].double().softmax(0)
        for code, p in zip(codes, first, strict=True):
            logits = module(torch.tensor([[*ids_T.tolist(), code]]))[0, -1, codes]
            for other, q in zip(codes, logits.double().softmax(0), strict=True):
                expected[code, other] = count * float(p * q)

    # Rare pairs are counted together, as the test of their frequencies needs five or more.
    found = Counter(map(tuple, drawn))
    common = [pair for pair, number in expected.items() if number >= 5]
    rest = count - sum(expected[pair] for pair in common)
    observed = [found[pair] for pair in common]
    result = chisquare(
        [*observed, count - sum(observed)], [*(expected[pair] for pair in common), rest]
    )
    assert len(common) > 10
    assert result.pvalue > 1e-3


def test_transformers_draws_the_same_greedily_and_guides_alike() -> None:
    pytest.importorskip("transformers")
    module = model(2)
    opt = OPT.build(
        dict(OPT.to_state(module.state_dict(), module.config)),
        to_opt_config(module.config, module.vocab_size),
    )

    ids_T = np.array([VOCAB.eos, 9, 12, 20, VOCAB.brk])
    other_T = np.array([VOCAB.eos, VOCAB.sentinel(0), VOCAB.brk])
    codes = list(range(*VOCAB.id_range("image")))
    closed = [token for token in range(VOCAB.size) if token not in codes]
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "suppress_tokens": closed,
        "eos_token_id": None,
    }

    # The library calls the second stream of guidance a negative prompt.
    for weight, fields in (
        (None, {"name": "greedy"}),
        (2.5, {"name": "top_p", "cfg": 2.5, "top_k": 1}),
    ):
        guidance: dict[str, Any] = {}
        if weight is not None:
            negative_1T = torch.from_numpy(other_T)[None]
            guidance = {"guidance_scale": weight, "negative_prompt_ids": negative_1T}
        with torch.inference_mode():
            output_1T = opt.generate(torch.from_numpy(ids_T)[None], **options, **guidance)
        expected = output_1T[0, len(ids_T) :].tolist()

        one = request(ids_T, DECODERS.build(fields), length=8, others=(other_T,))
        ((found,),) = answers(module, [one], vocab=VOCAB)
        assert found == expected


class Keeper(Decoder):
    """Keeps the streams that it is given; draws greedily."""

    streams = 3

    def __init__(self) -> None:
        self.given: list[list[torch.Tensor]] = []

    def logits(self, *streams: torch.Tensor) -> torch.Tensor:
        self.given.append([each.clone() for each in streams])
        best = streams[0].argmax(-1, keepdim=True)
        return torch.full_like(streams[0], -torch.inf).scatter(-1, best, 0.0)


def test_three_streams_are_three_separate_passes() -> None:
    module, keeper = model(), Keeper()
    both = [VOCAB.eos, 8, 9, 30, VOCAB.brk]
    neither = [VOCAB.eos, 8, 5, VOCAB.brk]
    first = [VOCAB.eos, 8, 9, 44, VOCAB.brk]
    one = request(both, keeper, samples=2, length=5, others=(np.array(neither), np.array(first)))
    assert one.shared() == 2
    (drawn,) = answers(module, [one], vocab=VOCAB)
    assert drawn[0] == drawn[1]

    codes = list(range(*VOCAB.id_range("image")))
    for stream, ids in enumerate((both, neither, first)):
        expected_TV = alone(module, np.array(ids), np.array(drawn[0]))[:, codes]
        # In one pass without a cache, each stream alone.
        for step, given_ in enumerate(keeper.given):
            for sample in (0, 1):
                found = given_[stream][sample]
                torch.testing.assert_close(found, expected_TV[step], rtol=0, atol=1e-5)


def test_a_short_prefix_is_part_of_the_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    module, decoder = model(), built("top_p", cfg=3.0)
    streams = [np.array([VOCAB.eos, 8, 9, last, VOCAB.brk]) for last in (30, 31)]
    one = request(streams[0].tolist(), decoder, samples=3, others=streams[1:])
    assert one.shared() == 3
    shared = answers(module, [one], vocab=VOCAB)

    monkeypatch.setattr(requests_module, "SHORTEST", 4)
    assert one.shared() == 0
    assert one.tail() == 4 + one.length
    assert answers(module, [one], vocab=VOCAB) == shared


def test_two_conditions_by_the_formula_and_at_its_ends() -> None:
    both, first, neither = torch.randn(3, 2, 7, dtype=torch.float64).unbind()
    found = two_conditions(both, first, neither, first=1.5, both=7.5)
    torch.testing.assert_close(found, neither + 1.5 * (first - neither) + 7.5 * (both - first))
    torch.testing.assert_close(two_conditions(both, first, neither, first=1, both=1), both)

    # If the first condition adds nothing, classifier-free guidance remains.
    alike = two_conditions(both, neither, neither, first=1.5, both=3)
    torch.testing.assert_close(alike, classifier_free(both, neither, 3))


def test_processors_by_hand() -> None:
    logits_BV = torch.tensor([[3.0, 1.0, 2.0, -1.0], [1.0, 4.0, 4.0, 0.0]])
    assert (keep_top_k(logits_BV, 2) > -torch.inf).int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
    assert torch.equal(keep_top_k(logits_BV, 0), logits_BV)

    # Twice as unlikely: positive logits are halved and negative ones doubled, once a token.
    penalized = penalize(logits_BV, [[0, 3, 3], []], 2.0).tolist()
    assert penalized == [[1.5, 1.0, 2.0, -2.0], [1.0, 4.0, 4.0, 0.0]]

    forbidden = forbid_repeats(logits_BV, [[1, 2, 0, 1, 2], [0, 0]], 3) == -torch.inf
    assert forbidden.int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    forbidden = forbid_repeats(logits_BV, [[1, 2], [3]], 1) == -torch.inf
    assert forbidden.int().tolist() == [[0, 1, 1, 0], [0, 0, 0, 1]]


@given(tokens=st.lists(st.integers(0, 3), max_size=12), size=st.integers(1, 4))
@settings(max_examples=100)
def test_what_is_forbidden_is_what_would_repeat(tokens: list[int], size: int) -> None:
    forbidden = forbid_repeats(torch.zeros(1, 4), [tokens], size)[0] == -torch.inf
    runs = {tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)}
    for token in range(4):
        ending = tuple([*tokens, token][-size:])
        assert bool(forbidden[token]) == (len(ending) == size and ending in runs)


def test_text_does_not_repeat_itself() -> None:
    asked = [prompt(np.random.default_rng(n), 4, "text", 40, False) for n in range(4)]
    decoder = built("top_p", cfg=1, top_p=1, temperature=0.3, no_repeat=2, repetition_penalty=1.2)
    for answer_T in generate(model(), asked, decoder, vocab=VOCAB, seeds=range(4)):
        pairs = list(itertools.pairwise(answer_T.tolist()))
        assert len(pairs) == len(set(pairs))


def test_a_mixture_takes_its_decoders_in_turn() -> None:
    ids, other = [VOCAB.eos, 9, VOCAB.brk], (np.array([VOCAB.eos, VOCAB.sentinel(0), VOCAB.brk]),)
    one = request(ids, built("mixture"), samples=4, others=other)
    (mixed,) = answers(model(), [one], vocab=VOCAB)
    for number, name in enumerate(("top_p", "cd_k", "top_p", "cd_k")):
        single = request(ids, built(name), seed=number, others=other)
        assert answers(model(), [single], vocab=VOCAB) == [[mixed[number]]]


# ---------------------------------------------------------------------------------------- grammars


def spoken(new: grammar.NewGrammar, rng: np.random.Generator) -> list[int]:
    """An answer by a grammar, drawn evenly from what it allows."""
    running, tokens = new(), []
    allowed = next(running)
    while True:
        choices = [each for each in range(allowed.low, allowed.high) if each not in allowed.closed]
        assert choices
        tokens.append(int(rng.choice(choices)))
        try:
            allowed = running.send(tokens[-1])
        except StopIteration:
            return tokens


@given(
    first=st.sampled_from(["text", "image"]),
    codes=st.integers(1, 5),
    text=st.integers(1, 6),
    segments=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=100)
def test_interleaved_answers_are_documents(
    first: Any, codes: int, text: int, segments: int, seed: int
) -> None:
    new = partial(
        grammar.interleaved,
        VOCAB,
        first=first,
        grid=(1, codes),
        text_length=text,
        segments=segments,
    )
    tokens = spoken(new, np.random.default_rng(seed))
    assert tokens[-1] == VOCAB.eos
    assert tokens.count(VOCAB.eos) == 1

    # The tokens as letters, "i" of an image and "t" of a text, and "|" between their runs.
    letters = ""
    for token in tokens:
        if VOCAB.image_start <= token < VOCAB.sentinel_start:
            letters += "i"
        elif token < 4:
            letters += "|"
        else:
            letters += "t"
    runs = letters.split("|")[:-1]
    assert 1 <= len(runs) <= segments
    for number, run in enumerate(runs):
        is_image = (first == "image") == (number % 2 == 0)
        assert run == "i" * codes if is_image else set(run) <= {"t"} and len(run) <= text

    assert len(tokens) <= segments * (max(codes, text) + 1)
    shown = list(grammar.segments_of(tokens, VOCAB))
    assert [len(ids) for _, ids in shown] == [len(run) for run in runs if run]


def test_any_spans_are_asked_for_and_filled() -> None:
    """By the engine: two rows of a box and a word; everything around them stays."""
    codes = VOCAB.image_ids(np.arange(16))
    text = TokenSegment("text", np.array([10, 11, 12, 13]))
    query = TokenDocument("q", (text, TokenSegment("image", codes)))
    spans = [
        AskedSpan(0, 1, 3),
        *box_spans((1, 1, 3, 3), segment=1, grid=(4, 4), width=4, height=4, layout=PAPER),
    ]
    assert spans[1:] == [AskedSpan(1, 5, 7), AskedSpan(1, 9, 11)]

    ids_T = spans_prompt(query, spans, (), VOCAB)
    masked_text = [10, VOCAB.sentinel(0), 13, VOCAB.brk]
    masked_image = [*codes[:5], VOCAB.sentinel(1), *codes[7:9], VOCAB.sentinel(2), *codes[11:]]
    expected = [VOCAB.eos, *masked_text, *masked_image, VOCAB.eos, VOCAB.sentinel(0)]
    assert ids_T.tolist() == expected

    gaps = [grammar.Gap("text", 4), grammar.Gap("image", 2), grammar.Gap("image", 2)]
    decoders = [{"text": built("top_p", cfg=1), "image": built("top_p", cfg=1)}]
    asked = Request((ids_T,), partial(grammar.infilling, VOCAB, gaps), 14, decoders, [3])
    ((tokens,),) = answers(model(), [asked], vocab=VOCAB)
    sentinels = [token for token in tokens if token >= VOCAB.sentinel_start]
    assert sentinels == [VOCAB.sentinel(1), VOCAB.sentinel(2)]
    assert tokens.count(VOCAB.end_of_span) == 2

    completed = fill(query, spans, tokens, VOCAB)
    text_T, image_T = (segment.ids_T for segment in completed.segments)
    assert (text_T[0], text_T[-1]) == (10, 13)
    outside = np.delete(np.arange(16), [5, 6, 9, 10])
    assert np.array_equal(image_T[outside], codes[outside])
    assert VOCAB.is_image(image_T).all()

    # Whole rows of codes are one span.
    whole_rows = box_spans((0, 1, 4, 3), segment=1, grid=(4, 4), width=4, height=4, layout=PAPER)
    assert whole_rows == [AskedSpan(1, 4, 12)]

    for wrong in ([], [AskedSpan(0, 2, 2)], [AskedSpan(1, 3, 5), AskedSpan(1, 4, 6)]):
        with pytest.raises(UserError, match="spans"):
            spans_prompt(query, wrong, (), VOCAB)


class Guided(Keeper):
    """Draws the largest of the guided logits, and keeps what it was given."""

    streams = 2

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def logits(self, *streams: torch.Tensor) -> torch.Tensor:
        super().logits(*streams)
        guided = classifier_free(*streams, self.weight)
        best = guided.argmax(-1, keepdim=True)
        return torch.full_like(guided, -torch.inf).scatter(-1, best, 0.0)


class Recorded(Decoder):
    """Passes on to another decoder, and keeps all that it returned."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.made: list[torch.Tensor] = []

    @property
    def streams(self) -> int:
        return self.decoder.streams

    def logits(self, *streams: torch.Tensor) -> torch.Tensor:
        self.made.append(self.decoder.logits(*streams))
        return self.made[-1]


FILLED = TokenDocument(
    "q",
    (
        TokenSegment("text", np.array([10, 11, 12, 13, 14])),
        TokenSegment("image", VOCAB.image_ids(np.arange(16))),
    ),
)
ROWS = [AskedSpan(1, 5, 7), AskedSpan(1, 9, 11)], [grammar.Gap("image", 2)] * 2
WORDS = [AskedSpan(0, 1, 3)], [grammar.Gap("text", 6)]


def infilling_request(
    asked: tuple[list[AskedSpan], list[grammar.Gap]], decoder: Any, seeds: Sequence[int]
) -> Request:
    """Samples of the spans of `FILLED`, with a stream that lacks what guides them."""
    spans, gaps = asked
    streams = (
        spans_prompt(FILLED, spans, (), VOCAB),
        unconditional_spans_prompt(FILLED, spans, (), VOCAB),
    )
    assert streams[1] is not None
    length = sum(gap.length + 2 for gap in gaps)
    new = partial(grammar.infilling, VOCAB, gaps)
    decoders = [{"text": decoder, "image": decoder}] * len(seeds)
    return Request(streams, new, length, decoders, seeds)  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", [ROWS, WORDS], ids=["box", "words"])
def test_batched_guidance_of_infilling_is_two_passes_combined_by_the_formula(asked: Any) -> None:
    """Each token is the largest of uncond + w (cond - uncond), each stream computed by itself."""
    module, decoder = model(), Guided(2.5)
    request_ = infilling_request(asked, decoder, [3])
    ((tokens,),) = answers(module, [request_], vocab=VOCAB)
    given_TV, masked_TV = (alone(module, ids_T, np.array(tokens)) for ids_T in request_.streams)
    guided_TV = masked_TV + 2.5 * (given_TV - masked_TV)

    # The grammar's own tokens are not drawn: the decoder is asked for the others, in their order.
    steps, running = iter(decoder.given), request_.grammar()
    allowed, drawn = next(running), []
    for position, token in enumerate(tokens):
        if allowed.forced is None:
            ids = [each for each in range(allowed.low, allowed.high) if each not in allowed.closed]
            for kept, expected_TV in zip(next(steps), (given_TV, masked_TV), strict=True):
                torch.testing.assert_close(kept[0], expected_TV[position, ids], rtol=0, atol=1e-5)
            drawn.append(ids[int(guided_TV[position, ids].argmax())] == token)
        with contextlib.suppress(StopIteration):
            allowed = running.send(token)

    assert drawn
    assert all(drawn)
    assert next(steps, None) is None


@pytest.mark.parametrize("asked", [ROWS, WORDS], ids=["box", "words"])
def test_infilling_guided_by_a_weight_of_one_is_unguided_bit_for_bit(asked: Any) -> None:
    module, seeds = model(), range(4)
    one = infilling_request(asked, built("top_p", cfg=1.0), seeds)
    bare = replace(one, streams=one.streams[:1])
    assert answers(module, [one], vocab=VOCAB) == answers(module, [bare], vocab=VOCAB)

    # Beyond the answers, the logits that they are drawn from have the same bits.
    kept = []
    for request_ in (one, bare):
        recorded = Recorded(built("top_p", cfg=1.0, top_p=1.0))
        decoders = [{"text": recorded, "image": recorded}] * 4
        answers(module, [replace(request_, decoders=decoders)], vocab=VOCAB)
        kept.append(recorded.made)
    assert kept[0]
    for given_, alone_ in zip(*kept, strict=True):
        assert torch.equal(given_, alone_)

    guided = infilling_request(asked, built("top_p", cfg=3.0), seeds)
    assert answers(module, [guided], vocab=VOCAB) != answers(module, [bare], vocab=VOCAB)


@pytest.mark.parametrize(
    ("box", "width", "height", "codes"),
    [
        ((0, 0, 8, 8), 32, 32, [0]),
        ((8, 0, 24, 8), 40, 32, None),  # 4 pixels of margin: pixel 8 is in the code of 4 to 11
        ((4, 0, 12, 8), 40, 32, [0]),
        ((28, 24, 36, 32), 40, 32, [15]),
        ((0, 4, 8, 12), 32, 40, [0]),
        ((100, 0, 200, 100), 600, 400, [0]),  # a large photograph: codes of 100 pixels
        ((0, 0, 3, 3), 3, 3, list(range(16))),  # an image of fewer pixels than codes
        ((0, 0, 1, 1), 3, 3, [0, 1, 4, 5]),  # codes of 3/4 of a pixel
        ((1, 0, 2, 2), 5, 2, None),
    ],
)
def test_a_box_is_in_the_pixels_of_the_image_that_is_given(
    box: tuple[int, int, int, int], width: int, height: int, codes: list[int] | None
) -> None:
    """Against the tokenizer's square, in exact fractions: a code that the box touches is asked."""
    spans = box_spans(box, segment=1, grid=(4, 4), width=width, height=height, layout=PAPER)
    found = [code for span in spans for code in range(span.start, span.end)]

    side = Fraction(min(width, height))
    margins = (width - side) / 2, (height - side) / 2
    expected = []
    for code in range(16):
        left, top = (margins[k] + (code % 4, code // 4)[k] * side / 4 for k in (0, 1))
        across = box[0] < left + side / 4 and left < box[2]
        if across and box[1] < top + side / 4 and top < box[3]:
            expected.append(code)
    assert found == expected
    assert codes is None or found == codes


@pytest.mark.parametrize("box", [(0, 0, 8, 8), (30, 0, 40, 8), (36, 0, 37, 8), (4, 0, 36, 33)])
def test_a_box_outside_of_what_the_model_sees_is_a_sentence(box: Any) -> None:
    sentence = r"an image of 40 x 32 pixels, in the square \(4, 0, 36, 32\)"
    with pytest.raises(UserError, match=sentence):
        box_spans(box, segment=1, grid=(4, 4), width=40, height=32, layout=PAPER)


# ---------------------------------------------------------------------------- sharing and queueing


def test_samples_of_a_prompt_are_those_of_the_prompt_alone() -> None:
    """A shared prefix, tails of two streams, several groups: each sample is as by itself."""
    document = list(range(6, 26))
    ids = [VOCAB.eos, *document, VOCAB.brk, 30, 31, VOCAB.brk]
    other = (np.array([VOCAB.eos, *document, VOCAB.brk, VOCAB.sentinel(0), VOCAB.brk]),)
    decoder = built("top_p", cfg=2, top_p=1.0)
    one = request(ids, decoder, samples=19, others=other)
    assert one.shared() == 22
    (together,) = answers(model(), [one], vocab=VOCAB)
    assert shape_for(model(), [one]).groups == 3
    for seed, tokens in enumerate(together):
        single = request(ids, decoder, seed=seed, others=other)
        assert answers(model(), [single], vocab=VOCAB) == [[tokens]]


def run_all(engine: Engine, requests: Sequence[Request]) -> dict[int, list[int]]:
    """Answer requests by an engine; returns the tokens by ticket."""
    for each in requests:
        engine.submit(each)
    return {answer.ticket: answer.tokens for answer in engine.run()}


def test_waiting_requests_enter_as_others_leave() -> None:
    module, asked = model(), prompts(4)
    requests = [
        request_for(one, built("top_p", cfg=2), vocab=VOCAB, seeds=[row], seq_len=SEQ_LEN)
        for row, one in enumerate(asked)
    ]

    wide = shape_for(module, requests)
    expected = run_all(Engine(module, VOCAB, wide), requests)

    narrow = Engine(module, VOCAB, Shape(2, wide.width, wide.prefix, wide.tail))

    # Two groups at a time: the others wait until one of them has left.
    tickets = [narrow.submit(each) for each in requests]
    found: dict[int, list[int]] = {}
    most = 0
    while narrow.busy:
        for answer in narrow.step():
            found[answer.ticket] = answer.tokens
        most = max(most, len(narrow._groups))

    assert most == 2
    assert found == {ticket: expected[ticket] for ticket in tickets}


# ------------------------------------------------------------------------- drafts and ways to step


@given(
    window=st.integers(2, 9),
    seed=st.integers(0, 99),
    name=st.sampled_from(["top_p", "cd_k", "mixture", "edit"]),
)
@settings(max_examples=15, deadline=None)
@pytest.mark.once
def test_drafts_change_no_answer(window: int, seed: int, name: str) -> None:
    """Images and texts of different lengths side by side, more of them than the engine holds."""
    module, asked = model(seed), prompts(4)
    requests = [
        request_for(one, built(name), vocab=VOCAB, seeds=[seed + row, row], seq_len=SEQ_LEN - 9)
        for row, one in enumerate(asked)
    ]
    plain = answers(module, requests, vocab=VOCAB, samples=3)
    assert answers(module, requests, vocab=VOCAB, samples=3, window=window) == plain


def test_drafts_change_no_answer_of_several_segments() -> None:
    new = partial(grammar.interleaved, VOCAB, first="image", grid=(1, 5), text_length=4, segments=5)
    of = {"image": built("top_p", cfg=1), "text": built("top_p", cfg=1, no_repeat=2)}
    one = Request((np.array([VOCAB.eos, 9, VOCAB.brk]),), new, 24, [of] * 8, range(8))
    plain = answers(model(), [one], vocab=VOCAB)
    assert len({len(tokens) for tokens in plain[0]}) > 1
    assert answers(model(), [one], vocab=VOCAB, window=4) == plain


@pytest.mark.parametrize(("window", "steps"), [(1, 20), (4, 6), (19, 2)])
def test_right_drafts_save_steps(window: int, steps: int) -> None:
    """Drafts are right where the noise alone decides; the first step has none yet."""
    module = model()
    torch.nn.init.zeros_(module.head.weight)
    one = request([VOCAB.eos, 3], built("top_p", cfg=1), length=20)
    engine = Engine(module, VOCAB, shape_for(module, [one], window=window), window=window)
    engine.submit(one)
    list(engine.run())
    assert engine.steps == steps


def test_what_is_recorded_does_the_same_without_its_python() -> None:
    """As a CUDA graph does it: a step's operations are repeated on the same tensors."""
    shapes = 0

    def recorder(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        nonlocal shapes
        shapes += 1
        recorded = make_fx(compute)()  # refuses what would read a number on the way
        return partial(recorded)

    module, asked = model(), prompts(4)
    requests = [
        request_for(one, built("top_p", cfg=2), vocab=VOCAB, seeds=[row, 7], seq_len=SEQ_LEN - 2)
        for row, one in enumerate(asked)
    ]
    for window in (1, 3):
        shape = shape_for(module, requests, window=window, samples=6)
        engine = Engine(module, VOCAB, shape, window=window, execution="graph", recorder=recorder)
        eager = Engine(module, VOCAB, shape, window=window)
        assert run_all(engine, requests) == run_all(eager, requests)

    # The few shapes of steps are recorded once each.
    assert 2 <= shapes < engine.steps / 2


def test_graphs_need_cuda() -> None:
    with pytest.raises(UserError, match="needs CUDA"):
        Engine(model(), VOCAB, Shape(1, 1, 8, 8), execution="graph")


def test_an_engine_that_took_time_to_make_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    module = model()
    small = request([1, 2, 3], built("top_p"), samples=2)
    longer = request([1, 2, *range(3, 9)], built("top_p"), samples=2)
    wide = request([1, 2], built("top_p"), samples=3)

    keeper = Answerer(module, VOCAB, execution="compiled")
    engines = []
    for one in (small, longer, wide, wide):
        assert keeper.answers([one]) == answers(module, [one], vocab=VOCAB)
        engines.append(keeper._kept)
    assert engines[0] is engines[1] is not engines[2] is engines[3]


def test_an_interrupted_answer_leaves_a_kept_engine_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    two = [request([1, 2, 3], built("top_p"), length=length) for length in (2, 9)]
    keeper = Answerer(model(), VOCAB, execution="compiled", window=1)

    def stop(answer: FinishedSample) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keeper.answers(two, on_answer=stop)
    assert keeper.answers(two) == answers(model(), two, vocab=VOCAB)


@pytest.mark.parametrize("most", [1, 4, 9])
def test_memory_that_runs_out_costs_time_alone(most: int) -> None:
    """A model that has room for so many rows a pass, whatever was planned."""
    module, steps = model(), []
    requests = [
        request([1, 2, 3 + n], built("top_p", cfg=1), samples=5, length=3 + n, seed=9 * n)
        for n in range(3)
    ]

    def limited(module: Any, args: tuple[Tensor]) -> None:
        rows = len(args[0])
        if rows <= most:
            return
        # Only every third of such passes fails, so that it is also found out in the middle.
        steps.append(rows)
        if len(steps) % 3 == 0:
            raise torch.OutOfMemoryError

    expected = answers(module, requests, vocab=VOCAB)
    module.register_forward_pre_hook(limited)

    seen: list[tuple[int, int]] = []
    found = answers(
        module,
        requests,
        vocab=VOCAB,
        on_answer=lambda answer: seen.append((answer.ticket, answer.number)),
    )
    assert found == expected
    assert sorted(seen) == [(ticket, number) for ticket in range(3) for number in range(5)]


def test_a_single_sample_without_memory_is_a_sentence() -> None:
    module = model()

    def never(module: Any, args: Any) -> None:
        raise torch.OutOfMemoryError

    module.register_forward_pre_hook(never)
    with pytest.raises(UserError, match="single sample takes more memory"):
        answers(module, [request([1, 2], built("greedy"), samples=9)], vocab=VOCAB)


@given(
    groups=st.integers(1, 3),
    samples=st.integers(1, 40),
    prefix=st.integers(1, 30),
    length=st.integers(1, 20),
    memory=st.integers(10_000, 3_000_000),
)
@settings(max_examples=40, deadline=None)
def test_keys_and_values_stay_within_the_memory_given(
    groups: int, samples: int, prefix: int, length: int, memory: int
) -> None:
    module = model()
    requests = [
        request(range(4, 4 + prefix), built("top_p", cfg=1), samples=samples, length=length)
        for _ in range(groups)
    ]
    first = requests[0]
    one = module.cache_bytes(groups=1, width=1, prefix=first.shared(), tail=first.tail())

    # Where not even one sample fits, the request is refused.
    if one > memory:
        with pytest.raises(UserError, match="GB are free"):
            shape_for(module, requests, memory=memory)
        return

    shape = shape_for(module, requests, memory=memory)
    engine = Engine(module, VOCAB, shape)
    assert engine._cache.nbytes() <= memory
    for each in requests:
        engine.submit(each)
    assert len(list(engine.run())) == groups * samples


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("execution", ["compiled", "graph", "compiled graph"])
@pytest.mark.parametrize("window", [1, 4])
def test_recorded_steps_on_a_gpu_are_those_from_python(execution: Any, window: int) -> None:
    module, asked = model().cuda(), prompts(4)
    requests = [
        request_for(one, built("top_p", cfg=2), vocab=VOCAB, seeds=[row], seq_len=SEQ_LEN - 3)
        for row, one in enumerate(asked)
    ]
    keeper = Answerer(module, VOCAB, window=window, execution=execution)
    for _ in range(2):
        assert keeper.answers(requests) == answers(module, requests, vocab=VOCAB, window=1)


@pytest.mark.slow
def test_compiled_steps_are_those_from_python() -> None:
    module, asked = model(), prompts(4)
    decoder = built("top_p", cfg=2)
    requests = [
        request_for(one, decoder, vocab=VOCAB, seeds=[row], seq_len=SEQ_LEN)
        for row, one in enumerate(asked)
    ]
    plain = answers(module, requests, vocab=VOCAB)
    assert answers(module, requests, vocab=VOCAB, execution="compiled") == plain


def test_a_cancelled_request_makes_room_at_once() -> None:
    module = model()
    decoder = built("greedy")
    slow, fast = request([1, 2, 3], decoder, length=20), request([1, 2, 4], decoder, length=3)
    engine = Engine(module, VOCAB, Shape(1, 1, 8, 24))
    first, second, third = engine.submit(slow), engine.submit(fast), engine.submit(fast)

    engine.step()
    engine.cancel(first)
    engine.cancel(third)

    found = list(engine.run())
    ((alone_,),) = answers(module, [fast], vocab=VOCAB)
    assert found == [FinishedSample(second, 0, alone_)]
    assert not engine.busy


def test_requests_without_room_are_refused_in_a_sentence() -> None:
    module = model()
    engine = Engine(module, VOCAB, Shape(1, 1, 4, 8))
    sentence = "a request of 2 rows, 1 shared tokens and 7 tokens of each row does not fit"
    with pytest.raises(UserError, match=sentence):
        engine.submit(request([1, 5, 6], built("cd_k"), others=(np.array([1, 7, 8]),)))

    # By the memory that is given, a request is refused, or fewer groups and samples run at a time.
    long = request(range(1, 60), built("greedy"), length=5)
    with pytest.raises(UserError, match=r"one sample of 63 tokens in 1 rows takes .* GB are free"):
        shape_for(module, [long], memory=1000)

    group = module.cache_bytes(groups=1, width=4, prefix=58, tail=5)
    many = [request(range(1, 60), built("greedy"), samples=4, length=5, seed=n) for n in range(9)]
    assert shape_for(module, many, memory=3 * group + 10).groups == 3
    half = module.cache_bytes(groups=1, width=2, prefix=58, tail=5)
    assert shape_for(module, many, memory=half) == Shape(1, 2, 58, 5)
    assert shape_for(module, many).groups == 9


# ------------------------------------------------------------------------------------------ scores


def test_log_likelihoods_are_sums_of_log_probabilities() -> None:
    module, rng = model(), np.random.default_rng(0)
    asked = [np.concatenate([[1], rng.integers(3, VOCAB.used, size)]) for size in (0, 5, 12, 3)]
    given_ = [rng.integers(3, VOCAB.used, size) for size in (4, 1, 0, 9)]
    found = log_likelihoods(module, asked, given_)
    for ids_T, answer_T, value in zip(asked, given_, found, strict=True):
        expected = 0.0
        if len(answer_T):
            log_p_TV = alone(module, ids_T, answer_T).double().log_softmax(-1)
            columns = torch.from_numpy(answer_T)
            expected = log_p_TV[torch.arange(len(answer_T)), columns].sum().item()
        assert value == pytest.approx(expected, abs=1e-4)

    assert log_likelihoods(module, [], []) == []
    with pytest.raises(UserError, match="take 70 tokens, the model has 64 positions"):
        log_likelihoods(module, [np.ones(60, np.int64)], [np.ones(10, np.int64)])
