"""Between the files of a run and those of fairseq2: asset cards of what a run has made, and trained
weights back."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from fairseq2 import init_fairseq2
from fairseq2.assets import AssetCard
from fairseq2.composition import register_checkpoint_models
from fairseq2.runtime.dependency import DependencyContainer

from cm3leon.io import read_json, write_json
from cm3leon.models.transformer import Transformer
from cm3leon.plugins.fairseq2_cm3leon._families import (
    FAMILY,
    CM3LeonConfig,
    model_hub,
    register_families,
)
from cm3leon.plugins.fairseq2_cm3leon.convert import from_fairseq2
from cm3leon.registry import MODELS
from cm3leon.stages.files import WEIGHTS
from cm3leon.stages.opening import open_run
from cm3leon.types import UserError
from cm3leon.weights import save_weights


def asset_card(folder: Path) -> AssetCard:
    """The card of a run, named like its folder."""
    entries = card_entries(folder)
    return AssetCard(entries.pop("name"), entries)


def card_entries(folder: Path) -> dict[str, Any]:
    """The entries of a card, as in a YAML file of fairseq2's asset store.

    Raises:
        UserError: for a folder that is not a run's, or whose model is not of this family.
    """
    run = open_run(folder)
    folder = folder.resolve()
    vocab = run.vocab
    entries: dict[str, Any] = {
        "name": folder.name,
        "tokenizer_family": FAMILY,
        "tokenizer": str(folder / "text_tokenizer"),
        "tokenizer_config": {
            "text_size": vocab.text_size,
            "image_size": vocab.image_size,
            "sentinels": vocab.sentinels,
        },
        "dataset_family": FAMILY,
        "dataset_config": {"run": str(folder)},
    }

    # A run has a model only once it is trained.
    trained = folder / "pretraining" / "config.json"
    if trained.is_file():
        content = read_json(trained, {"model": {"name": str}, "vocab_size": int})
        name = content["model"]["name"]
        if not issubclass(MODELS.config_class(name), Transformer.Config):
            raise UserError(f"{trained}: the model {name} is not of the family {FAMILY}")
        given = {**content["model"], "vocab_size": content["vocab_size"]}
        entries["model_family"] = FAMILY
        entries["model_config"] = {field.name: given[field.name] for field in fields(CM3LeonConfig)}
        entries["checkpoint"] = str(trained.with_name(WEIGHTS))
    return entries


def export(output: Path, folder: Path) -> None:
    """Write the last checkpoint of fairseq2's trainer as our own files, `config.json` and
    `model.safetensors`.

    Raises:
        UserError: for a folder without a checkpoint of fairseq2's trainer of a model of this
            family.
    """
    checkpoints = output / "checkpoints"
    if not (checkpoints / "model.yaml").is_file() or not any(checkpoints.glob("step_*/model")):
        raise UserError(f"{output} holds no checkpoint of fairseq2's trainer")

    # fairseq2 loads a checkpoint like any model once it knows our family.
    def extras(container: DependencyContainer) -> None:
        register_families(container)
        register_checkpoint_models(container, checkpoints)

    init_fairseq2(extras=extras, no_progress=True)
    config = model_hub().get_model_config("last_checkpoint")
    state = from_fairseq2(
        model_hub().load_model("last_checkpoint", device=torch.device("cpu")).state_dict()
    )

    # The shape is written as our own training writes it, without what fairseq2 adds.
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS, state)
    shape = {name: getattr(config, name) for name in vars(Transformer.Config())}
    write_json(
        folder / "config.json",
        {"model": {"name": "cm3leon", **shape}, "vocab_size": config.vocab_size},
    )
