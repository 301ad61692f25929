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
"""File of a finished training's adapters; the file of weights beside it has them merged in."""


class LowRank(nn.Module):
    """y = W x + (alpha / rank) B A x, with W frozen; `weight` keeps its name.

    A is drawn such that the entries of A x are as large as those of x. B is zero, so at first the
    module computes the same as the linear layer did.
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
        """Draw A (rank, inputs) in place, from torch's generator if no other is given."""
        a_RK.normal_(std=a_RK.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scale * F.linear(
            F.linear(x, self.lora_a), self.lora_b
        )


def add_lora(
    model: Model, rank: int, alpha: float, *, frozen_dtype: torch.dtype | None = None
) -> None:
    """Freeze all weights of a model, and give the matrices of its layers adapters, in place.

    The adapters' A are drawn from torch's generator.

    Args:
        model: the model to be adapted.
        rank: rank of the adapters.
        alpha: their strength; a product B A counts alpha / rank times.
        frozen_dtype: new precision of the layers' frozen weights; None leaves it. Embeddings and
            head keep theirs, and with them the residual stream.

    Raises:
        UserError: for a model that names no matrices.
    """
    if not model.matrices:
        raise UserError(
            f"training.lora_rank: the layers of a {type(model).__name__} have no matrices to adapt;"
            " leave it out to train all of its weights"
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
    """Draw a rank's rows of all adapters, with the numbers that `add_lora` would draw.

    Each A is small, so it is drawn whole and cut.
    """
    for module in model.modules():
        if isinstance(module, LowRank):
            a_RK = torch.empty(module.lora_a.shape)
            LowRank.draw(a_RK, generator)
            own, first = rows(module.lora_a)
            own.copy_(a_RK[first : first + len(own)])
            rows(module.lora_b)[0].zero_()


def lora_scale(model: nn.Module) -> float | None:
    """Return alpha / rank of a model with adapters, None for one without."""
    return next((module.scale for module in model.modules() if isinstance(module, LowRank)), None)


def is_adapter(name: str) -> bool:
    """Tell by its name whether a tensor belongs to an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Merge adapters into the weights, under the names of a model without adapters.

    Adapted weights become float32. Those that training kept in 16 bits stay as rounded as they were
    there.
    """
    result = {}
    for name, tensor in state.items():
        if is_adapter(name):
            continue
        prefix = name.removesuffix("weight")
        a, b = state.get(f"{prefix}lora_a"), state.get(f"{prefix}lora_b")
        if a is not None and b is not None:
            tensor = tensor.float() + scale * (b.float() @ a.float())
        result[name] = tensor
    return result
