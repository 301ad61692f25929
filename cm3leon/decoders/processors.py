"""Functions of one stream's logits, and the draw of the next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cm3leon.seeds import GOLDEN, MULTIPLIERS


def keep_top_k(logits_BV: Tensor, top_k: int) -> Tensor:
    """Set all but the `top_k` most likely tokens to -inf; 0 keeps all.

    Tokens that tie with the last of them stay too.
    """
    if not 0 < top_k < logits_BV.shape[-1]:
        return logits_BV
    kth_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)


def penalize(logits_BV: Tensor, past: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Penalise tokens that each row already has: positive logits are divided by the penalty,
    negative ones multiplied.

    Source: CTRL, arXiv 1909.05858, section 4.1, as in transformers.

    Args:
        past: for each row, the columns of its tokens so far.
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
    """Set to -inf each column that would complete a run of `size` columns that the row already has.

    0 forbids nothing. With `size` 3 and the row 5 8 2 9 5 8, column 2 is forbidden.
    """
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
    """Nucleus sampling: set to -inf all but the fewest most likely tokens whose probabilities sum
    to at least `top_p`."""
    if top_p >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probability_BV = sorted_BV.softmax(-1)
    before_BV = probability_BV.cumsum(-1) - probability_BV  # the sum of the tokens before each
    over_BV = before_BV >= top_p
    over_BV[..., 0] = False  # the likeliest stays, for top_p = 0 too
    removed_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(-1, order_BV, over_BV)
    return logits_BV.masked_fill(removed_BV, -torch.inf)


def stream_key(seed: int) -> int:
    """Start of a seed's stream of random numbers, far from those of other seeds."""
    return _signed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))


def random_bits(key: Tensor, index: Tensor) -> Tensor:
    """The numbers at `index` of the SplitMix64 streams that start at `key`: all 64 bits, as int64.

    Shapes broadcast. Any number can be computed without those before it and on any device, so a
    draw depends on its index alone. This is `seeds.split_mix` for tensors, which have no unsigned
    integers to compute with: int64 wraps as uint64 does.
    """
    z = key + (index + 1) * _signed(GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(MULTIPLIERS[0])
    z = (z ^ _shifted(z, 27)) * _signed(MULTIPLIERS[1])
    return z ^ _shifted(z, 31)


def gumbel_noise(key: Tensor, index: Tensor) -> Tensor:
    """Standard Gumbel noise at `index` of streams of random numbers: float32, shapes broadcast.

    The largest of logits + noise is a draw from softmax(logits).
    """
    # Half a step from 0, and rounded to float32 only here: small numbers, which make large noise,
    # keep all their bits.
    uniform = (_shifted(random_bits(key, index), 32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw a token from softmax(logits) over the last dimension, by Gumbel noise of the same shape.

    The noise belongs to the tokens: under it, distributions that are nearly the same nearly always
    give the same token. That is why drafts are often right.
    """
    return (logits + noise).argmax(-1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Unsigned shift to the right."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
