"""Load trained models from their files."""

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
    """Load a trained model in evaluation mode, from `config.json` and `model.safetensors`.

    Memory is allocated once, for the weights as they are in the file, and no random numbers are
    drawn. Models of plugins are found, too.

    Args:
        folder: holds the two files, or is a run folder with them in `pretraining/`.
        device: where the weights go.
        dtype: precision of the weights; None keeps that of the file, which is float32 after a
            training.
        verify: compare the files with the checksums that the run recorded.

    Raises:
        UserError: for missing or broken files, an unknown model, or weights of another model.
    """
    folder = path_of(folder, "folder")
    check_readable(folder)
    if not (folder / "config.json").is_file() and (folder / "pretraining").is_dir():
        folder = folder / "pretraining"
    file = folder / "config.json"
    check_readable(file)
    check_no_adapter(folder)
    if not file.is_file():
        raise UserError(f"{folder} holds no trained model: {file} is missing")
    if verify:
        check_stage(folder, (file.name, WEIGHTS), finished=False)

    content = read_json(file, {"model": dict, "vocab_size": int})
    section, vocab_size = content["model"], content["vocab_size"]
    if vocab_size < 1:
        raise UserError(f"{file}: vocab_size is {vocab_size}; it must be a positive whole number")

    # The model is built without memory, which the weights of the file then bring along.
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
