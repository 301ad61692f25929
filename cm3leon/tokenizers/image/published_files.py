"""Read tensors by name from published files: safetensors, files of `torch.save`, HF folders.

No code from a file is ever run.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cm3leon.io import read_json
from cm3leon.permissions import check_readable
from cm3leon.types import UserError
from cm3leon.weights import check_no_adapter


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, whose values are not read yet."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    def read(self, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Read its values in that precision; None = its own.

        The values are copied, because a mapped file may change.
        """
        return self.load().to(dtype, copy=True)


@dataclass(frozen=True)
class Weights:
    """Published weights at a path."""

    path: Path
    files: Sequence[Path]
    tensors: Mapping[str, Stored]
    settings: Mapping[str, Any]
    """Content of config.json; empty for a single file."""

    def read(self) -> Mapping[str, Tensor]:
        """Return a mapping that reads a tensor on access, in its own precision, and keeps none."""
        return _Read(self.tensors)


class _Read(Mapping[str, Tensor]):
    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].read(dtype=None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
"""Files of weights in a Hugging Face folder, of which the first that exists is read.

Each may be split into parts, with an index beside them.
"""


def open_weights(path: Path, *, adapter_allowed: bool = False) -> Weights:
    """Read the names and shapes of all tensors of a file or a Hugging Face folder.

    Values are read later, one tensor at a time.

    Args:
        path: the file or folder.
        adapter_allowed: whether the caller merges an adapter that lies beside the weights.

    Raises:
        UserError: for a path that does not exist or may not be read, a file that is no checkpoint
            or would run code, and a folder without its config.json or some of its weights, or with
            an adapter beside them.
    """
    check_readable(path)
    if path.is_file():
        return Weights(path, (path,), _stored(path), {})
    if not path.is_dir():
        raise UserError(f"there are no weights at {path}")
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} has no config.json, so it is not a Hugging Face folder; "
            "give the file of weights itself"
        )
    if not adapter_allowed:
        check_no_adapter(path)

    settings = _json(path / "config.json")
    files = _weight_files(path)
    tensors: dict[str, Stored] = {}
    for file in files:
        tensors |= _stored(file)
    return Weights(path, (path / "config.json", *files), tensors, settings)


def _weight_files(folder: Path) -> list[Path]:
    """Find the first of `WEIGHT_FILES` in a folder, whole or in parts."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]

        # The index names parts; a name that leads out of the folder is refused.
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = sorted(set(read_json(index, {"weight_map": {str: str}})["weight_map"].values()))
            for part in parts:
                if Path(part).name != part or not (folder / part).is_file():
                    raise UserError(f"{index} names {part}, which must be a file beside it")
            return [folder / part for part in parts]

    raise UserError(
        f"{folder} has no weights; it must hold one of {', '.join(WEIGHT_FILES)}, "
        "or an index of its parts"
    )


def _json(file: Path) -> dict[str, Any]:
    check_readable(file)
    return read_json(file)


def _stored(file: Path) -> dict[str, Stored]:
    check_readable(file)
    if file.suffix == ".safetensors":
        return _safetensors(file)
    return _torch_saved(file)


def _safetensors(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "pt") as content:
            names = list(content.keys())
            shapes = {key: tuple(content.get_slice(key).get_shape()) for key in names}
    except SafetensorError:
        raise UserError(f"{file} is not a safetensors file, or is damaged") from None
    return {key: Stored(shape, partial(_safetensor, file, key)) for key, shape in shapes.items()}


def _safetensor(file: Path, key: str) -> Tensor:
    with safe_open(file, "pt") as content:
        return content.get_tensor(key)


class _Unused:
    """Replaces an object in a checkpoint that is not needed here."""

    def __init__(self, *args: object) -> None:
        pass


def _harmless() -> list[Any]:
    """List the classes that trainers save beside their weights and that cannot run code.

    taming-transformers' checkpoints have a class of Lightning as the key of a callback's state, and
    metrics as numpy numbers. LlamaGen's trainer saves its command line, which may hold paths.
    Classes of Lightning and paths are replaced by `_Unused`; the others are plain data. Python 3.13
    and numpy 2 moved some of them, so these are listed under both names.
    """
    # What pickles of numpy's numbers and arrays call.
    functions = []
    for value, name in ((np.float64(0), "scalar"), (np.zeros(0), "_reconstruct")):
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            functions.append((value.__reduce__()[0], f"{module}.{name}"))
    numbers = [type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSU"]

    # What only describes the training, and is replaced.
    paths = []
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
            paths.append((_Unused, f"{module}.{name}"))
    lightning = [
        (_Unused, f"{package}.callbacks.model_checkpoint.ModelCheckpoint")
        for package in ("pytorch_lightning", "lightning.pytorch")
    ]
    return [argparse.Namespace, np.dtype, np.ndarray, *numbers, *functions, *paths, *lightning]


AVERAGES = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict")
"""Keys of moving averages of the weights in a checkpoint, which are preferred to the weights.

