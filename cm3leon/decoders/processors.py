"""Functions of one stream of logits, and the draw of the next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def keep_top_k(logits_BV: Tensor, top_k: int) -> Tensor:
    """Keeps the `top_k` most likely tokens and those as likely as the last of them, others become -inf; 0 keeps all."""
    if not 0 < top_k < logits_BV.shape[-1]:
        return logits_BV
    kth_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)


def penalize(logits_BV: Tensor, past: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits of the columns that each row has had, divided by the penalty where positive and multiplied where not.

    Source: CTRL, arXiv 1909.05858, section 4.1, as transformers has it.
    """
    if penalty == 1:
        return logits_BV
    result_BV = logits_BV.clone()
    for row, columns in enumerate(past):
        had_N = torch.tensor(sorted(set(columns)), dtype=torch.int64, device=logits_BV.device)
        old_N = logits_BV[row, had_N]
        result_BV[row, had_N] = torch.where(old_N > 0, old_N / penalty, old_N * penalty)
    return result_BV


def forbid_repeats(logits_BV: Tensor, past: Sequence[Sequence[int]], size: int) -> Tensor:
    """-inf for each column that would end a run of `size` columns which the row has had before. 0 forbids none."""
    if not size:
        return logits_BV
    result_BV = logits_BV.clone()
    for row, columns in enumerate(past):
        last = list(columns[len(columns) - size + 1 :])
        for start in range(len(columns) - size + 1):
            if list(columns[start : start + size - 1]) == last:
                result_BV[row, columns[start + size - 1]] = -torch.inf
    return result_BV


def keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """Nucleus: keeps the fewest most likely tokens whose probabilities sum to at least `top_p`, others become -inf."""
    if top_p >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probability_BV = sorted_BV.softmax(-1)
    before_BV = probability_BV.cumsum(-1) - probability_BV  # the sum of the tokens before each
    over_BV = before_BV >= top_p
    over_BV[..., 0] = False  # the likeliest stays, for top_p = 0 too
    removed_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(-1, order_BV, over_BV)
    return logits_BV.masked_fill(removed_BV, -torch.inf)


def uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """Uniform numbers (B, steps), a row from each seed alone: a row's draws do not depend on its neighbours."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(steps) for seed in seeds]))


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token (B,) from softmax(logits), by inverting the cumulative distribution at `uniform_B`."""
    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    threshold_B1 = (uniform_B.to(cumulative_BV) * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]
