"""Weights in one file or in several, as Hugging Face's libraries write them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from cm3leon.io import write_json
from cm3leon.weights import save_tensors

PART_BYTES = 5_000_000_000
"""Bytes of a file, unless a single tensor is larger; as much is held in memory."""
METADATA = {"format": "pt"}
"""What transformers and diffusers expect in the header of a file."""


def save_in_parts(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], part_bytes: int = PART_BYTES
) -> None:
    """Write `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with an index.

    Tensors are taken one after the other, and released when their file is written.
    """
    held: dict[str, Tensor] = {}
    size, total, written = 0, 0, list[list[str]]()

    def write() -> None:
        written.append(list(held))
        save_tensors(folder / f"{len(written)}.safetensors", held, METADATA)
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > part_bytes:
            write()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()

    # The files' names hold their number, which is known only now.
    if len(written) == 1:
        (folder / "1.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(written, 1):
        file = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
