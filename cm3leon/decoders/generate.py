"""Answers to prompts, many at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from cm3leon.decoders import grammar
from cm3leon.decoders.base import Decoder
from cm3leon.decoders.engine import Engine, FinishedSample
from cm3leon.decoders.request import Request, shape_for
from cm3leon.models.base import Model
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Execution, Prompt, UserError

WINDOW = 4
"""Window of the engine where a single image is asked for:
more codes a step pay where few rows make it."""
ROUNDING = 256
"""Columns of an engine that is kept are a multiple of this, so that more requests fit it."""


class Answers(Protocol):
    """What answers requests, as `Answerer` does."""

    def answers(self, requests: Sequence[Request], /) -> list[list[list[int]]]:
        """Tokens of all samples of all requests."""


class Answerer:
    """Answers requests, with an engine that is kept for later ones where preparing it takes time.

    Args:
        model: from `MODELS`, in evaluation mode.
        window: see `Engine`; None = `WINDOW` for a single image, 1 for more.
        execution: see `Steps`; all but eager keep the engine, and its memory.
    """

    def __init__(
        self,
        model: Model,
        vocab: Vocab,
        *,
        window: int | None = None,
        execution: Execution = "eager",
    ) -> None:
        self.model, self.vocab, self.window, self.execution = model, vocab, window, execution
        self._kept: Engine | None = None

    def answers(
        self,
        requests: Sequence[Request],
        *,
        samples: int = 256,
        on_answer: Callable[[FinishedSample], object] | None = None,
    ) -> list[list[list[int]]]:
        """Tokens of all samples of all requests.

        Args:
            samples: how many are in the making at a time, at most.
            on_answer: called with each as it is finished; its ticket is the number of the request.

        Raises:
            UserError: for a request without room, in the model's positions or in memory.
        """
        for request in requests:
            request.check(self.model.seq_len)
        found: list[dict[int, list[int]]] = [{} for _ in requests]

        def keep(answer: FinishedSample) -> None:
            found[answer.ticket][answer.number] = answer.tokens
            if on_answer:
                on_answer(answer)

        while left := {
            number: [sample for sample in range(len(request.seeds)) if sample not in found[number]]
            for number, request in enumerate(requests)
            if len(found[number]) < len(request.seeds)
        }:
            try:
                self._run(requests, left, samples, keep)
            except torch.OutOfMemoryError as error:  # more than was foreseen, or others took it
                if samples == 1:
                    raise UserError(
                        "a single sample takes more memory than there is; use fewer retrieved "
                        "documents, a smaller model, or another device"
                    ) from error
                self._kept = None
                samples = max(1, min(samples, sum(map(len, left.values()))) // 2)
        return [[of[sample] for sample in range(len(of))] for of in found]

    def _run(
        self,
        requests: Sequence[Request],
        left: Mapping[int, Sequence[int]],
        samples: int,
        keep: Callable[[FinishedSample], None],
    ) -> None:
        """Gives `keep` those samples of requests;
        an answer's ticket is the number of the request."""
        parts = {number: requests[number].part(numbers) for number, numbers in left.items()}
        engine = self._engine(list(parts.values()), samples)
        tickets = {engine.submit(part): number for number, part in parts.items()}
        try:
            for answer in engine.run():
                number = tickets[answer.ticket]
                keep(replace(answer, ticket=number, number=left[number][answer.number]))
        finally:
            for ticket in tickets:  # those that an interruption left
                engine.cancel(ticket)

    def _engine(self, requests: Sequence[Request], samples: int) -> Engine:
        single = (
            sum(len(request.seeds) for request in requests) == 1
            and "image" in requests[0].decoders[0]
        )
        window = self.window or (WINDOW if single else 1)
        if self.execution == "eager":
            shape = shape_for(self.model, requests, samples=samples, window=window)
            return Engine(self.model, self.vocab, shape, window=window)
        wanted = shape_for(self.model, requests, samples=samples, window=window, memory=sys.maxsize)
        kept = self._kept
        if kept is None or kept.window != window or not kept.shape.holds(wanted):
            kept = self._kept = None  # its memory is free for the new one
            shape = shape_for(
                self.model, requests, samples=samples, window=window, multiple=ROUNDING
            )
            kept = self._kept = Engine(
                self.model, self.vocab, shape, window=window, execution=self.execution
            )
        return kept


