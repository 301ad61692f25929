"""Activation checkpointing and compilation of a model's layers.

What one layer keeps for the backward pass, and what that pass computes again:

    none        every intermediate result                                  nothing
    selective   the layer's input, matrix products, attention's results    norms, activations
    full        the layer's input                                          the whole layer

Checkpointing and compilation leave the names of weights as they are.
"""

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
"""Operators whose results selective checkpointing keeps, since computing them again is expensive.

They are the matrix products, and attention for models whose layers are recomputed in one piece.
"""


def recompute(model: Model, choice: Checkpointing) -> None:
    """Make the backward pass compute layers again instead of keeping their intermediate results.

    Args:
        model: the model, changed in place.
        choice: with `full`, only the input of each layer is kept. With `selective`, so are the
            inputs and outputs of attention and the results of matrix products, which are then
            computed once.
    """
    if choice == "none":
        return
    methods = model.recomputed if choice == "selective" else ("forward",)
    for block in model.blocks:
        layer: type = type(block)
        block.__class__ = _checkpointed(layer, methods, choice == "selective")


@cache
def _checkpointed(layer: type, methods: tuple[str, ...], selective: bool) -> Any:
    """Derive a class of layers whose methods are computed again in the backward pass.

    All layers share it. With methods of their own, torch 2.9 would compile each layer separately,
    and stop at the eighth.
    """
    wrapped = {name: _again(getattr(layer, name), selective) for name in methods}
    return type(layer.__name__, (layer,), wrapped)


def _again(method: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    # Layers draw no random numbers, so there is no random state to restore.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = _keeping

    def call(self: nn.Module, *args: Any, **named: Any) -> Any:
        return checkpoint(method, self, *args, **named, **options)

    return call


def compile_blocks(model: Model) -> None:
    """Compile the layers for training; the hooks of FSDP stay outside.

    Layers are alike, so one graph serves all of them and all packings. Passes without gradients
    (validation, decoding) are not compiled: their shapes change at every step and would soon reach
    the number of graphs that torch.compile allows a function.
    """
    for block in model.blocks:
        block.forward = _compiled_in_training(block.forward)


def _compiled_in_training(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward)

    def call(*args: Any, **named: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **named)

    return call


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if str(operator) in KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_keeping = partial(create_selective_checkpoint_contexts, _policy)
