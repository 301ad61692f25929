"""Streams of logits into one: classifier-free guidance by one condition or two,
contrastive decoding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def classifier_free(conditional_BV: Tensor, unconditional_BV: Tensor, weight: float) -> Tensor:
    """uncond + weight * (cond - uncond): 0 is unconditional, 1 conditional,
    more pushes away from unconditional."""
    return unconditional_BV + weight * (conditional_BV - unconditional_BV)


def two_conditions(
    both_BV: Tensor, first_BV: Tensor, neither_BV: Tensor, *, first: float, both: float
) -> Tensor:
    """neither + first * (first - neither) + both * (both - first),
    InstructPix2Pix's form (arXiv 2211.09800, eq. 3).

    Args:
        first_BV: logits under the first condition alone (the image);
            `both_BV` has the second one (the text) too.
    """
    return neither_BV + first * (first_BV - neither_BV) + both * (both_BV - first_BV)


def contrastive_k(
    conditional_BV: Tensor, unconditional_BV: Tensor, *, alpha: float, k: int
) -> Tensor:
    """CD-K (paper eq. 3): log p_cond - log p_uncond where p_cond >= alpha * (k-th largest p_cond),
    -inf elsewhere.

    k = 1 is the contrastive decoding of Li et al. 2023.
    """
    log_p_BV = conditional_BV.log_softmax(-1)
    kth_B1 = log_p_BV.topk(min(k, log_p_BV.shape[-1]), dim=-1).values[:, -1:]
    score_BV = log_p_BV - unconditional_BV.log_softmax(-1)
    log_alpha = math.log(alpha) if alpha > 0 else -math.inf
    return score_BV.masked_fill(log_p_BV < kth_B1 + log_alpha, -torch.inf)
