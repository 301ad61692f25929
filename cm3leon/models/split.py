"""Parts of a layer that several ranks share (tensor parallelism, arXiv 1909.08053, section 3).

Two matrices in a row, y = B f(A x), are cut so that one sum at the end is all that ranks exchange:

    rank 0    A0 = upper rows of A    h0 = f(A0 x)    B0 = left columns of B     B0 h0
    rank 1    A1 = lower rows of A    h1 = f(A1 x)    B1 = right columns of B  + B1 h1  = y
"""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Summed(nn.Module):
    """Linear layer whose inputs are split between ranks, and whose outputs are summed over them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = frozen(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs of this rank) to (..., outputs), which are the same on every rank."""
        part = F.linear(x, self.weight)
        dist.all_reduce(part)
        return part


def frozen(weight: Tensor) -> nn.Parameter:
    """Copy a part of a weight, as a parameter that is not trained."""
    return nn.Parameter(weight.detach().clone(), requires_grad=False)
