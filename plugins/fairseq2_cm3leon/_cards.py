"""Asset cards: what fairseq2 has to know to load what a run has made."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from fairseq2.assets import AssetCard

from cm3leon.models.transformer import Transformer
from cm3leon.plugins.fairseq2_cm3leon._families import FAMILY, CM3LeonConfig
from cm3leon.registry import MODELS
from cm3leon.search import open_run
from cm3leon.types import UserError


def asset_card(folder: Path) -> AssetCard:
    """The card of a run, named as its folder is."""
    entries = card_entries(folder)
    return AssetCard(entries.pop("name"), entries)


def card_entries(folder: Path) -> dict[str, Any]:
    """What the card says, as it is written in a YAML file of fairseq2's asset store.

    Raises:
        UserError: for a folder that is no run, or whose model is not of this family.
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
    trained = folder / "pretraining" / "config.json"
    if trained.is_file():
        content = json.loads(trained.read_text())
        name = content["model"]["name"]
        if not issubclass(MODELS.get(name), Transformer):
            raise UserError(f"{trained}: the model {name} is not of the family {FAMILY}")
        given = {**content["model"], "vocab_size": content["vocab_size"]}
        entries["model_family"] = FAMILY
        entries["model_config"] = {field.name: given[field.name] for field in fields(CM3LeonConfig)}
        entries["checkpoint"] = str(trained.with_name("model.safetensors"))
    return entries
