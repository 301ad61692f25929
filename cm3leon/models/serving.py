"""A decoder made ready to be asked: weights in fewer bits, and shared by several ranks (tensor parallelism)."""

from __future__ import annotations

import torch

from cm3leon.models.base import Model
from cm3leon.types import UserError, Weights


def keep_weights(model: Model, kind: Weights) -> None:
    """Changes what the weights of a decoder are kept in, in place.

    bf16: layers and head. Under bf16 autocast the results are bit for bit those of float32 weights, which it rounds to
    bf16 at every step; embeddings stay float32, so that the residual stream does. int8, fp8: the matrices of the layers
    only, by torchao's weight-only quantization with a scale for each output, the head in bf16.

    Raises:
        UserError: for int8 or fp8 without torchao or of another model, or fp8 on a device that does not have it.
    """
    if kind == "float32":
        return
    if kind != "bf16" and not model.matrices:
        raise UserError(
            f"weights are {kind}, which a {type(model).__name__} does not offer; take float32 or bf16"
        )
    # Norms stay as they are: autocast computes them in float32 as well.
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
            f"weights are fp8, which {device.type} does not compute in; it needs CUDA of capability 8.9"
        )
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(
            f"weights are {kind}, which needs the package torchao (pip install torchao)"
        ) from error
    # By the library's own default of `version`: torchao 0.15 has a second one that rounds small scales up to 2^-7.
    quantize_(model.blocks, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def share(model: Model, *, rank: int, count: int) -> None:
    """Leaves a rank its part of every layer, in place: some of the heads, and some of the MLP's hidden units.

    Embeddings and head stay whole. All ranks of the process group have to run the same passes; each gets the same
    results, up to the rounding of sums. Call it before `keep_weights`.

    Raises:
        UserError: for a number of ranks that does not divide the heads, or another model.
    """
    model.share(rank, count)
