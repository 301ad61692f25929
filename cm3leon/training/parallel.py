"""A model over the ranks: FSDP2 on a device mesh, with recomputation and compilation of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cm3leon.collectives import averaged
from cm3leon.models.base import Model
from cm3leon.models.initial import draw
from cm3leon.models.lora import add_lora, lora_scale, merged
from cm3leon.models.recompute import compile_blocks, recompute
from cm3leon.training.config import DecoderTrainingConfig
from cm3leon.training.device import uses_bf16
from cm3leon.training.distributed import Ranks
from cm3leon.training.float8 import check_device, to_float8
from cm3leon.types import UserError


def distributed(
    whole: Callable[[], Model],
    shape: Callable[[], Model],
    config: DecoderTrainingConfig,
    ranks: Ranks,
    *,
    random_state: Tensor | None = None,
) -> Model:
    """A model with its weights, sharded over the ranks; on one process without a group, as it is.

    Each layer is a group of FSDP2, and the embeddings and the head are another. Weights and gradients are kept in
    float32; layers are gathered in bf16 where the precision is bf16, and gradients are summed in float32.

    Raises:
        UserError: for replicas that the ranks cannot be divided into, 8-bit moments on several ranks, or float8 on
            devices that do not compute in it.

    Args:
        whole: makes the model with its weights, on the CPU; called on the first rank only, which sends the others
            their shards, so that no other ever holds all of it.
        shape: makes the model without looking at its weights.
        random_state: of the generator from which `whole` draws all weights, so that each rank may draw its own shards
            (`models/initial.py`); None for weights that come from elsewhere.
    """
    if config.precision == "float8":
        check_device(ranks.device)
    mesh = ranks.mesh(config.copies(ranks.nodes()))
    with torch.device("meta"):
        model = shape()
    drawn = random_state is not None and not config.lora_rank and _draws_itself(model)
    if mesh is None and drawn:
        model.to_empty(device=ranks.device)
        _draw(model, random_state)
        _prepare(model, config)
        return model
    if mesh is None:
        frozen = torch.bfloat16 if uses_bf16(ranks.device, config.precision) else None
        model = _adapted(whole(), config, frozen_dtype=frozen).to(ranks.device)
        _prepare(model, config)
        return model
    if config.optimizer == "adamw_8bit":
        raise UserError(
            "training.optimizer is adamw_8bit, whose moments are not sharded; it is for one process, without torchrun"
        )
    with torch.device("meta"):
        model = _adapted(model, config)
    _prepare(model, config)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if uses_bf16(ranks.device, config.precision) else None,
        reduce_dtype=torch.float32,
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=ranks.device)
    if drawn:
        _draw(model, random_state)
        return model
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state: dict[str, Any] = _adapted(whole(), config).state_dict() if ranks.first else {}
    set_model_state_dict(model, state, options=options)
    return model


def replicate(module: nn.Module, ranks: Ranks) -> None:
    """Average the gradients of a module that every rank holds whole, by one all-reduce at the end of a backward pass.

    For tokenizers and encoders, which are small beside what they compute. The weights have to be the same on all ranks,
    and stay so.
    """
    if not ranks.joined:
        return
    module.to(ranks.device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    queued = False

    def average() -> None:
        nonlocal queued
        queued = False
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        flat = averaged(torch.cat([gradient.flatten() for gradient in gradients]))
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def queue(_: torch.Tensor) -> None:
        nonlocal queued
        if not queued:
            queued = True
            torch.autograd.Variable._execution_engine.queue_callback(average)

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(queue)


def _draws_itself(model: Model) -> bool:
    """Whether all that a model begins with is known from its `firsts`."""
    begun = {first.name for first in model.firsts()}
    return not list(model.buffers()) and begun == {name for name, _ in model.named_parameters()}


@torch.no_grad()
def _draw(model: Model, random_state: Tensor | None) -> None:
    """Draws this rank's shards of a model's first weights."""
    assert random_state is not None

    def rows(weight: nn.Parameter) -> tuple[Tensor, int]:
        if not isinstance(weight, DTensor):
            return weight, 0
        _, offset = compute_local_shape_and_global_offset(
            weight.shape, weight.device_mesh, weight.placements
        )
        return weight.to_local(), offset[0]

    draw(model, model.firsts(), random_state, rows)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """All weights by name on the CPU, on the first rank; empty on the others. All ranks have to call it.

    What adapters (LoRA) have learned is added into the weights.
    """
    if isinstance(model, FSDPModule):
        state: dict[str, Any] = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    else:
        state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    scale = lora_scale(model)
    return state if scale is None else merged(state, scale)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all weights of a sharded model, and its forward pass needs no other rank.

    All ranks have to enter. Weights are in the precision of the forward pass: 14 GB for 7B in bf16.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)  # as fully_shard chose
        part.reshard()


def _adapted(
    model: Model, config: DecoderTrainingConfig, *, frozen_dtype: torch.dtype | None = None
) -> Model:
    """The model, with adapters if they are what is trained."""
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, frozen_dtype=frozen_dtype)
    return model


def _prepare(model: Model, config: DecoderTrainingConfig) -> None:
    if config.precision == "float8":
        to_float8(model)
    recompute(model, config.activation_checkpointing)
    if config.compile:
        compile_blocks(model)
