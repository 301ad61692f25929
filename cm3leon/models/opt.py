"""The decoder as Hugging Face's OPT, which computes the same function (paper section 3.1).

Weights only move and change their names, so the way there and back is exact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from cm3leon.models.adapter import has_adapter, merge_adapter
from cm3leon.models.transformer import Transformer
from cm3leon.permissions import check_folder_readable
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import UserError
from cm3leon.weights import ADAPTERS

TOLERANCE = 1e-5
"""Largest difference allowed between the logits of both forms, in units of the largest logit or of 1."""
POSITION_OFFSET = 2
"""OPT's position table begins with two rows that no token of a sequence reads."""

POSITIONS = ("positions.weight", "model.decoder.embed_positions.weight")
OUTER = {"embedding.weight": "model.decoder.embed_tokens.weight", "head.weight": "lm_head.weight"}
INNER = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.out_proj",),
    "up": ("fc1",),
    "down": ("fc2",),
}
"""A matrix of our block, and OPT's matrices that its rows are split into."""

FIXED = {
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
    "tie_word_embeddings": False,
}
"""What makes an OPT this decoder."""


def to_opt_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's weights under OPT's names; `from_opt_state` is the inverse.

    `blocks.0.qkv.weight` (3D, D) becomes `q_proj`, `k_proj` and `v_proj` (D, D) of layer 0; the position table
    (T, D) gains two rows of zeros on top.
    """
    opt = {theirs: state[ours] for ours, theirs in OUTER.items()}
    positions_TD = state[POSITIONS[0]]
    opt[POSITIONS[1]] = torch.cat(
        [positions_TD.new_zeros(POSITION_OFFSET, positions_TD.shape[1]), positions_TD]
    )
    for name, weight in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.weight", name):
            layer, names = match[1], INNER[match[2]]
            for theirs, part in zip(names, weight.chunk(len(names)), strict=True):
                opt[_opt_name(layer, theirs)] = part.contiguous()
    return opt


def from_opt_state(opt: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """OPT's weights under the decoder's names; the two unused rows of the position table are left out."""
    state = {ours: opt[theirs] for ours, theirs in OUTER.items()}
    state[POSITIONS[0]] = opt[POSITIONS[1]][POSITION_OFFSET:].contiguous()
    for layer in range(layers):
        for ours, names in INNER.items():
            parts = [opt[_opt_name(layer, theirs)] for theirs in names]
            state[f"blocks.{layer}.{ours}.weight"] = (
                torch.cat(parts) if len(parts) > 1 else parts[0]
            )
    return state


def to_opt_config(config: Transformer.Config, vocab_size: int) -> dict[str, Any]:
    """Arguments of `OPTConfig` for a decoder of that shape."""
    return {
        **{
            key: value
            for key, value in FIXED.items()
            if key not in ("model_type", "_remove_final_layer_norm")
        },
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
    """Fields of the decoder that an OPT is, from the OPT's config with all its defaults.

    Dropout is not looked at: it has no weights.

    Raises:
        UserError: for an OPT of another shape, naming the key and its allowed value.
    """
    width, heads, hidden = (
        _whole(opt, key) for key in ("hidden_size", "num_attention_heads", "ffn_dim")
    )
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


def _opt_name(layer: int | str, name: str) -> str:
    return f"model.decoder.layers.{layer}.{name}.weight"


def to_opt(model: Transformer, **config: Any) -> Any:
    """The decoder as an `OPTForCausalLM` in evaluation mode; `config` goes to `OPTConfig`.

    Loaded, not built: below version 5, transformers fails to initialise norms without weights.
    """
    library = transformers()
    opt_config = library.OPTConfig(**to_opt_config(model.config, model.vocab_size), **config)
    state = to_opt_state(model.state_dict())
    return library.OPTForCausalLM.from_pretrained(None, config=opt_config, state_dict=state).eval()


@torch.inference_mode()
def verify(model: Transformer, opt: Any) -> None:
    """Raises RuntimeError if both do not give the same logits for random ids."""
    shape = (2, min(model.config.seq_len, 64))
    ids_BT = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    # The mask is said aloud: left to itself, `generate` takes a <pad> inside a sequence for padding.
    ours_BTV, theirs_BTV = model(ids_BT), opt(ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    difference = float((ours_BTV - theirs_BTV).abs().max())
    allowed = TOLERANCE * max(1.0, float(ours_BTV.abs().max()))
    if not difference <= allowed:  # so that NaN does not pass
        raise RuntimeError(
            f"the logits of the two forms differ by {difference:.2g}, {allowed:.2g} is allowed"
        )


def load_opt(folder: Path) -> Any:
    """The OPT of a folder, float32, in evaluation mode, with the adapter that PEFT may have left beside it merged.

    Raises:
        UserError: for weights that are missing, may not be read or do not fit, and an adapter that cannot be merged.
    """
    check_folder_readable(folder)
    with _without_adapter(folder) as plain:
        try:
            opt, report = transformers().OPTForCausalLM.from_pretrained(
                plain, local_files_only=True, output_loading_info=True
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = str(error).replace(str(plain), str(folder))
            raise UserError(f"hf: the weights in {folder} cannot be loaded: {reason}") from error

    # The library fills missing weights with random numbers, and leaves unknown ones out.
    for what, keys in (("lack", "missing_keys"), ("have the unknown", "unexpected_keys")):
        names = sorted(report[keys])
        if names:
            raise UserError(
                f"hf: the weights in {folder} {what} {', '.join(names[:5])}{', ...' if names[5:] else ''}"
            )
    opt = opt.float().eval()
    if has_adapter(folder):
        opt.load_state_dict(merge_adapter(folder, opt.state_dict()))
    return opt


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """A folder as if it held no adapter: the library applies one only if PEFT is installed, and never merges it."""
    if not has_adapter(folder):
        yield folder
        return
    with TemporaryDirectory() as made:
        for file in folder.iterdir():
            if file.name not in ADAPTERS:
                (Path(made) / file.name).symlink_to(file.resolve())
        yield Path(made)


def transformers() -> Any:
    """The library, imported when it is needed: it is large, and nothing else asks for it."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "export needs the package transformers; install it with: pip install transformers"
        ) from error
    return transformers
