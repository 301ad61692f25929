"""The paper's model in the form of transformers' OPT, which computes the same (section 3.1)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cm3leon.models.form import Form
from cm3leon.models.transformer import Transformer
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import UserError

FIXED = {
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
    "tie_word_embeddings": False,
}
"""Settings of an OPT that the paper's model can compute."""


def to_opt_config(config: Transformer.Config, vocab_size: int) -> dict[str, Any]:
    """Return the arguments of `OPTConfig` for a model of that shape."""
    no_arguments = ("model_type", "_remove_final_layer_norm")
    return {
        **{key: value for key, value in FIXED.items() if key not in no_arguments},
        "vocab_size": vocab_size,
        "hidden_size": config.width,
        "word_embed_proj_dim": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.width // config.head_size,
        "ffn_dim": config.mlp_ratio * config.width,
        "max_position_embeddings": config.seq_len,
        "init_std": config.init_std,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "pad_token_id": Vocab.pad,
        "bos_token_id": Vocab.eos,  # one token opens and closes a sample
        "eos_token_id": Vocab.eos,
    }


def from_opt_config(opt: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an OPT's config, with all its defaults, into fields of `Transformer.Config`.

    Dropout has no weights and is ignored.

    Raises:
        UserError: for an OPT of another shape, naming the key and its allowed value.
    """
    width = _whole(opt, "hidden_size")
    heads = _whole(opt, "num_attention_heads")
    hidden = _whole(opt, "ffn_dim")
    opt = {"word_embed_proj_dim": width, **opt}
    for key, allowed in {**FIXED, "word_embed_proj_dim": width}.items():
        if opt[key] != allowed:
            raise UserError(f"{key} is {json.dumps(opt[key])}; it must be {json.dumps(allowed)}")
    if width < 1 or heads < 1 or width % heads:
        raise UserError(f"num_attention_heads is {heads}; it must divide hidden_size {width}")
    if hidden % width:
        raise UserError(f"ffn_dim is {hidden}; it must be a multiple of hidden_size {width}")

    return {
        "layers": _whole(opt, "num_hidden_layers"),
        "width": width,
        "head_size": width // heads,
        "mlp_ratio": hidden // width,
        "seq_len": _whole(opt, "max_position_embeddings"),
        "init_std": opt["init_std"],
    }


def _whole(opt: Mapping[str, Any], key: str) -> int:
    if type(opt[key]) is not int:
        raise UserError(f"{key} is {json.dumps(opt[key])}; it must be a whole number")
    return opt[key]


OPT = Form(
    name="cm3leon",
    model_class="OPTForCausalLM",
    config_class="OPTConfig",
    layer="model.decoder.layers",
    outer={
        "embedding.weight": "model.decoder.embed_tokens.weight",
        "positions.weight": "model.decoder.embed_positions.weight",
        "head.weight": "lm_head.weight",
    },
    inner={
        "qkv.weight": (
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
        ),
        "out.weight": ("self_attn.out_proj.weight",),
        "up.weight": ("fc1.weight",),
        "down.weight": ("fc2.weight",),
    },
    fixed=FIXED,
    to_config=to_opt_config,
    from_config=from_opt_config,
    defaults={
        "vocab_size": 50_272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "init_std": 0.02,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    # OPT's position table begins with two rows that no token of a sequence reads.
    unused_rows={"positions.weight": 2},
)