LlamaGen's `reconstruction_vq_ddp.py`, which computes its tokenizers' figures, prefers `ema` to
`model`, as do DiT's scripts and those of many detectors. LlamaGen's sampling scripts read `model`,
from files that have nothing else.
"""
LATEST = ("state_dict", "model")
"""Keys of the weights after the last step."""


def _torch_saved(file: Path) -> dict[str, Stored]:
    """List the tensors of a file of `torch.save`.

    The file is mapped, so the state of an optimizer in it is never read.
    """
    try:
        with torch.serialization.safe_globals(_harmless()):
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
        TypeError,
    ) as error:
        # torch names what a pickle would call, if that is why it was refused.
        code = re.search(r"GLOBAL (\S+)|but got <class '(\S+)'>", str(error))
        if code:
            raise UserError(
                f"{file} is a pickle that names code ({code[1] or code[2]}), which could do "
                "anything, and is not opened; save its tensors alone, best as safetensors"
            ) from None
        raise UserError(
            f"{file} is not a checkpoint that torch.save wrote, or is damaged"
        ) from None

    tensors = _published(file, content) if isinstance(content, dict) else {}
    if not tensors:
        raise UserError(
            f"{file} holds no tensors by name, neither under {', '.join((*LATEST, *AVERAGES))} "
            "nor at its top"
        )
    return {
        key: Stored(tuple(tensor.shape), partial(_itself, tensor))
        for key, tensor in tensors.items()
    }


def _published(file: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Pick the tensors of a checkpoint that its publisher uses: averages replace their weights.

    Raises:
        UserError: for averages with other names than the weights beside them, because it is not
            clear what they are averages of.
    """
    latest = next((name for name in LATEST if isinstance(content.get(name), dict)), None)
    average = next((name for name in AVERAGES if content.get(name)), None)
    if average is None:
        return _tensors(content if latest is None else content[latest])

    # Some write the averages in a module of their own: {"ema": {"module": ...}}.
    averages = content[average]
    if isinstance(averages, dict) and isinstance(averages.get("module"), dict):
        averages = averages["module"]
    averages = _tensors(averages) if isinstance(averages, dict) else {}
    if latest is None and averages:
        return averages

    # Averages of parameters alone leave the buffers to the weights beside them.
    weights = _tensors(content if latest is None else content[latest])
    unknown = sorted(averages.keys() - weights.keys())
    if not averages or unknown:
        raise UserError(
            f"{file} holds averages of its weights under {average} that are not named as its "
            f"weights are{f' ({unknown[0]})' if unknown else ''}; save the tensors to be used "
            "alone, best as safetensors"
        )
    return weights | averages


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in content.items() if isinstance(tensor, Tensor)}


def _itself(tensor: Tensor) -> Tensor:
    return tensor