def answers(
    model: Model,
    requests: Sequence[Request],
    *,
    vocab: Vocab,
    samples: int = 256,
    window: int | None = None,
    execution: Execution = "eager",
    on_answer: Callable[[FinishedSample], object] | None = None,
) -> list[list[list[int]]]:
    """Tokens of all samples of all requests, see `Answerer`."""
    return Answerer(model, vocab, window=window, execution=execution).answers(
        requests, samples=samples, on_answer=on_answer
    )


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    decoder: Decoder,
    *,
    vocab: Vocab,
    seeds: Sequence[int],
    batch_size: int = 256,
    on_answer: Callable[[FinishedSample], object] | None = None,
) -> list[np.ndarray]:
    """Answers to prompts: ids of the answer's modality, without what closes it.

    An image answer is exactly `length` codes, a text answer is text until one of `ends` or `length`
    pieces, or as many as the model has positions for. Prompts of different lengths and modalities
    may be mixed; equal ones are computed once.

    Args:
        model: from `MODELS`, in evaluation mode.
        seeds: one for each prompt; its answer depends on it alone,
            not on its neighbours (up to rounding).
        batch_size: samples in the making at a time; guidance doubles the rows.
        on_answer: called as each is finished.

    Raises:
        UserError: for a prompt that leaves no room for its answer.
    """
    same: dict[tuple[Any, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        others = [
            None if ids_T is None else ids_T.tobytes()
            for ids_T in (prompt.unconditional_T, prompt.partial_T)
        ]
        key = (prompt.ids_T.tobytes(), *others, prompt.modality, prompt.length, prompt.ends)
        same.setdefault(key, []).append(number)
    # Like lengths side by side: their prompts are computed together.
    groups = sorted(same.values(), key=lambda numbers: (len(prompts[numbers[0]].ids_T), numbers))
    requests = [
        request_for(
            prompts[numbers[0]],
            decoder,
            vocab=vocab,
            seeds=[seeds[n] for n in numbers],
            seq_len=model.seq_len,
        )
        for numbers in groups
    ]
    found = answers(model, requests, vocab=vocab, samples=batch_size, on_answer=on_answer)
    result: list[np.ndarray] = [np.empty(0, np.int64)] * len(prompts)
    for numbers, tokens in zip(groups, found, strict=True):
        for number, answer in zip(numbers, tokens, strict=True):
            result[number] = np.array(prompts[number].content(answer), np.int64)
    return result


def longest_answer(prompt: Prompt, seq_len: int) -> int:
    """Tokens that an answer may have: those of an image exactly,
    a text's as far as the positions go."""
    if prompt.modality == "image":
        return prompt.length
    streams = (prompt.ids_T, prompt.unconditional_T, prompt.partial_T)
    longest = max(len(ids_T) for ids_T in streams if ids_T is not None)
    room = max(seq_len - longest, min(1, prompt.length))
    return min(prompt.length, room)


def is_truncated(prompt: Prompt, answer_T: Sequence[int] | np.ndarray, seq_len: int) -> bool:
    """Whether a text was stopped by its length, or by the model's positions, before it ended.

    Args:
        answer_T: without the token that ends it. That one counts as a token of the answer, too, so
            that an answer which ended is shorter than the longest one.
    """
    return prompt.modality == "text" and len(answer_T) >= longest_answer(prompt, seq_len)


def request_for(
    prompt: Prompt, decoder: Decoder, *, vocab: Vocab, seeds: Sequence[int], seq_len: int
) -> Request:
    """Samples of a prompt, whose text answer ends at the latest where the model's positions do."""
    of_prompt = (prompt.ids_T, prompt.unconditional_T, prompt.partial_T)
    streams = tuple(ids_T for ids_T in of_prompt if ids_T is not None)
    length = longest_answer(prompt, seq_len)
    if prompt.modality == "image":
        new: grammar.NewGrammar = partial(grammar.image, vocab, length, prompt.closed)
    else:
        new = partial(grammar.text, vocab, length, *prompt.ends)
    of = [{prompt.modality: decoder.of(number)} for number in range(len(seeds))]
    return Request(streams, new, length, of, seeds)
