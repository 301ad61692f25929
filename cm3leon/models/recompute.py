"""Activation checkpointing and compilation of a decoder's layers; the names of its weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cm3leon.models.base import Model

Checkpointing = Literal["none", "selective", "full"]

KEPT = frozenset(
    {
        "aten.mm.default",
        "aten.addmm.default",
        "aten.bmm.default",
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._efficient_attention_forward.default",
        "cm3leon.packed_attention.default",
        "xformers_flash.flash_fwd.default",
        "xformers_flash3.flash_fwd.default",
    }
)
"""Operators whose results selective checkpointing keeps because they are expensive to compute again: matrix products,
and attention for models that do not compute it between the parts of a layer."""


def recompute(model: Model, choice: Checkpointing) -> None:
    """Has the backward pass compute the layers again instead of keeping what they computed.

    full: only the input of each layer is kept. selective: attention's inputs and outputs, and the results of matrix
    products, are too; each is computed once.
    """
    if choice == "none":
        return
    methods = model.recomputed if choice == "selective" else ("forward",)
    for block in model.blocks:
        layer: type = type(block)
        block.__class__ = _checkpointed(layer, methods, choice == "selective")


@cache
def _checkpointed(layer: type, methods: tuple[str, ...], selective: bool) -> Any:
    """A class of layers whose methods are computed again in the backward pass.

    All layers share it. Were each given methods of its own, torch 2.9 would compile each by itself, and none beyond
    the eighth.
    """
    wrapped = {name: _again(getattr(layer, name), selective) for name in methods}
    return type(layer.__name__, (layer,), wrapped)


def _again(method: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    # Layers draw nothing, so there is no random state to go back to.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = _keeping

    def call(self: nn.Module, *args: Any, **named: Any) -> Any:
        return checkpoint(method, self, *args, **named, **options)

    return call


def compile_blocks(model: Model) -> None:
    """Compiles the layers, which are alike, once; the hooks of FSDP stay outside.

    One graph is for all layers and all packings. Passes without gradients, of validation and of decoding, are left
    as they are: their shapes change with every step, and would use up the graphs that a function may have.
    """
    for block in model.blocks:
        block.forward = _compiled_in_training(block.forward)


def _compiled_in_training(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward)

    def call(*args: Any, **named: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **named)

    return call


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if str(operator) in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
    )


_keeping = partial(create_selective_checkpoint_contexts, _policy)
