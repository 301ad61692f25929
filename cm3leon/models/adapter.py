"""LoRA adapters as PEFT saves them, merged into the weights that they belong to.

    W + scale * (B A),   scale = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA

An adapter consists of `adapter_config.json` and `adapter_model.safetensors` (or `.bin`). Each
tensor is named after the module that it changes:

    base_model.model.NAME.lora_A.weight      (r, in)    of a linear layer, with
    base_model.model.NAME.lora_B.weight      (out, r)
    base_model.model.NAME.lora_embedding_A   (r, V)     of an embedding, with
    base_model.model.NAME.lora_embedding_B   (D, r)
    base_model.model.NAME.weight             a weight that was trained whole (`modules_to_save`);
                                             it replaces the model's
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cm3leon.permissions import check_readable
from cm3leon.types import UserError
from cm3leon.weights import ADAPTERS, read_weights

PREFIX = "base_model.model."
PAIRS = {"linear": ("A.weight", "B.weight"), "embedding": ("embedding_A", "embedding_B")}
"""Names of a module's two matrices, A and B.

An embedding's product B A has the shape (D, V) and is transposed for its table (V, D).
"""
NOT_MERGED = {
    "fan_in_fan_out": "transposed weights",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "biases of its own",
    "alora_invocation_tokens": "adapters that tokens switch on",
    "trainable_token_indices": "single trained tokens",
    "target_parameters": "parameters that are no module's",
}
"""PEFT's settings for adapters that merge by another formula, with their names in messages."""
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` under which PEFT leaves the model's own weights as they are."""


def has_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter of PEFT, or a part of one."""
    return any((folder / name).exists() for name in ADAPTERS)


def merge_adapter(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights, in their own precision, with the folder's adapter merged into them.

    Raises:
        UserError: for an adapter that lacks a file, is of another kind than LoRA, or has a tensor
            that fits no weight.
    """
    settings = _settings(folder)
    adapter = {
        name.removeprefix(PREFIX): tensor.float() for name, tensor in _tensors(folder).items()
    }
    matrices = {name for name in adapter if ".lora_" in name}

    # Weights that were trained whole go first, since PEFT may have adapted them on top.
    merged = dict(weights)
    for name in sorted(adapter.keys() - matrices):
        weight = name.replace(".base_layer.", ".")
        _check_fits(folder, weight, adapter[name], merged)
        merged[weight] = adapter[name].to(merged[weight].dtype)

    # Each remaining module has a pair of matrices of one rank.
    for module, kind in sorted({_module_of(folder, name) for name in matrices}):
        names = [f"{module}.lora_{name}" for name in PAIRS[kind]]
        for name in names:
            if name not in adapter:
                raise UserError(f"{folder}: the adapter lacks {name}")
        first, second = (adapter[name] for name in names)
        rank = _of_module(settings, "r", "rank_pattern", module)
        if first.shape[0] != rank or second.shape[1] != rank:
            raise UserError(
                f"{folder}: {names[0]} has the shape {tuple(first.shape)} and {names[1]} the shape "
                f"{tuple(second.shape)}; {ADAPTERS[0]} gives them the rank {rank}"
            )

        # W + scale * (B A), added in float32.
        alpha = _of_module(settings, "lora_alpha", "alpha_pattern", module)
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        change = scale * (second @ first)
        if kind == "embedding":
            change = change.T
        weight = f"{module}.weight"
        _check_fits(folder, weight, change, merged)
        merged[weight] = (merged[weight].float() + change).to(merged[weight].dtype)
    return merged


def _settings(folder: Path) -> dict[str, Any]:
    """Read the adapter's configuration, and refuse one that `merge_adapter` cannot merge."""
    file = folder / ADAPTERS[0]
    if not file.is_file():
        raise UserError(f"{folder} holds an adapter without its {ADAPTERS[0]}")
    check_readable(file)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{file} is not a JSON object")

    merge = "merge it with PEFT (model.merge_and_unload()) and save the model"
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{file}: peft_type is {json.dumps(settings.get('peft_type'))}; "
            f"only LORA is merged here: {merge}"
        )
    for key, what in NOT_MERGED.items():
        if settings.get(key):
            raise UserError(f"{file}: {key} asks for {what}, which are not merged here; {merge}")
    if settings.get("bias", "none") != "none":
        raise UserError(
            f"{file}: bias is {json.dumps(settings['bias'])}; "
            "it must be none, as the model has no biases"
        )

    # Some ways to initialise the matrices change the weights below them, which are not in the file.
    start = settings.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise UserError(
            f"{file}: init_lora_weights is {json.dumps(start)}, "
            f"which changes the weights below it as well; {merge}"
        )

    # Rank and alpha may differ between modules; PEFT finds a module's by a pattern of its name.
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        of_modules = settings.setdefault(pattern, {}) or {}
        if not isinstance(of_modules, dict):
            raise UserError(f"{file}: {pattern} must be a JSON object")
        for value in (settings.get(key), *of_modules.values()):
            if type(value) not in (int, float) or (key == "r" and value < 1):
                raise UserError(
                    f"{file}: {key} is {json.dumps(value)}; it must be a positive number"
                )
        for name in of_modules:
            if not re.fullmatch(r"\^?[\w.]+", name):
                raise UserError(
                    f"{file}: {pattern} has {json.dumps(name)}; "
                    f"only names of modules are read here: {merge}"
                )
    return settings


def _tensors(folder: Path) -> dict[str, Tensor]:
    for name in ADAPTERS[1:]:
        if (folder / name).exists():
            return read_weights(folder / name)
    raise UserError(f"{folder} holds {ADAPTERS[0]}, but neither of {', '.join(ADAPTERS[1:])}")


def _module_of(folder: Path, name: str) -> tuple[str, str]:
    """Return the name of the module that a matrix changes, and its kind, a key of `PAIRS`."""
    module, _, matrix = name.rpartition(".lora_")
    for kind, pair in PAIRS.items():
        if matrix in pair:
            return module, kind
    raise UserError(f"{folder}: the adapter has {name}, which cannot be merged")


def _of_module(settings: Mapping[str, Any], key: str, pattern: str, module: str) -> float:
    """Return a module's setting: of the first pattern that its name ends with, or the general one.

    A pattern that begins with ^ is the module's whole name.
    """
    for name, value in (settings[pattern] or {}).items():
        whole = name.removeprefix("^")
        if module == whole or (whole == name and module.endswith(f".{name}")):
            return value
    return settings[key]


def _check_fits(folder: Path, name: str, tensor: Tensor, weights: Mapping[str, Tensor]) -> None:
    shape = tuple(tensor.shape)
    if name not in weights:
        raise UserError(f"{folder}: the adapter changes {name}, which the model does not have")
    if weights[name].shape != shape:
        raise UserError(
            f"{folder}: the adapter changes {name} by a tensor of shape {shape}; "
            f"the model's has the shape {tuple(weights[name].shape)}"
        )
