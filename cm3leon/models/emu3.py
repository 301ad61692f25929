"""The model `llama` in the form of transformers' Emu3, which has no norms of queries and keys.

Emu3 is imported but not exported: its image tokenizer stays in the `image_tokenizer` of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cm3leon.models.chameleon import LAYER, from_llama_config, to_llama_config
from cm3leon.models.form import Form
from cm3leon.models.llama import Llama

FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
"""Settings of an Emu3 that `llama` can compute."""
DEFAULTS: Mapping[str, Any] = {
    **FIXED,
    "vocab_size": 184_622,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 9216,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
}
"""Defaults of transformers' `Emu3TextConfig`."""


def from_emu3_config(emu3: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an Emu3's config into fields of `Llama.Config`.

    Raises:
        UserError: for an Emu3 of another shape, naming the key and its allowed value.
    """
    settings = {**DEFAULTS, **(emu3.get("text_config") or {})}
    return {**from_llama_config(settings, FIXED, 1_000_000.0), "qk_norm": False}


def to_emu3_config(config: Llama.Config, vocab_size: int) -> dict[str, Any]:
    """Return the arguments of `Emu3Config` for a model of that shape."""
    return {"text_config": {**FIXED, **to_llama_config(config, vocab_size)}}


EMU3 = Form(
    name="llama",
    model_class="Emu3ForConditionalGeneration",
    config_class="Emu3Config",
    layer="model.text_model.layers",
    outer={
        "embedding.weight": "model.text_model.embed_tokens.weight",
        "norm.weight": "model.text_model.norm.weight",
        "head.weight": "lm_head.weight",
    },
    inner=LAYER,
    fixed={"model_type": "emu3"},
    to_config=to_emu3_config,
    from_config=from_emu3_config,
    defaults={},
    earlier={
        "text_model.model.": "model.text_model.",
        "text_model.lm_head.": "lm_head.",
        "vqmodel.": "model.vqmodel.",
    },
)
