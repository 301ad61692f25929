"""Sums and rows over the processes that train one module together; alone, what is given comes back.

A module that is trained on several ranks has a share of each batch on each of them, in the order of the ranks. What it
computes of the whole batch (the use of its codes, pairs that are told apart) goes through here. All ranks have to call
a function alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_count() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, without gradient."""
    if rank_count() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def averaged(value: Tensor) -> Tensor:
    """The mean of a tensor over the ranks, without gradient."""
    return summed(value) / rank_count()


def all_rows(rows_BD: Tensor) -> Tensor:
    """The rows of all ranks, in their order, with gradients; each rank has to have as many."""
    if rank_count() == 1:
        return rows_BD
    gathered: Tensor = _AllRows.apply(rows_BD)
    return gathered


def rows_of_all(rows_BD: Tensor, chosen_M: Tensor) -> Tensor:
    """Rows (M, D) by their numbers among those of all ranks, without gradient; each rank has to have as many."""
    if rank_count() == 1:
        return rows_BD.detach()[chosen_M]
    own_M = chosen_M // len(rows_BD) == dist.get_rank()
    found_MD = rows_BD.new_zeros(len(chosen_M), *rows_BD.shape[1:])
    found_MD[own_M] = rows_BD.detach()[chosen_M[own_M] % len(rows_BD)]
    return summed(found_MD)


class _AllRows(torch.autograd.Function):
    """Gathers rows; of a loss that every rank has, the gradients of all ranks by a row are summed."""

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
