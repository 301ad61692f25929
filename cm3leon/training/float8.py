"""Training in float8: torchao computes the products of the decoder's layers in it,
with a scale for each tensor.

Weights stay in float32 and everything else is computed in bf16, as by `precision: bf16`; the
embeddings and the head are left alone. The scales are found in every step (torchao's recipe
`tensorwise`), so a training has no more state. It pays under `training.compile`, which makes one
kernel of the scaling and what stands before it.
"""

from __future__ import annotations

import torch
from torch import nn

from cm3leon.models.base import Model
from cm3leon.types import UserError

CAPABILITY = (9, 0)
"""CUDA's compute capability of the H100."""
MULTIPLE = 16
"""What CUDA's float8 products ask of the sides of their matrices (cuBLAS)."""


def missing(device: torch.device) -> str:
    """What is missing to train in float8 on that device, in a few words; "" if nothing is."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        return "an H100 or a newer GPU"
    try:
        import torchao.float8  # noqa: F401
    except ImportError:
        return "the package torchao (pip install torchao)"
    return ""


def check_device(device: torch.device) -> None:
    """Raises UserError for a device that does not compute in float8, or without torchao."""
    if lacks := missing(device):
        raise UserError(
            f"training.precision is float8, which needs {lacks}; take precision=bf16 here"
        )


def to_float8(model: Model, *, emulate: bool = False) -> None:
    """Has the layers' linear modules compute in float8, in place; names and values of weights stay.

    Args:
        emulate: round as float8 does and multiply in higher precision, on any device.

    Raises:
        UserError: for layers whose matrices have sides that float8 products do not take.
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
