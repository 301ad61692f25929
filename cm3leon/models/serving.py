"""Prepare a model for serving: weights in fewer bits, and layers shared by ranks.

Sharing splits every layer between ranks (tensor parallelism, `split.py`).
"""

from __future__ import annotations

import torch

from cm3leon.models.base import Model
from cm3leon.types import UserError, Weights


def keep_weights(model: Model, kind: Weights) -> None:
    """Convert a model's weights, in place.

        kind        matrices of the layers   head      embeddings
        float32     float32                  float32   float32
        bf16        bf16                     bf16      float32
        int8, fp8   int8, fp8                bf16      float32

    With bf16 and bf16 autocast, results are bit for bit those of float32 weights, which autocast
    rounds to bf16 at every step. Embeddings stay float32, and with them the residual stream. int8
    and fp8 are torchao's weight-only quantization with one scale per output.

    Raises:
        UserError: for int8 or fp8 without torchao or of a model without named matrices, or fp8 on a
            device that cannot compute in it.
    """
    if kind == "float32":
        return
    if kind != "bf16" and not model.matrices:
        raise UserError(
            f"weights are {kind}, which a {type(model).__name__} does not offer; "
            "take float32 or bf16"
        )

    # Norms stay as they are, because autocast computes them in float32 anyway.
    matrices = [getattr(block, name) for block in model.blocks for name in model.matrices]
    for module in (*(matrices or model.blocks), model.head):
        module.to(torch.bfloat16)
    if kind == "bf16":
        return

    device = model.head.weight.device
    if kind == "fp8" and not (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    ):
        raise UserError(
            f"weights are fp8, which {device.type} does not compute in, as it needs CUDA of "
            "capability 8.9; take bf16 or int8"
        )
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(
            f"weights are {kind}, which needs the package torchao (pip install torchao)"
        ) from error

    # The configurations keep their default `version`: the other one of torchao 0.15 rounds small
    # scales up to 2^-7.
    quantize_(model.blocks, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def share(model: Model, *, rank: int, count: int) -> None:
    """Leave a rank its part of every layer, in place: some heads and some hidden units of the MLP.

    Embeddings and head stay whole. All ranks of the process group have to run the same passes, and
    all get the same results, up to the rounding of sums. Call it before `keep_weights`.

    Raises:
        UserError: for a number of ranks that does not divide the heads, or a model whose layers
            cannot be shared.
    """
    model.share(rank, count)
