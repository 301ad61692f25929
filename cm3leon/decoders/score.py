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
"""Most tokens of a batch, padding included."""


@torch.inference_mode()
def log_likelihoods(
    model: Model, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]
) -> list[float]:
    """Sum over an answer's tokens of log p(token | prompt, tokens before), over all ids, in nats.

    Raises:
        UserError: for a prompt and an answer that the model has no positions for.
        NotFinite: for a log-likelihood that is NaN or infinite.
    """
    sequences = [np.concatenate(pair) for pair in zip(prompts, answers, strict=True)]
    longest = max(map(len, sequences), default=0)
    if longest - 1 > model.seq_len:
        raise UserError(
            f"a prompt and its answer take {longest} tokens, the model has {model.seq_len} "
            "positions (model.seq_len); shorten them, or use a model with a larger model.seq_len"
        )

    result = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    while order:
        # The longest that are left, as many as fit a batch when padded to the first one.
        length = len(sequences[order[-1]])
        taken = [order.pop() for _ in range(min(len(order), max(1, TOKENS // length)))]
        whole, answers_of = [], []
        for number in taken:
            whole.append(sequences[number])
            answers_of.append(answers[number])
        nll_N = _answer_losses(model, whole, answers_of)

        # The losses of all answers stand one after the other.
        counts = list(map(len, answers_of))
        for number, part_N in zip(taken, nll_N.split(counts), strict=True):
            result[number] = -float(part_N.sum())
            if not math.isfinite(result[number]):
                raise NotFinite(
                    f"the log-likelihood of answer {number} is {result[number]}: the model's "
                    "weights are damaged or have diverged"
                )
    return result


def _answer_losses(
    model: Model, sequences: Sequence[np.ndarray], answers: Sequence[np.ndarray]
) -> Tensor:
    """-log p of the answers' tokens, which end the sequences: float64, one answer after another."""
    device = next(model.parameters()).device
    ids_BT = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    rows, columns = [], []
    for row, (sequence, answer) in enumerate(zip(sequences, answers, strict=True)):
        ids_BT[row, : len(sequence)] = torch.from_numpy(sequence)
        rows.append(torch.full((len(answer),), row))
        columns.append(torch.arange(len(sequence) - len(answer), len(sequence)))
    rows_N, columns_N = torch.cat(rows), torch.cat(columns)
    target_N = ids_BT[rows_N, columns_N].to(device)

    def read(hidden_BTD: Tensor, head: nn.Linear) -> Tensor:
        # The hidden state at a position predicts the next token. Logits are made in chunks, as
        # those of all tokens of a large vocabulary would not fit the memory.
        hidden_ND = hidden_BTD[rows_N.to(device), columns_N.to(device) - 1]
        losses = []
        for hidden, target in zip(hidden_ND.split(1024), target_N.split(1024), strict=True):
            losses.append(F.cross_entropy(head(hidden).float(), target, reduction="none"))
        return torch.cat(losses) if losses else torch.zeros(0)

    return model(ids_BT[:, :-1].to(device), readout=read).double().cpu()
