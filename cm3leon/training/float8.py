"""Training in float8: torchao computes the matrix products of the model's layers, with one scale a
tensor.

Weights stay in float32 and the rest is computed in bf16, as with `precision: bf16`; the embeddings
and the head are left alone. The scales are computed in every step (torchao's recipe `tensorwise`),
so a training has no extra state. It pays under `training.compile`, which fuses the scaling with
what comes before it.
"""

from __future__ import annotations

import torch
from torch import nn

from cm3leon.models.base import Model
from cm3leon.types import UserError

CAPABILITY = (9, 0)
"""CUDA compute capability of the H100."""
MULTIPLE = 16
"""The sides of matrices in CUDA's float8 products must be multiples of this (cuBLAS)."""


def missing(device: torch.device) -> str:
    """What this device lacks for training in float8, in a few words; "" if nothing."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return "an H100 or a newer GPU"
    try:
        import torchao.float8  # noqa: F401
    except ImportError:
        return "the package torchao (pip install torchao)"
    return ""


def check_device(device: torch.device) -> None:
    """Raise UserError for a device that cannot compute in float8, or without torchao."""
    if lacks := missing(device):
        raise UserError(
            f"training.precision is float8, which needs {lacks}; take precision=bf16 here"
        )


def to_float8(model: Model, *, emulate: bool = False) -> None:
    """Let the layers' linear modules compute in float8, in place; names and values of weights stay.

    Args:
        emulate: round as float8 does and multiply in higher precision, on any device.

    Raises:
        UserError: for layers with matrices whose sides do not suit float8 products.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    linear = [each for each in model.blocks.modules() if isinstance(each, nn.Linear)]
    for each in linear:
        if each.in_features % MULTIPLE or each.out_features % MULTIPLE:
            raise UserError(
                f"training.precision is float8, for which {each.in_features} x "
                f"{each.out_features}, the size of a matrix of the layers, must be multiples of "
                f"{MULTIPLE}; choose another model.width, or precision=bf16"
            )
    convert_to_float8_training(model.blocks, config=Float8LinearConfig(emulate=emulate))
