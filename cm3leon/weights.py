"""Files of named tensors, whoever wrote them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cm3leon.types import NotFinite, UserError


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a file, .safetensors or PyTorch's own format, by name; no code of the file is run.

    Raises:
        UserError: for a file that is missing, cannot be read, or holds anything but named tensors.
        NotFinite: naming a tensor that holds NaN or infinite numbers.
    """
    if not path.is_file():
        raise UserError(f"there are no weights at {path}")
    safe = path.suffix == ".safetensors"
    try:
        weights = (
            load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (
        Exception
    ) as error:  # torch.load has many kinds for files that are cut off, or not its own
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


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. One pass, without a copy of the tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # torch does not compute in 8 bits
        tensor = tensor.float()
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor.detach()))


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises NotFinite, naming what it is, for a tensor with an entry that is NaN or infinite."""
    if not is_finite(tensor):
        raise NotFinite(
            f"{what} holds numbers that are NaN or infinite: the training that made it diverged, or it is damaged"
        )


def check_fit(path: Path, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises UserError if the tensors of a file lack some of those wanted, have others, or have other shapes."""
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
