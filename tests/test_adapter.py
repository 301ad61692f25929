"""Adapters of PEFT are merged as their formula says or refused, and never silently left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cm3leon.models.adapter import PREFIX, has_adapter, merge_adapter
from cm3leon.models.pretrained import load_model
from cm3leon.types import UserError
from cm3leon.weights import check_no_adapter

Q, V = "model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.1.self_attn.v_proj"
TABLE, HEAD = "model.decoder.embed_tokens", "lm_head"
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights() -> dict[str, Tensor]:
    """Weights of a model: two square matrices, a table and a head.

    A square matrix would hide a transposition if only shapes were compared.
    """
    return {
        f"{Q}.weight": random(5, 5, seed=0),
        f"{V}.weight": random(5, 5, seed=1),
        f"{TABLE}.weight": random(7, 5, seed=2),
        f"{HEAD}.weight": random(7, 5, seed=3),
    }


def matrices(module: str, rank: int = 2) -> dict[str, Tensor]:
    """An adapter's two matrices for a square layer."""
    return {
        f"{PREFIX}{module}.lora_A.weight": random(rank, 5, seed=10),
        f"{PREFIX}{module}.lora_B.weight": random(5, rank, seed=11),
    }


def write(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    """Write an adapter's settings and tensors into the folder."""
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("settings", "rank", "scale"),
    [
        ({}, 2, 3.0),
        ({"use_rslora": True}, 2, 6 / 2**0.5),
        ({"rank_pattern": {"q_proj": 3}}, 3, 2.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 1}}, 2, 0.5),
        ({"alpha_pattern": {f"^{Q}": 1}}, 2, 0.5),
        ({"alpha_pattern": {"v_proj": 1, "proj": 5}}, 2, 3.0),
        ({"alpha_pattern": {"^q_proj": 1}}, 2, 3.0),  # means a module that has no parent
        ({"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 12}}, 3, 4.0),
    ],
)
def test_a_linear_layer(tmp_path: Path, settings: dict[str, Any], rank: int, scale: float) -> None:
    given, adapter = weights(), matrices(Q, rank)
    merged = merge_adapter(write(tmp_path, adapter, **settings), given)

    # The formula number by number: W + scale * B A.
    first, second = (adapter[f"{PREFIX}{Q}.lora_{name}.weight"] for name in "AB")
    expected = given[f"{Q}.weight"].clone()
    for row in range(5):
        for column in range(5):
            for r in range(rank):
                expected[row, column] += scale * second[row, r] * first[r, column]

    torch.testing.assert_close(merged[f"{Q}.weight"], expected)
    for name in given.keys() - {f"{Q}.weight"}:
        assert torch.equal(merged[name], given[name])


def test_an_embedding_and_weights_that_were_trained_whole(tmp_path: Path) -> None:
    given, head = weights(), random(7, 5, seed=20)
    first, second = random(2, 7, seed=21), random(5, 2, seed=22)
    adapter = {
        f"{PREFIX}{TABLE}.lora_embedding_A": first,
        f"{PREFIX}{TABLE}.lora_embedding_B": second,
        f"{PREFIX}{TABLE}.base_layer.weight": torch.ones(7, 5),  # saved where the vocabulary grew
        f"{PREFIX}{HEAD}.weight": head,
    }

    merged = merge_adapter(write(tmp_path, adapter), given)

    # Token by token, as an embedding computes its vector.
    for token in range(7):
        expected = torch.ones(5) + 3.0 * (second @ first[:, token])
        torch.testing.assert_close(merged[f"{TABLE}.weight"][token], expected)
    assert torch.equal(merged[f"{HEAD}.weight"], head)


def test_the_weights_keep_their_precision_and_a_bin_file_will_do(tmp_path: Path) -> None:
    adapter = matrices(Q)
    write(tmp_path, adapter)
    whole = merge_adapter(tmp_path, weights())[f"{Q}.weight"]

    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(adapter, tmp_path / "adapter_model.bin")
    half = {name: weight.half() for name, weight in weights().items()}
    merged = merge_adapter(tmp_path, half)[f"{Q}.weight"]

    assert merged.dtype == torch.float16
    torch.testing.assert_close(merged.float(), whole, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"peft_type": "LOHA"},
            r'peft_type is "LOHA"; only LORA is merged here: merge it with PEFT',
        ),
        ({"use_dora": True}, r"use_dora asks for DoRA, which"),
        ({"lora_bias": True}, r"lora_bias asks for"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out asks for"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices asks for"),
        ({"bias": "all"}, r'bias is "all"'),
        ({"init_lora_weights": "pissa"}, r'init_lora_weights is "pissa", which changes'),
        ({"r": 0}, r"r is 0; it must be a positive number"),
        ({"r": 3}, r"lora_A\.weight has the shape \(2, 5\) .* gives them the rank 3"),
        ({"lora_alpha": "x"}, r'lora_alpha is "x"'),
        ({"lora_alpha": None}, r"lora_alpha is null"),
        ({"rank_pattern": [1]}, r"rank_pattern must be a JSON object"),
        ({"alpha_pattern": {"(a+)+$": 1}}, r'alpha_pattern has "\(a\+\)\+\$"; only names'),
    ],
)
def test_other_adapters_are_refused(
    tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        merge_adapter(write(tmp_path, matrices(Q), **settings), weights())


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (
            matrices("model.decoder.layers.9.fc1"),
            r"changes model.*fc1\.weight, which the model does",
        ),
        ({f"{PREFIX}{Q}.lora_A.weight": torch.ones(2, 5)}, r"lacks model.*q_proj\.lora_B\.weight"),
        ({f"{PREFIX}{Q}.lora_B.weight": torch.ones(5, 2)}, r"lacks model.*q_proj\.lora_A\.weight"),
        ({f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(5)}, r"magnitude.*cannot be merged"),
        (
            {**matrices(Q), f"{PREFIX}{Q}.lora_B.weight": torch.ones(6, 2)},
            r"tensor of shape \(6, 5\); the model's has the shape \(5, 5\)",
        ),
        ({f"{PREFIX}{HEAD}.weight": torch.ones(9, 5)}, r"tensor of shape \(9, 5\)"),
        ({f"{PREFIX}{Q}.bias": torch.ones(5)}, r"q_proj\.bias, which the model does not have"),
    ],
)
def test_tensors_that_fit_no_weight_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        merge_adapter(write(tmp_path, tensors), weights())


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    assert not has_adapter(tmp_path)
    write(tmp_path, matrices(Q))

    config = (tmp_path / "adapter_config.json").read_text()
    for broken in ("{", "[]"):
        (tmp_path / "adapter_config.json").write_text(broken)
        with pytest.raises(UserError, match="is not a JSON object"):
            merge_adapter(tmp_path, weights())

    # One file of the two is missing: first the settings, then the weights.
    (tmp_path / "adapter_config.json").unlink()
    assert has_adapter(tmp_path)
    with pytest.raises(UserError, match=r"an adapter without its adapter_config\.json"):
        merge_adapter(tmp_path, weights())

    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="but neither of adapter_model"):
        merge_adapter(tmp_path, weights())


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_lora_weights.safetensors"])
def test_where_adapters_are_not_merged_they_are_refused(tmp_path: Path, name: str) -> None:
    check_no_adapter(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("{}")
    for check in (check_no_adapter, load_model):
        with pytest.raises(UserError, match=f"holds {name}, an adapter that is not merged"):
            check(tmp_path)
