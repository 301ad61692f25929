"""Answers to prompts, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from cm3leon.decoders import grammar
from cm3leon.decoders.decoders import Decoder, decoder_of
from cm3leon.decoders.engine import Answer, Engine
from cm3leon.decoders.request import Request, shape_for
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Prompt


def answers(
    model: Any,
    requests: Sequence[Request],
    *,
    vocab: Vocab,
    samples: int = 256,
    on_answer: Callable[[Answer], object] | None = None,
) -> list[list[list[int]]]:
    """Tokens of all samples of all requests.

    Args:
        model: from `MODELS`, in evaluation mode.
        samples: how many are in the making at a time, at most.
        on_answer: called with each as it is finished; its ticket is the number of the request.

    Raises:
        UserError: for a request without room, in the model's positions or in memory.
    """
    for request in requests:
        request.check(model.seq_len)
    found: list[list[list[int]]] = [[[] for _ in request.seeds] for request in requests]
    if not requests:
        return found
    engine = Engine(model, vocab, shape_for(model, requests, samples=samples))
    for request in requests:
        engine.submit(request)
    for answer in engine.run():
        found[answer.ticket][answer.number] = answer.tokens
        if on_answer:
            on_answer(answer)
    return found


def generate(
    model: Any,
    prompts: Sequence[Prompt],
    decoder: Decoder,
    *,
    vocab: Vocab,
    seeds: Sequence[int],
    batch_size: int = 256,
    on_answer: Callable[[Answer], object] | None = None,
) -> list[np.ndarray]:
    """Answers to prompts: ids of the answer's modality, without what closes it.

    An image answer is exactly `length` codes, a text answer is text until `end` or `length` pieces, or as many as the
    model has positions for. Prompts of different lengths and modalities may be mixed; equal ones are computed once.

    Args:
        model: from `MODELS`, in evaluation mode.
        seeds: one for each prompt; its answer depends on it alone, not on its neighbours (up to rounding).
        batch_size: samples in the making at a time; guidance doubles the rows.
        on_answer: called as each is finished.

    Raises:
        UserError: for a prompt that leaves no room for its answer.
    """
    same: dict[tuple[Any, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        other = None if prompt.unconditional_T is None else prompt.unconditional_T.tobytes()
        key = (prompt.ids_T.tobytes(), other, prompt.modality, prompt.length, prompt.end)
        same.setdefault(key, []).append(number)
    # Like lengths side by side: their prompts are computed together.
    groups = sorted(same.values(), key=lambda numbers: (len(prompts[numbers[0]].ids_T), numbers))
    requests = [
        request_for(prompts[numbers[0]], decoder, vocab=vocab, seeds=[seeds[n] for n in numbers], seq_len=model.seq_len)
        for numbers in groups
    ]
    found = answers(model, requests, vocab=vocab, samples=batch_size, on_answer=on_answer)
    result: list[np.ndarray] = [np.empty(0, np.int64)] * len(prompts)
    for numbers, tokens in zip(groups, found, strict=True):
        for number, answer in zip(numbers, tokens, strict=True):
            closed = bool(answer) and answer[-1] == prompts[number].end
            result[number] = np.array(answer[:-1] if closed else answer, np.int64)
    return result


def request_for(prompt: Prompt, decoder: Decoder, *, vocab: Vocab, seeds: Sequence[int], seq_len: int) -> Request:
    """Samples of a prompt, whose text answer ends at the latest where the model's positions do."""
    streams = tuple(ids_T for ids_T in (prompt.ids_T, prompt.unconditional_T) if ids_T is not None)
    if prompt.modality == "image":
        length = prompt.length
        new: grammar.NewGrammar = partial(grammar.image, vocab, length)
    else:
        room = max(seq_len - max(map(len, streams)), min(1, prompt.length))
        length = min(prompt.length, room)
        new = partial(grammar.text, vocab, length, prompt.end)
    of = [{prompt.modality: decoder_of(decoder, number)} for number in range(len(seeds))]
    return Request(streams, new, length, of, seeds)
