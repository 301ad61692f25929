"""Distribute a model over the ranks: FSDP2 on a device mesh, recomputation,
compilation of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cm3leon.collectives import averaged
from cm3leon.models.base import Model
from cm3leon.models.initial import Beginning, draw, generator_at
from cm3leon.models.lora import add_lora, draw_adapters, is_adapter, lora_scale, merged
from cm3leon.models.recompute import compile_blocks, recompute
from cm3leon.training.config import DecoderTrainingConfig
from cm3leon.training.device import uses_bf16
from cm3leon.training.distributed import Ranks, is_sharded
from cm3leon.training.float8 import check_device, to_float8
from cm3leon.types import UserError
from cm3leon.weights import check_fit, read_rows, shapes_of


def distributed(
    whole: Callable[[], Model],
    shape: Callable[[], Model],
    config: DecoderTrainingConfig,
    ranks: Ranks,
    *,
    random_state: Tensor | None = None,
    weights: Path | None = None,
) -> Model:
    """A model with its weights, sharded over the ranks; whole on one process without a group.

    Each layer is a group of FSDP2; embeddings and head are another. Weights and gradients are kept
    in float32; layers are gathered in bf16 if the precision is bf16, and gradients are summed in
    float32.

    Args:
        whole: makes the model with its first weights, on the CPU. It is called if these cannot be
            had from what follows, and only on the first rank, which sends the others their shards,
            so that no other rank ever holds all weights.
        shape: makes the model; its weights are not used.
        random_state: of the generator from which `whole` draws, so that each rank can draw its own
            shards (`models/initial.py`), including adapters; None for a model that starts
            otherwise.
        weights: a safetensors file with the first weights; each rank reads its own shards of it.

    Raises:
        UserError: for replicas that the ranks cannot be divided into, 8-bit moments on several
            ranks, or float8 on devices that cannot compute in it.
    """
    if config.precision == "float8":
        check_device(ranks.device)
    mesh = ranks.mesh(config.copies(ranks.nodes()))
    with torch.device("meta"):
        model = shape()

    # Whether this rank can make the first weights of its own shards without the whole model.
    begin = None
    if random_state is not None and _draws_itself(model):
        begin = _beginning(model, random_state, weights, ranks)
    bf16 = torch.bfloat16 if uses_bf16(ranks.device, config.precision) else None

    # One process: no sharding.
    if mesh is None:
        if begin:
            with torch.device("meta"):
                model = _adapted(model, config, frozen_dtype=bf16)
            begin(model.to_empty(device=ranks.device))
        else:
            model = _adapted(whole(), config, frozen_dtype=bf16).to(ranks.device)
        _prepare(model, config)
        return model

    if config.optimizer == "adamw_8bit":
        raise UserError(
            "training.optimizer is adamw_8bit, whose moments are not sharded; it is for one "
            "process, without torchrun"
        )

    # Shard the model while it has no memory, then give each rank memory for its own shards.
    with torch.device("meta"):
        model = _adapted(model, config)
    _prepare(model, config)
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=ranks.device)

    # First weights: from this rank itself, or from the first rank, which makes the whole model.
    if begin:
        begin(model)
        return model
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state: dict[str, Any] = _adapted(whole(), config).state_dict() if ranks.first else {}
    set_model_state_dict(model, state, options=options)
    return model


def replicate(module: nn.Module, ranks: Ranks) -> None:
    """Average the gradients of a module that every rank holds whole, by one all-reduce at the end
    of a backward pass.

    For tokenizers and encoders, which are small beside what they compute. Their weights must be the
    same on all ranks, and stay so.
    """
    if not ranks.joined:
        return
    module.to(ranks.device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    queued = False

    # The first gradient of a backward pass queues the average, which runs after the last one.
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
    """Whether all first weights of a model are known from its `firsts`."""
    begun = {first.name for first in model.firsts()}
    return not list(model.buffers()) and begun == {name for name, _ in model.named_parameters()}


def _beginning(
    plain: Model, state: Tensor, weights: Path | None, ranks: Ranks
) -> Callable[[nn.Module], None]:
    """A function that gives this rank's shards of a model, including adapters,
    their first weights."""
    beginning, wanted = Beginning(plain, plain.firsts()), plain.state_dict()

    @torch.no_grad()
    def begin(model: nn.Module) -> None:
        if weights is None:
            draw(model, beginning, state, _own_rows)
        else:
            _read(model, weights, wanted, ranks)
        if lora_scale(model) is not None:
            draw_adapters(model, generator_at(state, beginning.end()), _own_rows)

    return begin


def _own_rows(weight: nn.Parameter) -> tuple[Tensor, int]:
    """The rows of a parameter that this rank holds, and the number of the first of them."""
    if not is_sharded(weight):
        return weight, 0
    _, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    return weight.to_local(), offset[0]


def _read(model: nn.Module, path: Path, wanted: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Read this rank's rows of the weights in `wanted`. An error of one rank is raised on all."""
    parameters, fault = dict(model.named_parameters()), ""
    try:
        check_fit(path, shapes_of(path), wanted)
        read_rows(path, {name: _own_rows(parameters[name]) for name in wanted})
    except UserError as error:
        fault = str(error)
    for said in ranks.gather(fault):
        if said:
            raise UserError(said)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """All weights by name on the CPU, on the first rank; {} on the others. All ranks must call it.

    What adapters (LoRA) have learned is added to the weights.
    """
    return whole_state_and_adapter(model)[0]


def whole_state_and_adapter(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """`whole_state`, and the tensors of the adapters (LoRA); {} for a model without adapters."""
    if isinstance(model, FSDPModule):
        state: dict[str, Any] = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    else:
        state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    scale = lora_scale(model)
    if scale is None:
        return state, {}
    return merged(state, scale), {
        name: tensor for name, tensor in state.items() if is_adapter(name)
    }


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all weights of a sharded model, so that its forward pass needs no
    other rank.

    All ranks must enter. Weights are in the precision of the forward pass: 14 GB for 7B in bf16.
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
    """The model, with adapters if they are to be trained."""
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, frozen_dtype=frozen_dtype)
    return model


def _prepare(model: Model, config: DecoderTrainingConfig) -> None:
    if config.precision == "float8":
        to_float8(model)
    recompute(model, config.activation_checkpointing)
    if config.compile:
        compile_blocks(model)
