"""Muon for the matrices of the layers, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps along the orthogonal
matrix that is nearest to a matrix's momentum. Its step is scaled as in Moonlight (arXiv 2502.16982,
section 2.2): by 0.2 sqrt(max(rows, columns)), so that its entries are about as large as AdamW's,
and both take one learning rate and one weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cm3leon.training.device import uses_bf16
from cm3leon.training.distributed import is_sharded
from cm3leon.types import TrainingPrecision

MOMENTUM = 0.95


class MuonWithAdamW(torch.optim.Optimizer):
    """Both optimizers, each over its own groups; groups and state are shared with them.

    Args:
        matrices: groups of two-dimensional parameters, for Muon.
        others: groups for AdamW.
        precision: of the products that make a matrix orthogonal.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        *,
        rate: float,
        betas: tuple[float, float],
        precision: TrainingPrecision,
    ) -> None:
        self._parts: list[torch.optim.Optimizer] = [
            ShardedMuon(matrices, rate=rate, precision=precision),
            torch.optim.AdamW(others, lr=rate, betas=betas, fused=True),
        ]
        groups: list[dict[str, Any]] = []
        for part in self._parts:
            groups += part.param_groups
        super().__init__(groups, {})
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of each."""
        assert closure is None
        for part in self._parts:
            part.step()


class ShardedMuon(torch.optim.Muon):
    """torch's Muon, also for the sharded matrices of FSDP2, and with products in float32 where
    training computes in it.

    The nearest orthogonal matrix is a function of the whole matrix. So the ranks take turns: as
    many matrices as there are ranks are gathered in bf16; each rank computes one and sends it to
    all. That is 4 bytes of traffic a weight and step, and no matrix is computed twice.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], *, rate: float, precision: TrainingPrecision
    ) -> None:
        super().__init__(groups, lr=rate, momentum=MOMENTUM)
        self._precision: TrainingPrecision = precision

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            if any(map(is_sharded, matrices)):
                self._change_shards(matrices, group)
                continue
            for p in matrices:
                _change(p, self._orthogonal(self._update(p, group), group), group)

    def _change_shards(self, matrices: Sequence[Any], group: dict[str, Any]) -> None:
        from torch.distributed.tensor import distribute_tensor

        count, rank = dist.get_world_size(), dist.get_rank()
        for start in range(0, len(matrices), count):
            some = matrices[start : start + count]

            # All ranks gather, then each computes its own at the same time as the others.
            updates: list[Any] = [self._update(p, group) for p in some]
            wholes = [update.full_tensor().contiguous() for update in updates]
            if rank < len(some):
                wholes[rank] = self._orthogonal(wholes[rank], group)
            for owner, (p, whole) in enumerate(zip(some, wholes, strict=True)):
                dist.broadcast(whole, src=owner)
                direction = distribute_tensor(
                    whole.to(p.dtype), p.device_mesh, p.placements, src_data_rank=None
                )
                _change(p, direction, group)

    def _update(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Moves the momentum on; what is orthogonalised of it, in bf16."""
        state = self.state[p]
        assert p.grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        return p.grad.lerp(state["momentum_buffer"], group["momentum"]).bfloat16()

    def _orthogonal(self, update: Tensor, group: dict[str, Any]) -> Tensor:
        """A nearly orthogonal matrix with the singular vectors of an update, in bf16.

        Products are in bf16 if those of training are, but on a CPU that only emulates bf16 in
        float32, which is faster there.
        """
        trains_in_bf16 = uses_bf16(update.device, self._precision)
        if not (trains_in_bf16 and uses_bf16(update.device, "auto")):
            update = update.float()
        return orthogonal(update, group).bfloat16().contiguous()


def _change(p: nn.Parameter, direction: Tensor, group: dict[str, Any]) -> None:
    """Let a matrix decay and step along the direction, scaled so that entries are like AdamW's."""
    rate = float(group["lr"])
    p.mul_(1 - rate * group["weight_decay"])
    p.add_(direction, alpha=-rate * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(update: Tensor, group: dict[str, Any]) -> Tensor:
    """A nearly orthogonal matrix with the singular vectors of an update, in its dtype.

    Each round applies the polynomial a s + b s^3 + c s^5 to the singular values, which takes them
    near 1.
    """
    a, b, c = group["ns_coefficients"]
    rows, columns = update.shape

    # The square of the shorter side is the cheaper one.
    x = update.T if rows > columns else update
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if rows > columns else x
