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
"""Window of the engine for a single image: with few rows, more codes a step are nearly free."""
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
            samples: most samples that are generated at a time.
            on_answer: called with each finished sample; its ticket is the index of the request.

        Raises:
            UserError: for a request that the model has no positions for, or the device no memory.
        """
        for request in requests:
            request.check(self.model.seq_len)
        found: list[dict[int, list[int]]] = [{} for _ in requests]

        def keep(answer: FinishedSample) -> None:
            found[answer.ticket][answer.number] = answer.tokens
            if on_answer:
                on_answer(answer)

        # When memory runs out, what is missing is tried again with half as many samples at a time.
        while left := _unanswered(requests, found):
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

        result = []
        for by_sample in found:
            result.append([by_sample[sample] for sample in range(len(by_sample))])
        return result

    def _run(
        self,
        requests: Sequence[Request],
        left: Mapping[int, Sequence[int]],
        samples: int,
        keep: Callable[[FinishedSample], None],
    ) -> None:
        """Answer these samples of the requests,
        and give each to `keep` with the index of its request."""
        parts = {number: requests[number].part(numbers) for number, numbers in left.items()}
        engine = self._engine(list(parts.values()), samples)
        tickets = {engine.submit(part): number for number, part in parts.items()}
        try:
            for answer in engine.run():
                number = tickets[answer.ticket]
                keep(replace(answer, ticket=number, number=left[number][answer.number]))
        finally:
            for ticket in tickets:  # an interruption may leave some unfinished
                engine.cancel(ticket)

    def _engine(self, requests: Sequence[Request], samples: int) -> Engine:
        """An engine for the requests; the kept one if it has room for them."""
        window = self.window
        if window is None:
            asked = sum(len(request.seeds) for request in requests)
            single_image = asked == 1 and "image" in requests[0].decoders[0]
            window = WINDOW if single_image else 1
        if self.execution == "eager":
            shape = shape_for(self.model, requests, samples=samples, window=window)
            return Engine(self.model, self.vocab, shape, window=window)

        # Compiled steps and graphs are kept: they belong to the tensors of one engine.
        wanted = shape_for(self.model, requests, samples=samples, window=window, memory=sys.maxsize)
        kept = self._kept
        if kept is None or kept.window != window or not kept.shape.holds(wanted):
            kept = self._kept = None  # free its memory for the new one
            shape = shape_for(
                self.model, requests, samples=samples, window=window, multiple=ROUNDING
            )
            kept = self._kept = Engine(
                self.model, self.vocab, shape, window=window, execution=self.execution
            )
        return kept


def _unanswered(
    requests: Sequence[Request], found: Sequence[Mapping[int, object]]
) -> dict[int, list[int]]:
    """The samples of each request that are not found yet, by the request's index."""
    left = {}
    for number, request in enumerate(requests):
        samples = []
        for sample in range(len(request.seeds)):
            if sample not in found[number]:
                samples.append(sample)
        if samples:
            left[number] = samples
    return left


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
    """Answers to prompts: ids of the answer's modality, without the token that closes it.

    An image answer is exactly `length` codes. A text answer ends at one of `ends`, after `length`
    pieces, or where the model's positions end. Prompts of different lengths and modalities may be
    mixed; equal ones are computed once.

    Args:
        model: from `MODELS`, in evaluation mode.
        seeds: one for each prompt; its answer depends on its seed, not on its neighbours (up to
            rounding).
        batch_size: most samples that are generated at a time; guidance doubles the rows.
        on_answer: called with each finished sample.

    Raises:
        UserError: for a prompt that leaves no room for its answer.
    """
    # Equal prompts become the samples of one request.
    same: dict[tuple[Any, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        streams = []
        for ids_T in (prompt.ids_T, prompt.unconditional_T, prompt.partial_T):
            streams.append(None if ids_T is None else ids_T.tobytes())
        key = (*streams, prompt.modality, prompt.length, prompt.ends)
        same.setdefault(key, []).append(number)

    # Prompts of similar lengths go side by side, as they are computed together.
    groups = sorted(same.values(), key=lambda numbers: (len(prompts[numbers[0]].ids_T), numbers))
    requests = []
    for numbers in groups:
        requests.append(
            request_for(
                prompts[numbers[0]],
                decoder,
                vocab=vocab,
                seeds=[seeds[number] for number in numbers],
                seq_len=model.seq_len,
            )
        )
    found = answers(model, requests, vocab=vocab, samples=batch_size, on_answer=on_answer)

    # Back into the order of the prompts.
    result: list[np.ndarray] = [np.empty(0, np.int64)] * len(prompts)
    for numbers, tokens in zip(groups, found, strict=True):
        for number, answer in zip(numbers, tokens, strict=True):
            result[number] = np.array(prompts[number].content(answer), np.int64)
    return result


def longest_answer(prompt: Prompt, seq_len: int) -> int:
    """Most tokens of an answer: exactly those of an image; of a text as many as have positions."""
    if prompt.modality == "image":
        return prompt.length
    streams = (prompt.ids_T, prompt.unconditional_T, prompt.partial_T)
    longest = max(len(ids_T) for ids_T in streams if ids_T is not None)
    room = max(seq_len - longest, min(1, prompt.length))
    return min(prompt.length, room)


def is_truncated(prompt: Prompt, answer_T: Sequence[int] | np.ndarray, seq_len: int) -> bool:
    """Whether a text reached its largest length, or the model's last position, before it ended.

    Args:
        answer_T: without the token that ends it. That token counts towards the length too, so an
            answer which ended is shorter than the longest one.
    """
    return prompt.modality == "text" and len(answer_T) >= longest_answer(prompt, seq_len)


def request_for(
    prompt: Prompt, decoder: Decoder, *, vocab: Vocab, seeds: Sequence[int], seq_len: int
) -> Request:
    """A request for samples of a prompt; a text answer ends at the model's last position at the
    latest."""
    of_prompt = (prompt.ids_T, prompt.unconditional_T, prompt.partial_T)
    streams = tuple(ids_T for ids_T in of_prompt if ids_T is not None)
    length = longest_answer(prompt, seq_len)
    if prompt.modality == "image":
        new: grammar.NewGrammar = partial(grammar.image, vocab, length, prompt.closed)
    else:
        new = partial(grammar.text, vocab, length, *prompt.ends)
    decoders = [{prompt.modality: decoder.of(number)} for number in range(len(seeds))]
    return Request(streams, new, length, decoders, seeds)
