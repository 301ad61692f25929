"""Sums and rows over the processes that train one module together.

A module in training on several ranks sees a part of each batch on each of them, in the order of the
ranks. Whatever it computes from the whole batch (how often codes are used, contrastive pairs) goes
through these functions. On two ranks with two rows each:

                       rank 0        rank 1
    rows               a b           c d
    all_rows           a b c d       a b c d
    summed             a + c, b + d  a + c, b + d
    rows_of_all 3, 0   d a           d a

All ranks have to make the same calls. A single process gets its own rows back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_count() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(value: Tensor) -> Tensor:
    """Sum a tensor over the ranks, without gradient."""
    if rank_count() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def averaged(value: Tensor) -> Tensor:
    """Average a tensor over the ranks, without gradient."""
    return summed(value) / rank_count()


def all_rows(rows_BD: Tensor) -> Tensor:
    """Gather the rows of all ranks, in their order, with gradients; all have the same number."""
    if rank_count() == 1:
        return rows_BD
    gathered: Tensor = _AllRows.apply(rows_BD)
    return gathered


def rows_of_all(rows_BD: Tensor, chosen_M: Tensor) -> Tensor:
    """Pick rows (M, D) by their index among those of all ranks, without gradient.

    All ranks have the same number of rows.
    """
    if rank_count() == 1:
        return rows_BD.detach()[chosen_M]

    # Each rank fills in the rows that it has, and the sum puts them together.
    own_M = chosen_M // len(rows_BD) == dist.get_rank()
    found_MD = rows_BD.new_zeros(len(chosen_M), *rows_BD.shape[1:])
    found_MD[own_M] = rows_BD.detach()[chosen_M[own_M] % len(rows_BD)]
    return summed(found_MD)


class _AllRows(torch.autograd.Function):
    """Gather rows forward; backward, sum the gradients of a row over the losses of all ranks."""

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        ctx.rows = len(rows_BD)
        gathered = [torch.empty_like(rows_BD) for _ in range(rank_count())]
        dist.all_gather(gathered, rows_BD.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = summed(gradients[0].contiguous())
        return total[dist.get_rank() * ctx.rows :][: ctx.rows]
