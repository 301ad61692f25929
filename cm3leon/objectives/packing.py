"""Samples into blocks, and blocks into an endless, exactly resumable stream of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cm3leon.data.shuffle import shuffled
from cm3leon.objectives.base import Corrupted, Objective
from cm3leon.tokenizers.document import lay_out, sample_length
from cm3leon.types import Batch, Block, Sample, UserError


def fit(sample: Sample, seq_len: int) -> Sample:
    """Drops retrieved documents from the left until the sample fits. Raises UserError if the query alone does not."""
    while sample_length(sample) > seq_len:
        if not sample.retrieved:
            raise UserError(
                f"model.seq_len: document {sample.query.id} takes {sample_length(sample)} tokens, "
                f"a block holds {seq_len}; raise model.seq_len"
            )
        sample = replace(sample, retrieved=sample.retrieved[1:])
    return sample


def pack(samples: Sequence[Corrupted], seq_len: int, pad: int) -> Block:
    """One block of whole samples, positions restarting in each; padding at the end. They must fit."""
    ids_T = np.full(seq_len, pad, dtype=np.int64)
    target_T = np.full(seq_len, pad, dtype=np.int64)
    weight_T = np.zeros(seq_len, dtype=np.float32)
    sample_T = np.full(seq_len, -1, dtype=np.int64)
    position_T = np.zeros(seq_len, dtype=np.int64)
    start = 0
    for number, sample in enumerate(samples):
        end = start + len(sample.ids_T)
        ids_T[start:end] = sample.ids_T
        target_T[start : end - 1] = sample.ids_T[1:]
        weight_T[start : end - 1] = sample.weight_T[1:]
        sample_T[start:end] = number
        position_T[start:end] = np.arange(end - start)
        start = end
    return Block(ids_T, target_T, weight_T, sample_T, position_T)


def collate(blocks: Sequence[Block], device: torch.device) -> Batch:
    """Blocks as one batch of tensors."""

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(block, name) for block in blocks])).to(device)

    return Batch(stack("ids_T"), stack("target_T"), stack("weight_T"), stack("sample_T"), stack("position_T"))


class BlockStream:
    """Endless batches of packed samples.

    Samples are taken in shuffled order and put whole into the first block of the batch with room; the first that
    fits none opens the next batch. Everything about a sample is a function of (seed, its place in the stream), so the
    place of the next sample is the whole state.

    Args:
        documents: number of training documents.
        draw: (document, generator) -> sample, with its retrieved documents.
    """

    def __init__(
        self,
        documents: int,
        draw: Callable[[int, np.random.Generator], Sample],
        objective: Objective,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._documents = documents
        self._draw = draw
        self._objective = objective
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._device = device
        self._position = 0

    def next(self) -> Batch:
        """The next batch."""
        blocks: list[list[Corrupted]] = [[] for _ in range(self._batch_size)]
        room = [self._seq_len] * self._batch_size
        while True:
            sample = self._sample(self._position)
            place = next((b for b, left in enumerate(room) if left >= len(sample.ids_T)), None)
            if place is None:
                break
            blocks[place].append(sample)
            room[place] -= len(sample.ids_T)
            self._position += 1
        pad = self._objective.vocab.pad
        return collate([pack(samples, self._seq_len, pad) for samples in blocks], self._device)

    def _sample(self, position: int) -> Corrupted:
        rng = np.random.default_rng([self._seed, 1, position])
        sample = fit(self._draw(shuffled(self._seed, position, self._documents), rng), self._seq_len)
        return self._objective.corrupt(lay_out(sample, self._objective.vocab), rng, self._seq_len)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._position = int(state["position"])
