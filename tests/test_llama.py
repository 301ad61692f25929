"""Chameleon's model computes what transformers' own computes with the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cm3leon.models.chameleon import (
    CHAMELEON,
    from_chameleon_config,
    to_chameleon_config,
)
from cm3leon.models.llama import Llama, rotated, rotations
from cm3leon.registry import MODELS, discover
from cm3leon.types import UserError

pytestmark = pytest.mark.stack

V, T = 96, 20
IDS_BT = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))
SHAPES = pytest.mark.parametrize(
    ("norm", "kv_heads"), [("before", None), ("before", 2), ("behind", None), ("behind", 2)]
)


def decoder(**fields: Any) -> Llama:
    """A small model whose every parameter is random, also the scales of norms."""
    shape = {"layers": 3, "width": 64, "head_size": 16, "mlp_width": 88, "seq_len": 64}
    model = Llama(Llama.Config(**{**shape, **fields}), vocab_size=V)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        center = 1.0 if name.endswith("norm.weight") else 0.0
        torch.nn.init.normal_(parameter, mean=center, std=0.2, generator=generator)
    return model.eval()


def chameleon(model: Llama) -> Any:
    """transformers' Chameleon with the same weights; those of its image tokenizer do not matter."""
    library = pytest.importorskip("transformers")
    config = library.ChameleonConfig(
        **to_chameleon_config(model.config, V),
        vocabulary_map={"<image>": 1},
        vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1},
        attn_implementation="eager",
    )
    theirs = library.ChameleonForConditionalGeneration(config)

    state = dict(CHAMELEON.to_state(model.state_dict(), model.config))
    report = theirs.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert all(name.startswith("model.vqmodel.") for name in report.missing_keys)
    return theirs.eval()


def logits_of(theirs: Any, ids_BT: Tensor) -> Tensor:
    """Its hidden states times its head, as its own forward pass forbids image codes afterwards."""
    return theirs.lm_head(theirs.model(input_ids=ids_BT).last_hidden_state)


@SHAPES
def test_logits_and_gradients_are_those_of_transformers(norm: str, kv_heads: int | None) -> None:
    ours = decoder(norm=norm, kv_heads=kv_heads)
    theirs = chameleon(ours)
    ours_BTV, theirs_BTV = ours(IDS_BT), logits_of(theirs, IDS_BT)
    torch.testing.assert_close(ours_BTV, theirs_BTV, atol=2e-5, rtol=1e-5)

    for logits_BTV in (ours_BTV, theirs_BTV):
        torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten()
        ).backward()

    # Under our names: transformers keeps queries, keys and values apart.
    gradients = {
        name: weight.grad for name, weight in theirs.named_parameters() if weight.grad is not None
    }
    expected = dict(CHAMELEON.from_state(gradients, ours.config.layers))
    found = {name: weight.grad for name, weight in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-4, msg=name)


@SHAPES
@torch.inference_mode()
def test_packed_samples_are_those_of_transformers_alone(norm: str, kv_heads: int | None) -> None:
    ours = decoder(norm=norm, kv_heads=kv_heads)
    theirs = chameleon(ours)

    lengths = (5, 8, 7)
    sample_1T = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    position_1T = torch.cat([torch.arange(length) for length in lengths])[None]
    packed_1TV = ours(IDS_BT[:1], position_BT=position_1T, sample_BT=sample_1T)

    alone = [logits_of(theirs, ids_1T) for ids_1T in IDS_BT[:1].split(lengths, 1)]
    torch.testing.assert_close(packed_1TV, torch.cat(alone, 1), atol=2e-5, rtol=1e-5)


