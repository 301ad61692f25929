"""The precision that `auto` means in a training: chosen once, recorded, and kept on resume."""

from __future__ import annotations

from pathlib import Path

import torch

from cm3leon.io import read_json, write_json
from cm3leon.training.device import uses_bf16
from cm3leon.training.distributed import Ranks
from cm3leon.training.steps import checkpoints
from cm3leon.types import TrainingPrecision

FILE = "precision.json"

NARROWEST = {"avx512": 128, "amx": 256}
"""Widths of a model from which bf16 autocast is faster than float32 on a CPU, by its instructions
for bf16."""


def chosen_precision(
    precision: TrainingPrecision, folder: Path, ranks: Ranks, *, width: int | None = None
) -> TrainingPrecision:
    """The precision of the training in `folder`; for auto, the one that it started with.

    The choice follows a rule and not a clock, so that it is always the same on one machine. It is
    recorded, so that a training continues as it started even on another machine. All ranks must
    call it.

    Args:
        width: of the model that is trained; None for other networks, whose auto depends on the
            processor only.
    """
    if precision != "auto":
        return precision
    chosen: TrainingPrecision = "float32"
    if ranks.first:
        path = folder / FILE
        if path.is_file():
            chosen = read_json(path, {"precision": str})["precision"]
        else:
            # A training that was begun before there was such a file went by the processor alone.
            begun = bool(checkpoints(folder))
            chosen = faster(ranks.device, None if begun else width)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"precision": chosen})
    return ranks.gather(chosen)[0]


def faster(device: torch.device, width: int | None) -> TrainingPrecision:
    """bf16 or float32, whichever is faster on the device; in a narrow model casting costs more than
    bf16 saves."""
    if not uses_bf16(device, "auto"):
        return "float32"
    if device.type == "cpu" and width is not None:
        kind = "amx" if torch.cpu._is_amx_tile_supported() else "avx512"
        return "bf16" if width >= NARROWEST[kind] else "float32"
    return "bf16"
