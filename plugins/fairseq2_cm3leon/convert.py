"""The decoder's weights under fairseq2's names, and back; pure functions of tensors.

ours                          fairseq2's TransformerLM
embedding.weight   (V, D)     decoder_frontend.embed.weight
positions.weight   (T, D)     decoder_frontend.pos_encoder.weight (T + 1, D), whose first row is for padding: zeros
blocks.0.qkv.weight (3D, D)   decoder.layers.0.self_attn.{q,k,v}_proj.weight (D, D) each
blocks.0.out.weight (D, D)    decoder.layers.0.self_attn.output_proj.weight
blocks.0.up.weight (mD, D)    decoder.layers.0.ffn.inner_proj.weight
blocks.0.down.weight (D, mD)  decoder.layers.0.ffn.output_proj.weight
head.weight        (V, D)     final_proj.weight
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

POSITIONS = ("positions.weight", "decoder_frontend.pos_encoder.weight")
OUTER = {"embedding.weight": "decoder_frontend.embed.weight", "head.weight": "final_proj.weight"}
INNER = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.output_proj",),
    "up": ("ffn.inner_proj",),
    "down": ("ffn.output_proj",),
}
"""A matrix of our layers, and those of fairseq2 that its rows are split into."""


def to_fairseq2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the model's weights as in a TransformerLM; `from_fairseq2` is the inverse."""
    theirs = {name: state[ours] for ours, name in OUTER.items()}
    positions_TD = state[POSITIONS[0]]
    theirs[POSITIONS[1]] = torch.cat(
        [positions_TD.new_zeros(1, positions_TD.shape[1]), positions_TD]
    )
    for layer in range(_layers(state, r"blocks\.(\d+)\.")):
        for ours, names in INNER.items():
            weight = state[f"blocks.{layer}.{ours}.weight"]
            # Parts of a matrix are copied, so that none shares its memory with another.
            for name, part in zip(names, weight.chunk(len(names)), strict=True):
                theirs[f"decoder.layers.{layer}.{name}.weight"] = (
                    part.clone() if len(names) > 1 else part
                )
    return theirs


def from_fairseq2(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a TransformerLM as in our model; the position table's row for padding
    is left out."""
    state = {ours: theirs[name] for ours, name in OUTER.items()}
    state[POSITIONS[0]] = theirs[POSITIONS[1]][1:].clone()
    for layer in range(_layers(theirs, r"decoder\.layers\.(\d+)\.")):
        for ours, names in INNER.items():
            parts = [theirs[f"decoder.layers.{layer}.{name}.weight"] for name in names]
            state[f"blocks.{layer}.{ours}.weight"] = (
                torch.cat(parts) if len(parts) > 1 else parts[0]
            )
    return state


def _layers(state: Mapping[str, Tensor], pattern: str) -> int:
    """The number of layers, by the names of the weights."""
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))