@SHAPES
@torch.inference_mode()
def test_cached_steps_are_those_of_transformers(norm: str, kv_heads: int | None) -> None:
    """One token at a time, after a prefix that two rows share."""
    ours = decoder(norm=norm, kv_heads=kv_heads)
    shared_T, tails_BT = IDS_BT[0, :6], IDS_BT[:2, 6:]
    whole_BTV = logits_of(chameleon(ours), torch.cat([shared_T.expand(2, 6), tails_BT], 1))

    # The prefix, then the first token of each row.
    cache = ours.new_cache(groups=1, width=2, prefix=6, tail=T)
    attend = cache.prefix_pass(torch.tensor([0]), torch.tensor([6]))
    ours(shared_T[None], position_BT=attend.positions(6), attend=attend)
    attend = cache.tail_pass(torch.tensor([0]), torch.tensor([[[0], [1]]]), torch.tensor([[1, 1]]))
    ours(tails_BT[:, :1], position_BT=attend.positions(1), attend=attend)

    for t in range(1, tails_BT.shape[1]):
        attend = cache.step_pass(1, 6, T, tokens=1)
        step_B1V = ours(tails_BT[:, t : t + 1], position_BT=attend.positions(1), attend=attend)
        expected_B1V = whole_BTV[:, 6 + t : 7 + t]
        torch.testing.assert_close(step_B1V, expected_B1V, atol=2e-5, rtol=1e-5)
        cache.tail_length_R += 1


def test_rotated_heads_depend_on_distances_alone() -> None:
    """RoPE, equation 16: a product of query and key depends on their distance alone.

    It is that of complex numbers, of which the query is turned by the distance, here 7 for both
    pairs of positions.
    """
    q_E, k_E = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    position_BT = torch.tensor([[3, 10, 40, 47]])
    cos, sin = (each.double() for each in rotations(position_BT, 8, 100.0))
    q_TE = rotated(q_E.expand(1, 1, 4, 8), (cos, sin))[0, 0].double()
    k_TE = rotated(k_E.expand(1, 1, 4, 8), (cos, sin))[0, 0].double()

    angle_E = 7 / 100.0 ** (torch.arange(0, 8, 2) / 8)
    complex_q, complex_k = (torch.complex(x_E[:4], x_E[4:]) for x_E in (q_E, k_E))
    turn = torch.polar(torch.ones(4), angle_E).to(complex_q)
    expected = (complex_q * turn * complex_k.conj()).real.sum()
    for query, key in ((1, 0), (3, 2)):
        torch.testing.assert_close(q_TE[query] @ k_TE[key], expected, atol=1e-5, rtol=1e-5)


@SHAPES
def test_config_and_weights_come_back_as_they_went(norm: str, kv_heads: int | None) -> None:
    model = decoder(norm=norm, kv_heads=kv_heads)
    there = chameleon(model).config.to_dict()
    assert Llama.Config(**from_chameleon_config(there)) == model.config
    theirs = dict(CHAMELEON.to_state(model.state_dict(), model.config))
    back = dict(CHAMELEON.from_state(theirs, 3))
    assert all(torch.equal(weight, back[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; it must be "silu"'),
        ({"attention_bias": True}, "attention_bias is true; it must be false"),
        ({"rope_parameters": {"rope_type": "yarn"}}, 'rope_type is "yarn"; it must be "default"'),
        ({"num_attention_heads": 3}, "num_attention_heads is 3; it must divide hidden_size 64"),
    ],
)
def test_another_shape_is_refused(change: dict[str, Any], sentence: str) -> None:
    there = chameleon(decoder()).config.to_dict()
    with pytest.raises(UserError, match=sentence):
        from_chameleon_config({**there, **change})


@pytest.mark.parametrize("name", ["chameleon_7b", "chameleon_34b"])
def test_the_presets_are_chameleons(name: str) -> None:
    """They have as many weights as transformers' class without its image tokenizer.

    That class's default is the 7B.
    """
    library = pytest.importorskip("transformers")
    discover()
    with torch.device("meta"):
        ours = MODELS.build(name, vocab_size=65_536)
        config = library.ChameleonConfig(
            **to_chameleon_config(ours.config, 65_536), vocabulary_map={"<image>": 1}
        )
        theirs = library.ChameleonForConditionalGeneration(config)

    def count(model: Any) -> int:
        weights = [w.numel() for key, w in model.named_parameters() if "vqmodel" not in key]
        return sum(weights)

    assert count(ours) == count(theirs)

    # Fields that both have, as transformers 4 writes those of its positions otherwise.
    if name == "chameleon_7b":
        default = library.ChameleonConfig().to_dict()
        ours_there = to_chameleon_config(ours.config, 65_536)
        shared = default.keys() & ours_there.keys()
        assert {"num_key_value_heads", "intermediate_size", "swin_norm"} <= shared
        assert {key: default[key] for key in shared} == {key: ours_there[key] for key in shared}
