"""Functions of one stream of logits, and the draw of the next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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
