"""Trained decoders from their files."""

from __future__ import annotations

from pathlib import Path

import torch

from cm3leon.io import read_json
from cm3leon.models.base import Model
from cm3leon.paths import path_of
from cm3leon.permissions import check_readable
from cm3leon.records import check_stage
from cm3leon.registry import MODELS, discover
from cm3leon.types import UserError
from cm3leon.weights import check_fit, check_no_adapter, read_weights

WEIGHTS = "model.safetensors"


def load_model(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Model:
    """A trained decoder in evaluation mode, from `config.json` and `model.safetensors`.

    Memory is taken once, for the weights as they are in the file, and nothing is drawn. Plugins that define the model
    have to be discovered first.

    Args:
        folder: of the two files, or a run folder, which has them in `pretraining/`.
        verify: compare the files with the checksums that a run has recorded of them.
        dtype: of the weights; None leaves them as they are, float32 after a training.

    Raises:
        UserError: for files that are missing or broken, a model that is not known, or weights that are not its own.
    """
    folder = path_of(folder, "folder")
    check_readable(folder)
    if not (folder / "config.json").is_file() and (folder / "pretraining").is_dir():
        folder = folder / "pretraining"
    file = folder / "config.json"
    check_readable(file)
    check_no_adapter(folder)
    if not file.is_file():
        raise UserError(f"{folder} holds no trained decoder, {file} is missing")
    if verify:
        check_stage(folder, (file.name, WEIGHTS), finished=False)
    content = read_json(file, {"model": dict, "vocab_size": int})
    section, vocab_size = content["model"], content["vocab_size"]
    if vocab_size < 1:
        raise UserError(f"{file}: vocab_size is {vocab_size}; it must be a positive whole number")
    discover()
    component = MODELS.check(section, f"{file}: model")
    with torch.device("meta"):
        model = MODELS.build(component, vocab_size=vocab_size)
    weights = read_weights(folder / WEIGHTS)
    check_fit(folder / WEIGHTS, weights, model.state_dict())
    model.load_state_dict(
        {name: weight.to(device, dtype) for name, weight in weights.items()}, assign=True
    )
    return model.eval()
