"""Activation checkpointing and compilation of a decoder's layers; the names of its weights stay as they are."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cm3leon.models.base import Model

Checkpointing = Literal["none", "selective", "full"]

_aten = torch.ops.aten
KEPT = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""What selective checkpointing keeps because it is expensive to compute again: matrix products and attention."""


def recompute(model: Model, choice: Checkpointing) -> None:
    """Has the backward pass compute the layers again instead of keeping what they computed.

    full: only the input of each layer is kept. selective: the results of matrix products and attention are, too.
    """
    if choice == "none":
        return
    options: dict[str, Any] = {
        "use_reentrant": False,
        "preserve_rng_state": False,
    }  # layers draw nothing
    if choice == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, **options)


def compile_blocks(model: Model) -> None:
    """Compiles the layers, which are alike, once; the hooks of FSDP stay outside."""
    for block in model.blocks:
        block.forward = torch.compile(block.forward)


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
