"""Log-likelihoods of given answers, for multiple choice and re-ranking."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.models.base import Model
from cm3leon.types import NotFinite, UserError

TOKENS = 2**13
"""Most tokens of a batch."""


@torch.inference_mode()
def log_likelihoods(
    model: Model, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]
) -> list[float]:
    """Sum over an answer's tokens of log p(token | prompt, tokens before), in nats,
    over the whole vocabulary.

    Raises:
        UserError: for a prompt and an answer that the model has no positions for.
        NotFinite: for a log-likelihood that is no finite number.
    """
    device = next(model.parameters()).device
    sequences = [np.concatenate(pair) for pair in zip(prompts, answers, strict=True)]
    longest = max(map(len, sequences), default=0)
    if longest - 1 > model.seq_len:
        raise UserError(
            f"a prompt and its answer take {longest} tokens, the model has {model.seq_len} "
            "positions"
        )
    result = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    while order:
        length = len(sequences[order[-1]])
        taken = [order.pop() for _ in range(min(len(order), max(1, TOKENS // length)))]
        ids_BT = torch.zeros(len(taken), length, dtype=torch.int64)
        for row, number in enumerate(taken):
            ids_BT[row, : len(sequences[number])] = torch.from_numpy(sequences[number])
        counts = [len(answers[number]) for number in taken]
        rows_N = torch.repeat_interleave(torch.arange(len(taken)), torch.tensor(counts))
        columns_N = torch.cat(
            [len(prompts[number]) + torch.arange(len(answers[number])) for number in taken]
        )
        target_N = ids_BT[rows_N, columns_N].to(device)

        def read(
            hidden_BTD: Tensor,
            head: nn.Linear,
            rows_N: Tensor = rows_N,
            columns_N: Tensor = columns_N,
            target_N: Tensor = target_N,
        ) -> Tensor:
            hidden_ND = hidden_BTD[rows_N.to(device), columns_N.to(device) - 1]
            parts = zip(hidden_ND.split(1024), target_N.split(1024), strict=True)
            nll = [
                F.cross_entropy(head(hidden).float(), target, reduction="none")
                for hidden, target in parts
            ]
            return torch.cat(nll) if nll else torch.zeros(0)

        nll_N = model(ids_BT[:, :-1].to(device), readout=read).double().cpu()
        for number, part_N in zip(taken, nll_N.split(counts), strict=True):
            result[number] = -float(part_N.sum())
            if not math.isfinite(result[number]):
                raise NotFinite(
                    f"the log-likelihood of answer {number} is {result[number]}: the model's "
                    "weights are damaged or have diverged"
                )
    return result
