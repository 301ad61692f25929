"""Causal self-attention over packed samples, by torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_mask(sample_BT: Tensor) -> Tensor:
    """Which positions may attend to which: earlier ones, and itself, of the same sample.

    Two samples of two tokens in a block of four give, a row for each query:

        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1

    Args:
        sample_BT: number of the sample at each position (any integers; padding has its own, -1).

    Returns:
        Boolean mask (B, 1, T, T), True = may attend.
    """
    T = sample_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=sample_BT.device).tril()
    return ((sample_BT[:, :, None] == sample_BT[:, None, :]) & causal_TT)[:, None]


def attend(q_BATE: Tensor, k_BASE: Tensor, v_BASE: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, scaled by 1/sqrt(E); `mask` None means plain causal. Returns (B, A, T, E)."""
    return F.scaled_dot_product_attention(q_BATE, k_BASE, v_BASE, attn_mask=mask, is_causal=mask is None)
