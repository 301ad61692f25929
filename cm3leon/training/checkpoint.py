"""Training checkpoints: folders `step_000123`, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cm3leon.training.average import WeightAverage
from cm3leon.weights import check_fit, read_weights


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
    state: dict[str, Any],
    keep: int,
) -> None:
    """Writes `folder/step_<step>` and deletes all but the newest `keep`.

    The files are complete and on the disk before the folder gets its name, so a kill at any instant leaves the older
    checkpoint, never half of this one. `state` must be JSON.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f".partial_{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(partial / "model.safetensors", module)
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    if average:
        save_file(average.state_dict(), partial / "average.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, **state}))
    for file in partial.iterdir():
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, the oldest first."""
    return sorted(folder.glob("step_*"))


def load_checkpoint(
    path: Path,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
    device: torch.device,
) -> dict[str, Any]:
    """Restores all three in place; returns the saved state with its `step`."""
    load_weights(path / "model.safetensors", module)
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True, map_location=device))
    if average:
        average.load_state_dict(load_file(path / "average.safetensors"))
    return json.loads((path / "state.json").read_text())


def save_weights(path: Path, module: nn.Module) -> None:
    """Parameters and buffers as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}, path)


def load_weights(path: Path, module: nn.Module) -> None:
    """Reads what `save_weights` wrote.

    Raises:
        UserError: for a file that is missing or damaged, or naming the keys or shapes that do not fit the module.
    """
    given = read_weights(path)
    check_fit(path, given, module.state_dict())
    module.load_state_dict(given)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
