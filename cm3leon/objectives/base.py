"""What an objective is: a corruption of samples, and a loss on logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.tokenizers.document import LaidOut, SegmentSpan
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Batch


@dataclass(frozen=True, eq=False)
class Corrupted:
    """A sample as it is trained on: `ids_T`, and `weight_T`, the weight of each token as a target of the loss."""

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

    def take(self, sample: LaidOut, start: int, room: int, rng: np.random.Generator) -> tuple[Corrupted, int]:
        """The piece of a sample from `start` on that has `room` for it, as it is trained on, and where the next starts.

        Pieces of a sample are trained on in different blocks. All of `room` is used, unless the sample ends in it; an
        objective that makes samples longer has to cut the piece shorter, which this one does not.
        """
        end = min(start + room, len(sample.ids_T))
        return self.corrupt(cut(sample, start, end), rng, room), end

    def loss(self, logits_BTV: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Weighted mean negative log-likelihood in nats, with the figures to record.

        `loss_text` and `loss_image` are plain means over the targets of each modality that carry a loss, NaN where a
        batch has none.
        """
        nll_BT = F.cross_entropy(logits_BTV.float().flatten(0, 1), batch.target_BT.flatten(), reduction="none")
        nll_BT = nll_BT.view_as(batch.weight_BT)
        loss = (nll_BT * batch.weight_BT).sum() / batch.weight_BT.sum().clamp(min=1e-8)
        detached_BT, counted_BT = nll_BT.detach(), batch.weight_BT > 0
        vocab = self.vocab
        image_BT = counted_BT & (batch.target_BT >= vocab.image_start) & (batch.target_BT < vocab.sentinel_start)
        text_BT = counted_BT & (batch.target_BT < vocab.text_size)
        return loss, {
            "loss_text": _mean(detached_BT, text_BT),
            "loss_image": _mean(detached_BT, image_BT),
            "tokens": float((batch.sample_BT >= 0).sum()),
        }


def cut(sample: LaidOut, start: int, end: int) -> LaidOut:
    """Positions [start, end) of a sample, with those parts of its segments that lie there."""
    segments = tuple(
        SegmentSpan(max(s.start, start) - start, min(s.end, end) - start, s.modality, s.is_query)
        for s in sample.segments
        if s.start < end and start < s.end
    )
    return LaidOut(sample.ids_T[start:end], segments)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen values, NaN of none."""
    return torch.where(chosen, values, 0).sum() / chosen.sum()
