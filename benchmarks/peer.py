"""The peer that others would use: transformers' OPT with the weights of a decoder of ours. No script of its own."""

from __future__ import annotations

from typing import Any

from cm3leon.models.opt import OPT, to_opt_config
from cm3leon.models.transformer import Transformer


def to_opt(model: Transformer, **config: Any) -> Any:
    """The decoder as an `OPTForCausalLM` in evaluation mode; `config` goes to `OPTConfig`."""
    state = dict(OPT.to_state(model.state_dict(), model.config))
    return OPT.build(state, {**to_opt_config(model.config, model.vocab_size), **config})
