"""Low-rank adaptation (LoRA, arXiv 2106.09685): small matrices are trained beside frozen weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.models.base import Model
from cm3leon.models.initial import Rows
from cm3leon.types import UserError

ADAPTER = "lora.safetensors"
"""The adapters of a finished training, beside the weights that they are merged into."""


class LowRank(nn.Module):
    """y = W x + (alpha / rank) B A x, with W frozen; `weight` keeps its name.

    A is drawn so that A x has the size of x's entries, B is zero: at first it computes what the linear layer did.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight = linear.weight
        self.scale = alpha / rank
        factory: dict[str, Any] = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, **factory))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, **factory))
        self.draw(self.lora_a.data)

    @staticmethod
    def draw(a_RK: Tensor, generator: torch.Generator | None = None) -> None:
        """Draws A (rank, inputs), from torch's generator if no other is given."""
        a_RK.normal_(std=a_RK.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scale * F.linear(
            F.linear(x, self.lora_a), self.lora_b
        )


def add_lora(
    model: Model, rank: int, alpha: float, *, frozen_dtype: torch.dtype | None = None
) -> None:
    """Freezes all weights of a decoder, and adapts the matrices of its layers.

    A is drawn from torch's generator.

    Args:
        frozen_dtype: precision that the layers' frozen weights are kept in from now on; None leaves it. Embeddings and
            head keep theirs, so that the residual stream does.

    Raises:
        UserError: for a decoder whose layers do not have these matrices.
    """
    if not model.matrices:
        raise UserError(
            f"training.lora_rank: the layers of a {type(model).__name__} have no matrices to adapt; leave it out to "
            "train all of its weights"
        )
    model.requires_grad_(False)
    for block in model.blocks:
        for name in model.matrices:
            linear = getattr(block, name)
            if frozen_dtype is not None:
                linear.weight.data = linear.weight.data.to(frozen_dtype)
            setattr(block, name, LowRank(linear, rank, alpha))


@torch.no_grad()
def draw_adapters(model: nn.Module, generator: torch.Generator, rows: Rows) -> None:
    """Draws a rank's rows of all adapters of a decoder, as `add_lora` would. Each A is small, and is drawn whole."""
    for module in model.modules():
        if isinstance(module, LowRank):
            a_RK = torch.empty(module.lora_a.shape)
            LowRank.draw(a_RK, generator)
            own, first = rows(module.lora_a)
            own.copy_(a_RK[first : first + len(own)])
            rows(module.lora_b)[0].zero_()


def lora_scale(model: nn.Module) -> float | None:
    """alpha / rank of a decoder that has adapters, None for one that has none."""
    return next((module.scale for module in model.modules() if isinstance(module, LowRank)), None)


def is_adapter(name: str) -> bool:
    """Whether a tensor is one of an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights with their adapters added in, float32, under the names of a decoder without adapters.

    Frozen weights that were kept in 16 bits stay as rounded as they were in training.
    """
    result = {}
    for name, tensor in state.items():
        if is_adapter(name):
            continue
        prefix = name.removesuffix("weight")
        a, b = state.get(f"{prefix}lora_a"), state.get(f"{prefix}lora_b")
        result[name] = (
            tensor.float() + scale * (b.float() @ a.float())
            if a is not None and b is not None
            else tensor
        )
    return result
