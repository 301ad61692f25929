"""Muon for the matrices of the layers, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps along the orthogonal
matrix that is nearest to a matrix's momentum. Its step is scaled as in Moonlight (arXiv 2502.16982,
section 2.2): by 0.2 sqrt(max(rows, columns)), so that its entries are about as large as AdamW's,
and both take one learning rate and one weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

MOMENTUM = 0.95


class MuonWithAdamW(torch.optim.Optimizer):
    """Both optimizers over their own groups; groups and state are shared with them.

    Args:
        matrices: groups of two-dimensional parameters, for Muon.
        others: groups for AdamW.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        *,
        rate: float,
        betas: tuple[float, float],
    ) -> None:
        self._parts: list[torch.optim.Optimizer] = [
            ShardedMuon(matrices, lr=rate, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=betas, fused=True),
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of each."""
        assert closure is None
        for part in self._parts:
            part.step()


class ShardedMuon(torch.optim.Muon):
    """torch's Muon, also for the sharded matrices of FSDP2.

    The nearest orthogonal matrix is a function of the whole matrix. So the ranks take turns: as
    many matrices as there are ranks are gathered in bf16, in which they are orthogonalised anyway;
    each rank computes one, and all are sent around. That is 4 bytes of traffic a weight and step,
    and no matrix is computed twice.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Changes all matrices that have a gradient."""
        assert closure is None
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            super().step()  # type: ignore[no-untyped-call]  # torch leaves it without types
            return
        count, rank = dist.get_world_size(), dist.get_rank()
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            for start in range(0, len(matrices), count):
                some = matrices[start : start + count]

                # All ranks gather, then each computes its own at the same time as the others.
                wholes = [self._gathered_update(p, group) for p in some]
                if rank < len(some):
                    wholes[rank] = _orthogonal_step(wholes[rank], group)
                for owner, (p, whole) in enumerate(zip(some, wholes, strict=True)):
                    dist.broadcast(whole, src=owner)
                    rate = float(group["lr"])
                    p.mul_(1 - rate * group["weight_decay"])
                    step = distribute_tensor(
                        whole.to(p.dtype), p.device_mesh, p.placements, src_data_rank=None
                    )
                    p.add_(step, alpha=rate)

    def _gathered_update(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Moves the momentum on; what is orthogonalised of it, whole and in bf16."""
        state = self.state[p]
        assert p.grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update: Any = p.grad.lerp(state["momentum_buffer"], group["momentum"]).bfloat16()
        return update.full_tensor().contiguous()


def _orthogonal_step(update: Tensor, group: dict[str, Any]) -> Tensor:
    """The step of rate 1 that torch's Muon makes for an update that has its momentum already."""
    whole = nn.Parameter(torch.zeros_like(update))
    whole.grad = update
    settings = ("ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")
    torch.optim.Muon(
        [whole],
        lr=1.0,
        weight_decay=0.0,
        momentum=0.0,
        nesterov=False,
        **{name: group[name] for name in settings},
    ).step()
    return whole.detach()
