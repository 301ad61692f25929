"""The model that others would use: transformers' OPT, with the weights of ours. No script."""

from __future__ import annotations

from typing import Any

from cm3leon.models.opt import OPT, to_opt_config
from cm3leon.models.transformer import Transformer


def to_opt(model: Transformer, **config: Any) -> Any:
    """Build an `OPTForCausalLM` in evaluation mode of our model.

    Args:
        config: further arguments of `OPTConfig`.
    """
    state = dict(OPT.to_state(model.state_dict(), model.config))
    return OPT.build(state, {**to_opt_config(model.config, model.vocab_size), **config})
