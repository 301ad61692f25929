"""Combine the logits of several streams: classifier-free guidance by one or two conditions,
CD-K."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def classifier_free(conditional_BV: Tensor, unconditional_BV: Tensor, weight: float) -> Tensor:
    """uncond + weight * (cond - uncond).

    Weight 0 is unconditional, 1 conditional; more pushes away from the unconditional logits.
    """
    return unconditional_BV + weight * (conditional_BV - unconditional_BV)


def two_conditions(
    both_BV: Tensor, first_BV: Tensor, neither_BV: Tensor, *, first: float, both: float
) -> Tensor:
    """neither + first * (first - neither) + both * (both - first).

    InstructPix2Pix's form (arXiv 2211.09800, eq. 3).

    Args:
        both_BV: logits under both conditions, the image and the text.
        first_BV: logits under the first condition only, the image.
        neither_BV: logits under no condition.
    """
    return neither_BV + first * (first_BV - neither_BV) + both * (both_BV - first_BV)


def implausible(conditional_BV: Tensor, *, alpha: float, k: int = 1) -> Tensor:
    """Tokens (B, V) with a probability below alpha times the k-th largest, as a mask."""
    log_p_BV = conditional_BV.log_softmax(-1)
    kth_B1 = log_p_BV.topk(min(k, log_p_BV.shape[-1]), dim=-1).values[:, -1:]
    log_alpha = math.log(alpha) if alpha > 0 else -math.inf
    return log_p_BV < kth_B1 + log_alpha


def contrastive_k(
    conditional_BV: Tensor, unconditional_BV: Tensor, *, alpha: float, k: int
) -> Tensor:
    """CD-K (paper eq. 3): log p_cond - log p_uncond where p_cond >= alpha * (k-th largest p_cond),
    -inf elsewhere.

    With k = 1 this is the contrastive decoding of Li et al. 2023. With alpha = 0.3 and k = 2, the
    second largest probability below is 0.3, and tokens under 0.09 are removed:

        p_cond      0.5   0.3   0.12  0.08
        p_uncond    0.5   0.1   0.2   0.2
        score       0.00  1.10  -0.51 -inf
    """
    score_BV = conditional_BV.log_softmax(-1) - unconditional_BV.log_softmax(-1)
    return score_BV.masked_fill(implausible(conditional_BV, alpha=alpha, k=k), -torch.inf)
