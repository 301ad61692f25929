"""Tensors by name, as they lie in published files: safetensors, what `torch.save` wrote, Hugging Face folders.

Nothing here runs code from a file.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cm3leon.types import UserError


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    def read(self) -> Tensor:
        """Its values in float32, in memory of their own: a mapped file would change under a model that shares it."""
        return self.load().to(torch.float32, copy=True)


@dataclass(frozen=True)
class Weights:
    """What is published at a path."""

    path: Path
    files: Sequence[Path]
    tensors: Mapping[str, Stored]
    settings: Mapping[str, Any]
    """Of config.json, empty for a single file."""


WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
"""In a Hugging Face folder, the first that is there; any may be in parts, with an index beside them."""


def open_weights(path: Path) -> Weights:
    """Names and shapes of all tensors of a file or a Hugging Face folder; values are read one by one, when asked for.

    Raises:
        UserError: for a path at which there is nothing, a file that is no checkpoint or would run code, and a folder
            without its config.json or some of its weights.
    """
    if path.is_file():
        return Weights(path, (path,), _stored(path), {})
    if not path.is_dir():
        raise UserError(f"there are no weights at {path}")
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} has no config.json, so it is no Hugging Face folder; give the file of weights itself"
        )
    settings = _json(path / "config.json")
    files = _weight_files(path)
    tensors = {key: tensor for file in files for key, tensor in _stored(file).items()}
    return Weights(path, (path / "config.json", *files), tensors, settings)


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = sorted(set(_json(index).get("weight_map", {}).values()))
            for part in parts:
                if Path(part).name != part or not (folder / part).is_file():
                    raise UserError(f"{index} names {part}, which is no file beside it")
            return [folder / part for part in parts]
    raise UserError(
        f"{folder} has no weights; it must hold one of {', '.join(WEIGHT_FILES)}, or an index of its parts"
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object")
    return content


def _stored(file: Path) -> dict[str, Stored]:
    return _safetensors(file) if file.suffix == ".safetensors" else _torch_saved(file)


def _safetensors(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "pt") as content:
            shapes = {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118
    except SafetensorError:
        raise UserError(f"{file} is not a safetensors file, or is damaged") from None
    return {key: Stored(shape, partial(_safetensor, file, key)) for key, shape in shapes.items()}


def _safetensor(file: Path, key: str) -> Tensor:
    with safe_open(file, "pt") as content:
        return content.get_tensor(key)


class _Unused:
    """Stands for what a checkpoint names beside its weights, and nothing here needs."""


# Lightning's checkpoints of taming-transformers have the first one as the key of a callback's state; LlamaGen's trainer
# adds its command line. Neither is run: the first is replaced, the second is plain data.
HARMLESS: list[Any] = [
    (_Unused, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    argparse.Namespace,
]


def _torch_saved(file: Path) -> dict[str, Stored]:
    """Tensors of what `torch.save` wrote; the file is mapped, so that an optimizer's state in it is never read."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(
                f"{file} is a pickle that names code ({code[1]}), which could do anything, and is not opened; save its "
                "tensors alone, best as safetensors"
            ) from None
        raise UserError(
            f"{file} is not a checkpoint that torch.save wrote, or is damaged"
        ) from None
    for name in ("state_dict", "model", "ema"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    tensors = (
        {k: t for k, t in content.items() if isinstance(t, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not tensors:
        raise UserError(
            f"{file} holds no tensors by name, neither under state_dict, model or ema nor at its top"
        )
    return {
        key: Stored(tuple(tensor.shape), partial(_itself, tensor))
        for key, tensor in tensors.items()
    }


def _itself(tensor: Tensor) -> Tensor:
    return tensor
