"""The outcome of a step: one reduction over the ranks on the device, which the host reads a step
later.

    device   | step 1, reduction | step 2, reduction | step 3 ...
    host     launches 1, launches 2, reads 1, launches 3, reads 2 ...

So the device never waits for the host to read a loss. What depends on the loss is decided on the
device: how much gradients are clipped, and whether the step changes the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.placement_types import Replicate

from cm3leon.training.distributed import Ranks, is_sharded, local


@dataclass(frozen=True)
class Sums:
    """Sums over the ranks, float64 on the device."""

    coming_weight: Tensor
    """Weight of the next step's batch."""
    numbers: Tensor
    """What the host reads: how many ranks were asked to stop, the loss, and squared norms of
    gradients."""

    @property
    def norms(self) -> Tensor:
        """Norm of the gradients of each module that is clipped by its own norm, float32."""
        return self.numbers[2:].sqrt().float()

    @property
    def bad(self) -> Tensor:
        """1 if loss or gradient is not finite, else 0; float32."""
        return (~self.numbers[1:].sum().isfinite()).float()


class Gradients:
    """The gradients of a module, or this rank's share of them.

    Args:
        clipped: modules whose gradients are clipped by their own norms.
    """

    def __init__(self, module: nn.Module, clipped: Sequence[nn.Module], ranks: Ranks) -> None:
        self._named = list(module.named_parameters())
        self._clipped = [set(map(id, part.parameters())) for part in clipped]
        self._ranks = ranks
        self.names: list[str] = []
        """Of the parameters that had a gradient in the last step."""
        self.norms = torch.zeros(0)
        """The norms of these gradients, or of this rank's shares of them."""
        self._shares: list[list[Tensor]] = []

    def measured(self) -> Tensor:
        """This rank's part of the squared norm of each clipped module, float64; the parts of all
        ranks add up to it."""
        found = [(name, weight) for name, weight in self._named if weight.grad is not None]
        self.names = [name for name, _ in found]
        shares = [local(weight.grad) for _, weight in found if weight.grad is not None]
        norms = list(torch._foreach_norm(shares)) if shares else []
        self.norms = torch.stack(norms) if norms else torch.zeros(0)

        self._shares, squares = [], []
        for members in self._clipped:
            inside = [k for k, (_, weight) in enumerate(found) if id(weight) in members]
            self._shares.append([shares[k] for k in inside])
            if not inside:
                squares.append(torch.zeros((), dtype=torch.float64, device=self._ranks.device))
                continue

            # As torch.nn.utils.get_total_norm computes it; squared in float64, against overflow.
            # Ranks with copies of the same gradient share it out.
            total = torch.linalg.vector_norm(torch.stack([norms[k] for k in inside]))
            squares.append(total.double().square() / self._copies(found[inside[0]][1]))
        return torch.stack(squares)

    def clip(self, norms: Tensor, most: float) -> None:
        """Scale down in place the gradients of each clipped module whose norm is above `most`."""
        for shares, norm in zip(self._shares, norms, strict=True):
            if not shares:
                continue
            torch._foreach_mul_(shares, torch.clamp(most / (norm + 1e-6), max=1.0))

    def _copies(self, weight: Tensor) -> int:
        """Number of ranks that have the same share of a weight's gradient."""
        if not is_sharded(weight):
            return self._ranks.count
        mesh = weight.device_mesh
        axes = [axis for axis, placed in enumerate(weight.placements) if placed == Replicate()]
        return math.prod(mesh.size(axis) for axis in axes) * self._ranks.count // mesh.size()


def reduced(
    loss: Tensor, gradients: Gradients, ranks: Ranks, *, coming_weight: float, asked: bool
) -> Sums:
    """Make the step's one reduction.

    Args:
        loss: this rank's share of the step's loss.
        coming_weight: weight of this rank's next batch.
        asked: whether this rank was asked to stop.
    """
    told = ranks.tensor([coming_weight, float(asked)])
    sums = ranks.reduce(torch.cat([told, loss.double()[None], gradients.measured()]))
    return Sums(sums[0], sums[1:])


class Outcome:
    """A step's outcome, on its way from the device.

    Args:
        step: number of steps done, this one included.
        parts: what it was computed from.
    """

    def __init__(self, step: int, sums: Sums, gradients: Gradients, parts: Sequence[Any]) -> None:
        self.step, self.parts = step, parts
        self._names, self._norms = gradients.names, gradients.norms
        self._numbers = sums.numbers
        self._copied: torch.cuda.Event | None = None
        if sums.numbers.is_cuda:
            # A copy is queued right behind the step. Reading the device's tensor later would wait
            # for all the work that it was given since.
            self._numbers = torch.empty_like(sums.numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(sums.numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._read: list[float] | None = None

    def bad_gradients(self) -> list[str]:
        """Names of parameters whose gradient, or this rank's share of it, is not finite."""
        finite = self._norms.isfinite().tolist()
        return [name for name, good in zip(self._names, finite, strict=True) if not good]

    @property
    def asked(self) -> bool:
        """Whether a rank was asked to stop before the step's end."""
        return self._values[0] > 0

    @property
    def loss(self) -> float:
        """The step's loss, of all ranks."""
        return self._values[1]

    @property
    def norm(self) -> float:
        """Norm of all gradients together, before clipping."""
        return math.sqrt(sum(self._values[2:]))

    @property
    def bad(self) -> bool:
        """Whether loss or gradient is not finite, so that the step must not change the weights."""
        return not math.isfinite(sum(self._values[1:]))

    @property
    def _values(self) -> list[float]:
        if self._read is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._read = self._numbers.tolist()
        return self._read


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of the optimizer reads `found_inf`, a tensor,
    to decide if it changes anything."""
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])


def adds_to_gradients(module: nn.Module, more: bool) -> None:
    """Tell the module before a backward pass whether another one follows in the step: replicas sum
    gradients only in the last."""
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(not more)
