"""The guard in front of fairseq2, and the conversion of weights' names, which needs no fairseq2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_models import decoder

from cm3leon.models.base import Model
from cm3leon.models.lora import add_lora
from cm3leon.models.serving import keep_weights, share
from cm3leon.plugins.fairseq2_cm3leon import guard
from cm3leon.plugins.fairseq2_cm3leon.convert import from_fairseq2, to_fairseq2
from cm3leon.registry import MODELS, discover
from cm3leon.types import UserError

pytestmark = pytest.mark.stack

discover()

SIZES = {"name": "fairseq2_cm3leon", "layers": 1, "width": 16, "head_size": 8, "seq_len": 8}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the real packages, built for torch 2.9.1; importing any of them is an error."""
    for name in ("fairseq2", "fairseq2n", "soundfile"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('loaded')\n")
    (tmp_path / "fairseq2n/config.py").write_text('_TORCH_VERSION = "2.9.1+cu128"\n')
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("running", ["2.9.1", "2.9.1+cu128", "2.9.1+cpu"])
def test_the_same_version_of_torch_is_fine_whatever_its_build(running: str) -> None:
    assert guard.missing(running) == ""


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("running", ["2.9.0+cu128", "2.15.0+cu130", "2.9.10", "2.9.1a0+git"])
def test_another_version_is_refused_in_a_sentence_and_nothing_is_loaded(
    running: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", running)
    with pytest.raises(UserError) as refusal:
        MODELS.build(SIZES, vocab_size=10)
    assert str(refusal.value) == (
        f"model.name is fairseq2_cm3leon, which needs a fairseq2n built for torch {running}: "
        "the one installed was built for 2.9.1+cu128 (pip install 'cm3leon[cluster]')"
    )


@pytest.mark.parametrize("name", ["fairseq2", "fairseq2n", "soundfile"])
def test_a_package_that_is_not_installed_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda package: None if package == name else object()
    )
    with pytest.raises(UserError, match=rf"^this needs the package {name} \(pip install 'cm3leon"):
        guard.load()


def test_weights_go_to_fairseq2s_names_and_back() -> None:
    state = decoder(layers=3).state_dict()
    theirs = to_fairseq2(state)
    assert len(theirs) == 3 + 3 * 6

    # fairseq2's table of positions has one row more, for padding; query, key and value are apart.
    table_TD = theirs["decoder_frontend.pos_encoder.weight"]
    assert table_TD.shape == (33, 24)
    assert not table_TD[0].any()
    query_DD = theirs["decoder.layers.2.self_attn.q_proj.weight"]
    assert torch.equal(query_DD, state["blocks.2.qkv.weight"][:24])

    back = from_fairseq2(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], weight) for name, weight in state.items())


def test_what_needs_our_own_layers_says_so() -> None:
    other = Model()
    for call in (
        lambda: add_lora(other, 4, 8.0),
        lambda: keep_weights(other, "int8"),
        lambda: share(other, rank=0, count=2),
    ):
        with pytest.raises(UserError, match="a Model"):
            call()


def test_an_attention_that_fairseq2_does_not_have_is_answered_with_those_it_has() -> None:
    with pytest.raises(
        UserError, match=r"^model: attention is flex, which is not known; .*auto.*naive"
    ):
        MODELS.check({**SIZES, "attention": "flex"})
