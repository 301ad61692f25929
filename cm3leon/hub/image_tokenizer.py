"""An image tokenizer as diffusers' VQModel, and its encoder as the one that transformers' Chameleon
carries.

A codebook that is searched by cosine is exported with rows of length 1. Among rows of length 1, the
nearest by Euclidean distance has the largest cosine, whatever the length of the vector, since
|v - c|² = |v|² - 2 v·c + 1. So both libraries find and draw the same codes.
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
"""Names of 1x1 convolutions of ours that are linear layers in diffusers."""


def why_not_diffusers(tokenizer: ImageTokenizer) -> str:
    """Why a tokenizer cannot be exported as diffusers' VQModel, as a clause; "" if it can."""
    if not isinstance(tokenizer, VQModel):
        return "its networks are not those of a VQGAN"
    if not isinstance(tokenizer.quantizer, LookupQuantizer | EMAQuantizer):
        return "its codes are found by a linear layer, not by their distance"
    if not hasattr(tokenizer, "decoder"):
        return "it has no decoder"
    return ""


def diffusers_config(tokenizer: VQModel) -> dict[str, Any]:
    """config.json of a tokenizer as diffusers' VQModel."""
    shape = tokenizer.shape

    # The encoder goes down the levels, the decoder up again.
    down: list[str] = []
    up: list[str] = []
    for level in range(len(shape.multipliers)):
        attention = "Attn" if level in shape.attention_levels else ""
        down.append(f"{attention}DownEncoderBlock2D")
        up.insert(0, f"{attention}UpDecoderBlock2D")

    return {
        "_class_name": "VQModel",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": down,
        "up_block_types": up,
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
        # With this, `decode` takes codes.
        "lookup_from_codebook": True,
    }


def diffusers_state(tokenizer: VQModel) -> dict[str, Tensor]:
    """The tensors of a tokenizer as diffusers' VQModel."""
    state = _state(tokenizer, DIFFUSERS)
    for name, tensor in state.items():
        if LINEAR.search(name):
            state[name] = tensor.flatten(1)
    return state


def chameleon_config(tokenizer: VQModel) -> dict[str, Any]:
    """`vq_config` of a Chameleon that has a tokenizer's encoder."""
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
    """The encoder's tensors by Chameleon's names; a Chameleon has no image decoder."""
    encoder = {}
    for name, tensor in _state(tokenizer, TAMING).items():
        if not name.startswith("decoder."):
            encoder[f"model.vqmodel.{name}"] = tensor
    return encoder


def _state(tokenizer: VQModel, layout: TensorNames) -> dict[str, Tensor]:
    """A tokenizer's tensors by published names, without what only training needs."""
    shape: Architecture = tokenizer.shape
    normalized = isinstance(tokenizer.quantizer, LookupQuantizer) and tokenizer.quantizer.normalized
    result = {}
    for name, tensor in tokenizer.state_dict().items():
        if name.startswith("quantizer.") and name != CODEBOOK:
            continue  # moving averages
        if name == CODEBOOK and normalized:
            tensor = F.normalize(tensor, dim=-1)
        result[layout.published(name, len(shape.multipliers))] = tensor.contiguous()
    return result
