"""Trained decoders are read from their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cm3leon.models.pretrained import load_model
from cm3leon.models.transformer import Transformer
from cm3leon.types import UserError
from cm3leon.weights import save_weights

SECTION = {"name": "cm3leon_tiny", "layers": 2, "width": 32, "head_size": 16, "seq_len": 24}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Transformer]:
    """A run folder with a decoder in it, and the decoder."""
    torch.manual_seed(0)
    config = Transformer.Config(layers=2, width=32, head_size=16, seq_len=24)
    model = Transformer(config, vocab_size=50)
    torch.nn.init.normal_(model.head.weight)

    folder = tmp_path / "run" / "pretraining"
    folder.mkdir(parents=True)
    save_weights(folder / "model.safetensors", model)
    (folder / "config.json").write_text(json.dumps({"model": SECTION, "vocab_size": 50}))
    return tmp_path / "run", model


@torch.no_grad()
def test_it_is_the_same_decoder(saved: tuple[Path, Transformer]) -> None:
    run, model = saved
    ids_BT = torch.arange(20)[None]

    before = torch.random.get_rng_state()
    for folder in (run, str(run / "pretraining")):
        loaded = load_model(folder)
        assert not loaded.training
        assert torch.equal(loaded(ids_BT), model(ids_BT))
    assert torch.equal(torch.random.get_rng_state(), before)

    half = load_model(run, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_mistakes_are_said(saved: tuple[Path, Transformer], tmp_path: Path) -> None:
    folder = saved[0] / "pretraining"

    def refused(sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            load_model(saved[0])

    with pytest.raises(UserError, match=r"none holds no trained model: .*config.json is missing"):
        load_model(tmp_path / "none")

    # A config that is damaged, or does not fit the weights beside it.
    for content, sentence in (
        ("{", "config.json is damaged: it is not JSON"),
        ("[]", r"config.json is \[\]; it must be an object"),
        (
            json.dumps({"model": SECTION, "vocab_size": -1}),
            "vocab_size is -1; it must be a positive whole number",
        ),
        (
            json.dumps({"model": {"name": "cm3leom"}, "vocab_size": 50}),
            "cm3leom, which is not a known model; did you",
        ),
        (
            json.dumps({"model": {**SECTION, "layers": 3}, "vocab_size": 50}),
            "model.safetensors lacks blocks.2.",
        ),
        (
            json.dumps({"model": SECTION, "vocab_size": 51}),
            "has another shape for embedding.weight, head.weight",
        ),
    ):
        (folder / "config.json").write_text(content)
        refused(sentence)

    # The config is right again, and the weights are wrong or gone.
    (folder / "config.json").write_text(json.dumps({"model": SECTION, "vocab_size": 50}))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    refused("lacks blocks.0")
    (folder / "model.safetensors").unlink()
    refused("there are no weights at")
