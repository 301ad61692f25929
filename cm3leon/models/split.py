"""Parts of a layer that several ranks share (tensor parallelism, arXiv 1909.08053, section 3)."""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Summed(nn.Module):
    """A linear layer whose inputs are shared by the ranks: each computes its part, and the parts are added up."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = frozen(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs of this rank) to (..., outputs), the same on every rank."""
        part = F.linear(x, self.weight)
        dist.all_reduce(part)
        return part


def frozen(weight: Tensor) -> nn.Parameter:
    """A copy of a part of a weight, for answers alone."""
    return nn.Parameter(weight.detach().clone(), requires_grad=False)
