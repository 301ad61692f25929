"""The model `llama` in the form of transformers' Chameleon.

A `ChameleonForConditionalGeneration` also carries the encoder of its image tokenizer, under
`model.vqmodel`; `tokenizers/image/published.py` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cm3leon.models.form import Form
from cm3leon.models.llama import Llama
from cm3leon.types import UserError

FIXED = {
    "model_type": "chameleon",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
"""Settings of a Chameleon that `llama` can compute."""


def from_llama_config(
    settings: Mapping[str, Any], fixed: Mapping[str, Any], rope_theta: float
) -> dict[str, Any]:
    """Translate settings that transformers' models of Llama's layers share into `Llama.Config`.

    Args:
        settings: of the config, complete with its defaults.
        fixed: settings that may have one value only.
        rope_theta: default for settings that do not give it.

    Raises:
        UserError: for another shape, naming the key and its allowed value.
    """
    for key, allowed in fixed.items():
        if settings[key] != allowed:
            raise UserError(
                f"{key} is {json.dumps(settings[key])}; it must be {json.dumps(allowed)}"
            )

    # Newer versions of transformers collect everything about rotary positions under one key.
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise UserError(f'rope_parameters.rope_type is {json.dumps(kind)}; it must be "default"')

    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    if width % heads:
        raise UserError(f"num_attention_heads is {heads}; it must divide hidden_size {width}")
    kv_heads = settings["num_key_value_heads"]
    return {
        "layers": settings["num_hidden_layers"],
        "width": width,
        "head_size": width // heads,
        "kv_heads": None if kv_heads in (None, heads) else kv_heads,
        "mlp_width": settings["intermediate_size"],
        "seq_len": settings["max_position_embeddings"],
        "rope_theta": float(rope.get("rope_theta", settings.get("rope_theta", rope_theta))),
        "norm_eps": settings["rms_norm_eps"],
        "init_std": settings["initializer_range"],
    }


def from_chameleon_config(chameleon: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a Chameleon's config into fields of `Llama.Config`.

    Args:
        chameleon: the config with all defaults of `ChameleonConfig`.

    Raises:
        UserError: for a Chameleon of another shape, naming the key and its allowed value.
    """
    norm = "behind" if chameleon["swin_norm"] else "before"
    return {**from_llama_config(chameleon, FIXED, 10_000.0), "norm": norm}


def to_llama_config(config: Llama.Config, vocab_size: int) -> dict[str, Any]:
    """Invert `from_llama_config`, and add the number of ids."""
    heads = config.width // config.head_size
    return {
        "vocab_size": vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.kv_heads or heads,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.init_std,
    }


def to_chameleon_config(config: Llama.Config, vocab_size: int) -> dict[str, Any]:
    """Return the arguments of `ChameleonConfig` for a model of that shape.

    Raises:
        UserError: for a model without norms of queries and keys, which a Chameleon always has.
    """
    if not config.qk_norm:
        raise UserError(
            "model.qk_norm is false; it must be true for a Chameleon, which normalises its queries "
            "and keys"
        )
    return {
        **{key: value for key, value in FIXED.items() if key != "model_type"},
        **to_llama_config(config, vocab_size),
        "swin_norm": config.norm == "behind",
    }


LAYER = {
    "qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "out.weight": ("self_attn.o_proj.weight",),
    "gate.weight": ("mlp.gate_proj.weight",),
    "up.weight": ("mlp.up_proj.weight",),
    "down.weight": ("mlp.down_proj.weight",),
    "attention_norm.weight": ("input_layernorm.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
}
"""Names of a layer's weights in transformers' models of Llama's layers, by our names."""

CHAMELEON = Form(
    name="llama",
    model_class="ChameleonForConditionalGeneration",
    config_class="ChameleonConfig",
    layer="model.layers",
    outer={
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
    inner={
        **LAYER,
        "q_norm.weight": ("self_attn.q_norm.weight",),
        "q_norm.bias": ("self_attn.q_norm.bias",),
        "k_norm.weight": ("self_attn.k_norm.weight",),
        "k_norm.bias": ("self_attn.k_norm.bias",),
    },
    fixed=FIXED,
    to_config=to_chameleon_config,
    from_config=from_chameleon_config,
    defaults={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "num_key_value_heads": None,
        "swin_norm": False,
    },
    extra={
        "vq_config": {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1},
        "vocabulary_map": {"<image>": 1},
    },
)
