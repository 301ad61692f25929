"""An image tokenizer as diffusers' VQModel, and its encoder as the one that transformers' Chameleon carries.

A codebook that is searched by cosine goes out with rows of length 1: of these the nearest by Euclidean distance is
that of the largest cosine, whatever the length of the vector, so that both libraries find and draw the same codes.
"""

from __future__ import annotations

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from cm3leon.tokenizers.image.base import ImageTokenizer
from cm3leon.tokenizers.image.network import GROUPS, Architecture
from cm3leon.tokenizers.image.published_layouts import DIFFUSERS, TAMING, TensorNames
from cm3leon.tokenizers.image.quantizer import EMAQuantizer, LookupQuantizer
from cm3leon.tokenizers.image.vq_model import VQModel

CODEBOOK = "quantizer.codebook_VD"
LINEAR = re.compile(r"\.to_(q|k|v|out\.0)\.weight$")
"""1x1 convolutions of ours that are linear layers in diffusers."""


def why_not_diffusers(tokenizer: ImageTokenizer) -> str:
    """Why a tokenizer cannot be diffusers' VQModel, as the end of a sentence; "" if it can."""
    if not isinstance(tokenizer, VQModel):
        return "its networks are not those of a VQGAN"
    if not isinstance(tokenizer.quantizer, LookupQuantizer | EMAQuantizer):
        return "its codes are found by a linear layer, not by their distance"
    if not hasattr(tokenizer, "decoder"):
        return "it has no decoder"
    return ""


def diffusers_config(tokenizer: VQModel) -> dict[str, Any]:
    """config.json of the VQModel that a tokenizer is."""
    shape = tokenizer.shape
    attends = [level in shape.attention_levels for level in range(len(shape.multipliers))]
    return {
        "_class_name": "VQModel",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": [
            "AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D" for attention in attends
        ],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D"
            for attention in reversed(attends)
        ],
        "block_out_channels": shape.widths,
        "layers_per_block": shape.residual_blocks,
        "act_fn": "silu",
        "latent_channels": shape.z_channels,
        "sample_size": tokenizer.image_size,
        "num_vq_embeddings": tokenizer.codebook_size,
        "norm_num_groups": GROUPS,
        "vq_embed_dim": tokenizer.to_code.out_channels,
        "norm_type": "group",
        "mid_block_add_attention": True,
        # So that `decode` takes codes.
        "lookup_from_codebook": True,
    }


def diffusers_state(tokenizer: VQModel) -> dict[str, Tensor]:
    """The tensors of that VQModel."""
    state = _state(tokenizer, DIFFUSERS)
    return {
        name: tensor.flatten(1) if LINEAR.search(name) else tensor for name, tensor in state.items()
    }


def chameleon_config(tokenizer: VQModel) -> dict[str, Any]:
    """`vq_config` of the Chameleon that sees with a tokenizer's encoder."""
    shape = tokenizer.shape
    return {
        "embed_dim": tokenizer.to_code.out_channels,
        "num_embeddings": tokenizer.codebook_size,
        "latent_channels": shape.z_channels,
        "resolution": tokenizer.image_size,
        "base_channels": shape.channels,
        "channel_multiplier": list(shape.multipliers),
        "num_res_blocks": shape.residual_blocks,
        "attn_resolutions": [tokenizer.image_size >> level for level in shape.attention_levels],
    }


def chameleon_state(tokenizer: VQModel) -> dict[str, Tensor]:
    """The encoder's tensors as a Chameleon names them."""
    state = _state(tokenizer, TAMING)
    return {
        f"model.vqmodel.{name}": tensor
        for name, tensor in state.items()
        if not name.startswith("decoder.")
    }


def _state(tokenizer: VQModel, layout: TensorNames) -> dict[str, Tensor]:
    shape: Architecture = tokenizer.shape
    normalized = isinstance(tokenizer.quantizer, LookupQuantizer) and tokenizer.quantizer.normalized
    result = {}
    for name, tensor in tokenizer.state_dict().items():
        if name.startswith("quantizer.") and name != CODEBOOK:
            continue  # moving averages, which only training needs
        if name == CODEBOOK and normalized:
            tensor = F.normalize(tensor, dim=-1)
        result[layout.published(name, len(shape.multipliers))] = tensor.contiguous()
    return result
