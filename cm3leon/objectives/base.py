"""Base class of the objectives: a corruption of samples, and a loss on hidden states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cm3leon.objectives.loss import linear_cross_entropy
from cm3leon.tokenizers.document import LaidOut
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Batch, OnCpu


@dataclass(frozen=True, eq=False)
class Corrupted:
    """A sample as it is trained on: `ids_T`, and in `weight_T` each token's weight as a target."""

    ids_T: np.ndarray
    weight_T: np.ndarray


class Objective:
    """Base of the objectives: mean next-token negative log-likelihood of the corrupted sample."""

    def __init__(self, config: Any, *, vocab: Vocab) -> None:
        self.config = config
        self.vocab = vocab

    def corrupt(self, sample: LaidOut, rng: np.random.Generator, max_tokens: int) -> Corrupted:
        """Corrupt a sample of at most `max_tokens` tokens, into at most `max_tokens` tokens."""
        raise NotImplementedError

    def take(
        self, sample: LaidOut, start: int, room: int, rng: np.random.Generator
    ) -> tuple[Corrupted, int]:
        """Corrupt the piece of a sample that starts at `start` and fits `room`; also return where
        the next piece starts.

        Pieces of a sample are trained on in different blocks. All of `room` is used, unless the
        sample ends in it. An objective that makes samples longer must cut the piece shorter; this
        one does not.
        """
        end = min(start + room, len(sample.ids_T))
        return self.corrupt(cut(sample, start, end), rng, room), end

    def loss_of(
        self, model: nn.Module, batch: Batch, *, z_loss: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor | float | tuple[Tensor, Tensor]]]:
        """`loss` of a model on a batch, which training minimises and validation measures.

        It is computed inside the model's forward pass:
        a sharded model has its head's weight only then.
        """
        return model(
            batch.ids_BT,
            position_BT=batch.position_BT,
            sample_BT=OnCpu(batch.sample_BT),
            readout=lambda hidden_BTD, head: self.loss(hidden_BTD, head, batch, z_loss=z_loss),
        )

    def loss(
        self, hidden_BTD: Tensor, head: nn.Linear, batch: Batch, *, z_loss: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor | float | tuple[Tensor, Tensor]]]:
        """Weighted mean negative log-likelihood of the next tokens in nats, with figures to record.

        Args:
            head: the output layer, without a bias; `head(hidden_BTD)` are the logits (B, T, V).
            batch: on the model's device, except `sample_BT`, which is on the CPU, as is what is
                counted of it. To use it with the others, write
                `batch.sample_BT.to(hidden_BTD.device, non_blocking=True)`.

        Returns:
            the loss, and figures. `loss_text` and `loss_image` are pairs (sum, count), float32
            scalars over the targets of each modality that have a weight; such pairs are averaged
            over all micro-batches, ranks and steps. `tokens` counts the positions that are not
            padding. An objective of another kind overrides this method.
        """
        target_N, weight_N = batch.target_BT.flatten(), batch.weight_BT.flatten()
        loss, nll_N = linear_cross_entropy(
            hidden_BTD.flatten(0, 1), head.weight, target_N, weight_N, z_loss=z_loss
        )

        # Figures of each modality, of the targets that count.
        counted_N = weight_N > 0
        image_N = counted_N & self.vocab.is_image(target_N)
        text_N = counted_N & self.vocab.is_text(target_N)
        return loss, {
            "loss_text": (torch.where(text_N, nll_N, 0).sum(), text_N.sum(dtype=torch.float32)),
            "loss_image": (torch.where(image_N, nll_N, 0).sum(), image_N.sum(dtype=torch.float32)),
            "tokens": (batch.sample_BT >= 0).sum(dtype=torch.float32),
        }


def cut(sample: LaidOut, start: int, end: int) -> LaidOut:
    """Positions [start, end) of a sample, with the parts of its segments that lie there."""
    segments = []
    for segment in sample.segments:
        if segment.start < end and start < segment.end:
            first, last = max(segment.start, start) - start, min(segment.end, end) - start
            segments.append(replace(segment, start=first, end=last))
    return LaidOut(sample.ids_T[start:end], tuple(segments))
