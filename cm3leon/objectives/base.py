"""What an objective is: a corruption of samples, and a loss on hidden states."""

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
    """A sample as it is trained on: `ids_T`, and `weight_T`,
    the weight of each token as a target of the loss."""

    ids_T: np.ndarray
    weight_T: np.ndarray


class Objective:
    """Base of the objectives: mean next-token negative log-likelihood of the corrupted sample."""

    def __init__(self, config: Any, *, vocab: Vocab) -> None:
        self.config = config
        self.vocab = vocab

    def corrupt(self, sample: LaidOut, rng: np.random.Generator, max_tokens: int) -> Corrupted:
        """The sample as it is trained on, at most `max_tokens` long (the sample itself is)."""
        raise NotImplementedError

    def take(
        self, sample: LaidOut, start: int, room: int, rng: np.random.Generator
    ) -> tuple[Corrupted, int]:
        """The piece of a sample from `start` on that has `room` for it, as it is trained on,
        and where the next starts.

        Pieces of a sample are trained on in different blocks. All of `room` is used, unless the
        sample ends in it; an objective that makes samples longer has to cut the piece shorter,
        which this one does not.
        """
        end = min(start + room, len(sample.ids_T))
        return self.corrupt(cut(sample, start, end), rng, room), end

    def loss_of(
        self, model: nn.Module, batch: Batch, *, z_loss: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor | float | tuple[Tensor, Tensor]]]:
        """`loss` of a model on a batch: what training and validation minimise and measure.

        It is computed inside the model's forward pass,
        the only time that a sharded model has its head's weight.
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
        """Weighted mean negative log-likelihood in nats of the tokens after each position,
        with figures to record.

        `head` is the output layer, without a bias. `loss_text` and `loss_image` are pairs (sum,
        count) over the targets of each modality that carry a loss, float32 scalars: such pairs are
        averaged over everything that is counted, micro-batches, ranks and steps. `tokens` counts
        the positions that are not padding. An objective of another kind overrides this;
        `head(hidden_BTD)` are the logits (B, T, V).

        The hidden states, the head and the batch's tensors are on the model's device;
        `batch.sample_BT` alone is on the CPU, and so is what is counted of it. Beside others it is
        used as `batch.sample_BT.to(hidden_BTD.device, non_blocking=True)`.
        """
        target_N, weight_N = batch.target_BT.flatten(), batch.weight_BT.flatten()
        loss, nll_N = linear_cross_entropy(
            hidden_BTD.flatten(0, 1), head.weight, target_N, weight_N, z_loss=z_loss
        )
        counted_N = weight_N > 0
        image_N = counted_N & self.vocab.is_image(target_N)
        text_N = counted_N & self.vocab.is_text(target_N)
        return loss, {
            "loss_text": (torch.where(text_N, nll_N, 0).sum(), text_N.sum(dtype=torch.float32)),
            "loss_image": (torch.where(image_N, nll_N, 0).sum(), image_N.sum(dtype=torch.float32)),
            "tokens": (batch.sample_BT >= 0).sum(dtype=torch.float32),
        }


def cut(sample: LaidOut, start: int, end: int) -> LaidOut:
    """Positions [start, end) of a sample, with those parts of its segments that lie there."""
    segments = tuple(
        replace(s, start=max(s.start, start) - start, end=min(s.end, end) - start)
        for s in sample.segments
        if s.start < end and start < s.end
    )
    return LaidOut(sample.ids_T[start:end], segments)
