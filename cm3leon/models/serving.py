"""A decoder made ready to be asked: weights in fewer bits, and shared by several ranks (tensor parallelism)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.models.base import Model
from cm3leon.models.transformer import Transformer
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
    if kind != "bf16" and not isinstance(model, Transformer):
        raise UserError(
            f"weights are {kind}, which is for model.name=cm3leon; take float32 or bf16"
        )
    for module in (*model.blocks, model.head):
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


class _Summed(nn.Module):
    """A linear layer whose inputs are shared by the ranks: each computes its part, and the parts are added up."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        part = F.linear(x, self.weight)
        dist.all_reduce(part)
        return part


def share(model: Model, *, rank: int, count: int) -> None:
    """Leaves a rank its part of every layer, in place: some of the heads, and some of the MLP's hidden units.

    Embeddings and head stay whole. All ranks of the process group have to run the same passes; each gets the same
    results, up to the rounding of sums. Call it before `keep_weights`.

    Raises:
        UserError: for a number of ranks that does not divide the heads, or another model.
    """
    if not isinstance(model, Transformer):
        raise UserError("only the layers of model.name=cm3leon can be shared by several ranks")
    head_size, width, heads = model.config.head_size, model.config.width, model.heads
    if heads % count:
        raise UserError(
            f"{count} ranks cannot share the model's {heads} heads; the number must divide them"
        )
    model.heads = heads // count
    for block in model.blocks:
        qkv_3AED = block.qkv.weight.detach().view(3, heads, head_size, width)
        block.qkv.weight = _part(qkv_3AED.chunk(count, 1)[rank].flatten(0, 2))
        block.up.weight = _part(block.up.weight.detach().chunk(count)[rank])
        block.out = _Summed(block.out.weight.detach().chunk(count, 1)[rank].clone())
        block.down = _Summed(block.down.weight.detach().chunk(count, 1)[rank].clone())


def _part(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.clone(), requires_grad=False)
