"""Read and write files of named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cm3leon.io import atomic
from cm3leon.paths import naming
from cm3leon.permissions import check_readable, use_umask
from cm3leon.types import NotFinite, UserError


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all, with the mode that the umask gives.

    Args:
        path: the file.
        tensors: tensors by name.
        metadata: texts for the file's header.

    Raises:
        OSError: for a full disk or a folder that is not writable. No part of the file is left.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path, sync=True) as partial:
        with naming(path):
            save_file(held, partial, None if metadata is None else dict(metadata))
        use_umask(partial)


def save_weights(path: Path, module: nn.Module | Mapping[str, Tensor]) -> None:
    """Write parameters and buffers, of a module or by name, as safetensors."""
    state = module.state_dict() if isinstance(module, nn.Module) else module
    save_tensors(path, state)


def load_weights(path: Path, module: nn.Module) -> None:
    """Read what `save_weights` wrote.

    Raises:
        UserError: for a file that is missing or damaged, or naming the keys or shapes that do not
            fit the module.
    """
    given = read_weights(path)
    check_fit(path, given, module.state_dict())
    module.load_state_dict(given)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, .safetensors or PyTorch's own format; code in it is never run.

    Raises:
        UserError: for a file that is missing, may not be read, is damaged, or holds anything but
            named tensors.
        NotFinite: naming a tensor that holds NaN or infinite numbers.
    """
    check_readable(path)
    if not path.is_file():
        raise UserError(f"there are no weights at {path}")
    safe = path.suffix == ".safetensors"
    try:
        weights = (
            load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        )
    # torch.load raises many kinds of errors for files that are cut off or in another format.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as {'safetensors' if safe else 'weights saved by PyTorch'}"
        ) from error
    if not isinstance(weights, Mapping) or not all(
        isinstance(weight, Tensor) for weight in weights.values()
    ):
        raise UserError(f"{path} must hold tensors by their names, and nothing else")
    for name, tensor in weights.items():
        check_finite(tensor, f"{path}: the tensor {name}")
    return dict(weights)


def read_rows(path: Path, rows: Mapping[str, tuple[Tensor, int]]) -> None:
    """Read some rows of a safetensors file's tensors into other tensors, in the precision of those.

    Args:
        path: the file.
        rows: name -> the tensor to read into, and the index of its first row in the file's tensor.

    Raises:
        UserError: for a file that is missing, may not be read or is damaged, or lacks a tensor or
            its rows.
        NotFinite: naming a tensor whose rows hold NaN or infinite numbers.
    """
    with _opened(path) as file:
        for name, (own, first) in rows.items():
            if own.numel():
                given = file.get_slice(name)[first : first + len(own)]
                check_finite(given, f"{path}: the tensor {name}")
                own.copy_(given)


def shapes_of(path: Path) -> dict[str, Tensor]:
    """Read the shapes of a safetensors file's tensors, as tensors on the meta device.

    Raises:
        UserError: for a file that is missing, may not be read or is damaged.
    """
    with _opened(path) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_readable(path)
    if not path.is_file():
        raise UserError(f"there are no weights at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors") from error


def is_finite(tensor: Tensor) -> bool:
    """Tell whether no entry is NaN or infinite, in one pass and without a copy of the tensor."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True  # tensors on the meta device have no entries
    if tensor.element_size() == 1:  # torch does not compute in 8 bits
        tensor = tensor.float()
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor.detach()))


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise NotFinite for a tensor with an entry that is NaN or infinite; `what` names it."""
    if not is_finite(tensor):
        raise NotFinite(
            f"{what} holds numbers that are NaN or infinite: "
            "the training that made it diverged, or it is damaged"
        )


def check_fit(path: Path, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError unless a file's tensors have the wanted names and shapes."""
    for what, names in (
        ("lacks", wanted.keys() - given.keys()),
        ("has the unknown", given.keys() - wanted.keys()),
        (
            "has another shape for",
            {n for n in given.keys() & wanted.keys() if given[n].shape != wanted[n].shape},
        ),
    ):
        if names:
            raise UserError(
                f"{path} {what} {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
            )


ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Files of an adapter of PEFT."""
OTHER_ADAPTERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
"""Files of an adapter of diffusers."""


def check_no_adapter(folder: Path) -> None:
    """Raise UserError for a folder of weights with an adapter, which would be silently ignored."""
    for name in (*ADAPTERS, *OTHER_ADAPTERS):
        if (folder / name).exists():
            raise UserError(
                f"{folder} holds {name}, an adapter that is not merged into its weights; merge it "
                "(PEFT: model.merge_and_unload(), diffusers: fuse_lora()) and save the model, or "
                "take the file away"
            )
