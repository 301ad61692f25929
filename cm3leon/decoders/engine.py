"""Batched generation with a key-value cache; guidance's two streams are rows of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cm3leon.decoders.decoders import Decoder
from cm3leon.decoders.processors import draw, uniforms
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Prompt, UserError


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Prompt],
    decoder: Decoder,
    *,
    vocab: Vocab,
    seeds: Sequence[int],
    batch_size: int = 256,
    on_batch: Callable[[int], object] | None = None,
) -> list[np.ndarray]:
    """Answers to prompts: ids of the answer's modality, without what closes it.

    The grammar is in the prompts: an image answer is exactly `length` codes, a text answer is text until `end` or
    `length` pieces, or as many as the model has positions for. Prompts of different lengths and modalities may be
    mixed.

    Args:
        model: from `MODELS`, in evaluation mode.
        seeds: one for each prompt; its answer depends on it alone, not on its neighbours (up to rounding).
        batch_size: prompts at a time; guidance doubles the rows.
        on_batch: called after each batch with the number of its prompts.

    Raises:
        UserError: for a prompt that leaves no room for its answer.
    """
    for prompt in prompts:
        needed = prompt.length if prompt.modality == "image" else min(prompt.length, 1)
        longest = max(len(ids_T) for ids_T in (prompt.ids_T, prompt.unconditional_T) if ids_T is not None)
        if longest + needed > model.seq_len:
            raise UserError(
                f"model.seq_len: a prompt of {longest} tokens and an answer of {needed} do not fit the "
                f"model's {model.seq_len} positions; use fewer retrieved documents or a larger model.seq_len"
            )
    answers: list[np.ndarray] = [np.empty(0, np.int64)] * len(prompts)
    for rows in _batches(prompts, decoder, model.seq_len, batch_size):
        batch = [prompts[row] for row in rows]
        for row, answer in zip(rows, _generate(model, batch, decoder, vocab, [seeds[r] for r in rows]), strict=True):
            answers[row] = answer
        if on_batch:
            on_batch(len(rows))
    return answers


def _batches(prompts: Sequence[Prompt], decoder: Decoder, seq_len: int, batch_size: int) -> Iterator[list[int]]:
    """Rows that can run together: of one modality, end, guidance and length of answer; like prompts side by side.

    One length, because a row that has its answer goes on until all have theirs, and must not run out of positions.
    """

    def kind(row: int) -> tuple[str, int, bool, int]:
        prompt = prompts[row]
        guided = decoder.guided and prompt.unconditional_T is not None
        return prompt.modality, prompt.end, guided, _length(prompt, seq_len)

    kinds: dict[tuple[str, int, bool, int], list[int]] = {}
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids_T)):
        kinds.setdefault(kind(row), []).append(row)
    for rows in kinds.values():
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def _length(prompt: Prompt, seq_len: int) -> int:
    """Most tokens of the answer: what is asked for, as far as the model has positions."""
    return min(prompt.length, seq_len - len(prompt.ids_T))


def _generate(
    model: Any, prompts: list[Prompt], decoder: Decoder, vocab: Vocab, seeds: list[int]
) -> Iterator[np.ndarray]:
    device = next(model.parameters()).device
    first = prompts[0]
    guided = decoder.guided and first.unconditional_T is not None
    streams = [prompt.ids_T for prompt in prompts]
    if guided:
        streams += [prompt.unconditional_T for prompt in prompts if prompt.unconditional_T is not None]
    ids_RT, padding_R = _left_padded(streams, vocab.pad, device)

    low, high = vocab.id_range(first.modality)
    allowed_V = torch.arange(low, high, device=device)
    if first.modality == "text":
        allowed_V = torch.cat([torch.tensor([first.end], device=device), allowed_V])
    steps = _length(first, model.seq_len)  # the same for all
    uniform_BT = uniforms(seeds, steps).to(device)
    cache = model.new_cache(ids_RT.shape[1] + steps, padding_R)
    answer_BT = torch.full((len(prompts), steps), first.end, device=device)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(steps):
        logits_RV = model(ids_RT, cache=cache, readout=_last_logits)[:, allowed_V].float()
        streams_BV = logits_RV.chunk(2) if guided else (logits_RV, None)
        token_B = allowed_V[draw(decoder.logits(*streams_BV), uniform_BT[:, step])]
        answer_BT[:, step] = torch.where(ended_B, first.end, token_B)
        ended_B = ended_B | (token_B == first.end)
        if ended_B.all():
            break
        ids_RT = token_B.repeat(2 if guided else 1)[:, None]
    for answer_T in answer_BT.cpu().numpy():
        yield answer_T[: np.argmax(answer_T == first.end)] if (answer_T == first.end).any() else answer_T


def _last_logits(hidden_BTD: Tensor, head: nn.Linear) -> Tensor:
    return head(hidden_BTD[:, -1])


def _left_padded(streams: Sequence[np.ndarray], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts aligned at their last token: ids (R, T), and the number of padding columns of each row (R,)."""
    longest = max(len(ids_T) for ids_T in streams)
    ids_RT = np.full((len(streams), longest), pad, dtype=np.int64)
    for row, ids_T in enumerate(streams):
        ids_RT[row, longest - len(ids_T) :] = ids_T
    padding_R = np.array([longest - len(ids_T) for ids_T in streams])
    return torch.from_numpy(ids_RT).to(device), torch.from_numpy(padding_R).to(device)
