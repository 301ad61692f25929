"""Every backend of the attention against the formula: outputs and gradients, documents packed, padded and alone."""

from __future__ import annotations

import math
import re
import sys
import types
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cm3leon.models import attention
from cm3leon.models.attention import Attention, choose, packed_mask, run_lengths
from cm3leon.models.transformer import Transformer
from cm3leon.registry import ATTENTIONS
from cm3leon.types import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
A, E = 2, 8

packed = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)
"""Lengths of the samples of each row."""


def places(rows: list[list[int]]) -> Tensor:
    """sample_BT of such rows, with padding behind all but the longest."""
    T = max(map(sum, rows))
    sample_BT = torch.full((len(rows), T), -1)
    for row, lengths in enumerate(rows):
        numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        sample_BT[row, : len(numbers)] = numbers
    return sample_BT


def tensors(
    B: int, T: int, dtype: torch.dtype = torch.float64, device: torch.device = CPU
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, A, T, E, generator=generator, dtype=dtype).to(device).requires_grad_()
        for _ in range(3)
    ]


def by_formula(q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor, sample_BT: Tensor) -> Tensor:
    """Position by position: each sees those before it, and itself, that have its number."""
    rows = []
    for b in range(len(q_BATE)):
        outputs = []
        for t in range(q_BATE.shape[2]):
            seen = [s for s in range(t + 1) if sample_BT[b, s] == sample_BT[b, t]]
            scores_AS = (q_BATE[b, :, t, None] * k_BATE[b][:, seen]).sum(-1) / math.sqrt(E)
            weights_AS = scores_AS.exp() / scores_AS.exp().sum(-1, keepdim=True)
            outputs.append((weights_AS[..., None] * v_BATE[b][:, seen]).sum(1))
        rows.append(torch.stack(outputs, 1))
    return torch.stack(rows)


def with_gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    output = function(*inputs)
    weights = (
        torch.arange(output.numel(), dtype=output.dtype, device=output.device).view_as(output).sin()
    )
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


def assert_is_the_formula(backend: Attention, sample_BT: Tensor) -> None:
    inputs = tensors(*sample_BT.shape)
    found = with_gradients(lambda *qkv: backend(*qkv, backend.plan(sample_BT)), inputs)
    for one, other in zip(
        found, with_gradients(lambda *qkv: by_formula(*qkv, sample_BT), inputs), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["naive", "sdpa"])
@given(rows=packed)
@settings(max_examples=25)
def test_outputs_and_gradients_are_the_formulas(name: str, rows: list[list[int]]) -> None:
    assert_is_the_formula(ATTENTIONS.build(name), places(rows))


def test_samples_one_by_one_are_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU in long blocks."""
    monkeypatch.setattr(attention, "LONG", 8)
    for rows in ([[8]], [[3, 5], [2]], [[1, 1, 1], [2, 6], [8]], [[4, 4], [4, 5]]):
        assert isinstance(attention.Sdpa().plan(places(rows)), list)
        assert_is_the_formula(attention.Sdpa(), places(rows))


@pytest.mark.parametrize("name", ["naive", "sdpa"])
def test_no_plan_means_one_sample_a_row(name: str) -> None:
    backend, inputs = ATTENTIONS.build(name), tensors(2, 7)
    found = with_gradients(lambda *qkv: backend(*qkv, None), inputs)
    expected = with_gradients(lambda *qkv: by_formula(*qkv, torch.zeros(2, 7)), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rows", [[[5]], [[3, 4], [2]], [[1, 1, 1], [2, 6]]])
@torch.no_grad()
def test_flex_has_the_same_outputs(rows: list[list[int]]) -> None:
    """Its gradients need CUDA."""
    backend, sample_BT = ATTENTIONS.build("flex"), places(rows)
    inputs = [tensor.detach().float() for tensor in tensors(*sample_BT.shape)]
    expected = by_formula(*inputs, sample_BT)
    torch.testing.assert_close(
        backend(*inputs, backend.plan(sample_BT)), expected, atol=1e-5, rtol=1e-5
    )
    alone = by_formula(*inputs, torch.zeros_like(sample_BT))
    torch.testing.assert_close(backend(*inputs, None), alone, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ xformers


class Mask:
    """Stands for BlockDiagonalCausalMask, as its documentation has it."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int]) -> Mask:
        return cls(q_seqlen)


def stand_in(query: Tensor, key: Tensor, value: Tensor, attn_bias: Mask) -> Tensor:
    """memory_efficient_attention by its formula: (1, N, A, E) with the samples one after the other."""
    assert query.shape[:2] == (1, sum(attn_bias.lengths))
    pieces = []
    for q, k, v in zip(*(x[0].split(attn_bias.lengths) for x in (query, key, value)), strict=True):
        scores_ATT = torch.einsum("tae,sae->ats", q, k) / math.sqrt(query.shape[3])
        hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        pieces.append(
            torch.einsum("ats,sae->tae", scores_ATT.masked_fill(hidden, -math.inf).softmax(-1), v)
        )
    return torch.cat(pieces)[None]


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module xformers that computes the formulas of the real one's documentation on any device."""
    modules = {
        name: types.ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha")
    }
    modules["xformers.ops.fmha.attn_bias"] = bias = types.ModuleType("xformers.ops.fmha.attn_bias")
    bias.BlockDiagonalCausalMask = Mask  # type: ignore[attr-defined]
    modules["xformers.ops"].memory_efficient_attention = stand_in  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize("rows", [[[5]], [[3, 4], [2]], [[4, 3], [4, 3]], [[1, 1, 1], [2, 6], [8]]])
def test_xformers_is_given_the_samples_as_one_row(rows: list[list[int]]) -> None:
    assert_is_the_formula(ATTENTIONS.build("xformers"), places(rows))


@pytest.mark.cluster
@pytest.mark.skipif(find_spec("xformers") is None, reason="needs xformers")
class TestInstalledXformers:
    """What can be seen of the real one without a GPU."""

    def test_its_operators_load(self) -> None:
        assert attention._missing_of_xformers() == ""

    @pytest.mark.parametrize("rows", [[[5]], [[3, 4], [2]], [[1, 1, 1], [2, 6], [8]]])
    def test_its_mask_is_that_of_the_samples(self, rows: list[list[int]]) -> None:
        sample_BT = places(rows)
        mask_NN = attention.Xformers().plan(sample_BT).materialize((sample_BT.numel(),) * 2)
        expected_NN = torch.block_diag(*packed_mask(sample_BT)[:, 0].int()) == 1
        assert torch.equal(mask_NN == 0, expected_NN)
        assert torch.equal(mask_NN == -math.inf, ~expected_NN)


@given(rows=packed)
def test_run_lengths_are_the_samples_and_the_padding(rows: list[list[int]]) -> None:
    T = max(map(sum, rows))
    expected = [
        n for lengths in rows for n in [*lengths, *([T - sum(lengths)] if sum(lengths) < T else [])]
    ]
    assert run_lengths(places(rows)) == expected


# ------------------------------------------------------------------------------------------------ the choice


def decoder(attention: str) -> Transformer:
    torch.manual_seed(0)
    config = Transformer.Config(
        layers=2, width=32, head_size=8, seq_len=32, init_std=0.3, attention=attention
    )
    model = Transformer(config, vocab_size=20)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.double()


def logits_and_gradients(attention: str) -> list[Tensor]:
    model, sample_BT = decoder(attention), places([[5, 9], [3, 3, 3]])
    ids_BT = torch.arange(sample_BT.numel()).view_as(sample_BT) % 20
    logits_BTV = model(ids_BT, sample_BT=sample_BT)
    logits_BTV.sin().sum().backward()
    return [
        logits_BTV.detach(),
        *(weight.grad for weight in model.parameters() if weight.grad is not None),
    ]


@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize("attention", ["auto", "sdpa", "xformers"])
def test_the_whole_model_is_the_same_with_each(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ATTENTIONS.get("xformers"), "missing", staticmethod(lambda device: ""))
    choose.cache_clear()
    for one, other in zip(
        logits_and_gradients(attention), logits_and_gradients("naive"), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    choose.cache_clear()


def test_auto_takes_what_the_device_can_train_with(monkeypatch: pytest.MonkeyPatch) -> None:
    choose.cache_clear()
    assert choose("auto", CPU).name == "sdpa"
    for missing, expected in (
        ("", "xformers"),
        ("the package xformers", "flex (xformers lacks the package xformers)"),
    ):
        choose.cache_clear()
        monkeypatch.setattr(attention, "_missing_of_xformers", lambda missing=missing: missing)
        assert str(choose("auto", CUDA)) == expected
    choose.cache_clear()


def test_the_choice_says_why_others_were_not_taken() -> None:
    assert str(choose("auto", CPU)) == (
        "sdpa (xformers lacks a CUDA device: memory_efficient_attention has no operator elsewhere; "
        "flex lacks a CUDA device: FlexAttention has no gradients elsewhere)"
    )
    assert str(choose("naive", CPU)) == "naive"


class Operator:
    """Stands for an operator of xformers, loaded or not."""

    def __init__(self, loaded: bool) -> None:
        self.is_available = lambda: loaded


@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize(
    ("forward", "backward", "sentence"),
    [
        ([False, True], [True], ""),
        (
            [False, False],
            [True],
            r"an xformers whose operators load with torch \d.*: those of 9\.9 do not",
        ),
        (
            [True],
            [False],
            r"an xformers whose operators load with torch \d.*: those of 9\.9 do not",
        ),
    ],
)
def test_xformers_is_there_if_operators_of_both_passes_load(
    forward: list[bool], backward: list[bool], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    fmha = sys.modules["xformers.ops.fmha"]
    fmha.ALL_FW_OPS, fmha.ALL_BW_OPS = map(Operator, forward), map(Operator, backward)  # type: ignore[attr-defined]
    assert re.fullmatch(sentence, attention._missing_of_xformers.__wrapped__())


def test_xformers_that_does_not_import_is_answered_with_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    found = attention._missing_of_xformers.__wrapped__()
    assert re.fullmatch(
        r"an xformers that imports with torch \d.* \(ModuleNotFoundError: .*\)", found
    )


def test_xformers_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (
        attention._missing_of_xformers.__wrapped__()
        == "the package xformers (pip install xformers)"
    )


@pytest.mark.parametrize(
    ("name", "device", "sentence"),
    [
        (
            "xformers",
            CPU,
            "model.attention is xformers, which lacks a CUDA device: memory_efficient_attention has no",
        ),
        (
            "flex",
            CPU,
            "model.attention is flex, which lacks a CUDA device: FlexAttention has no gradients elsewhere",
        ),
    ],
)
def test_a_backend_that_cannot_run_is_refused(
    name: str, device: torch.device, sentence: str
) -> None:
    with pytest.raises(UserError) as refusal:
        choose(name, device)
    assert str(refusal.value).startswith(sentence)


def test_an_unknown_backend_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"^attention is xformer, which is not known; did you mean xformers\?"
    ):
        Transformer.Config(attention="xformer").check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sdpa", "flex", "xformers"])
def test_outputs_and_gradients_on_a_gpu(name: str) -> None:
    backend = ATTENTIONS.get(name)
    if backend.missing(CUDA):
        pytest.skip(f"needs {backend.missing(CUDA)}")
    sample_BT = places([[100, 156], [90, 30, 60]]).cuda()
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 2, 256, 64, generator=generator).bfloat16().cuda().requires_grad_()
        for _ in range(3)
    ]
    found = with_gradients(
        lambda *qkv: ATTENTIONS.build(name)(*qkv, ATTENTIONS.build(name).plan(sample_BT)), inputs
    )
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    naive = ATTENTIONS.build("naive")
    for one, other in zip(
        found, with_gradients(lambda *qkv: naive(*qkv, naive.plan(sample_BT)), exact), strict=True
    ):
        torch.testing.assert_close(one.double(), other, atol=0.05, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sdpa", "flex"])
@pytest.mark.parametrize("head_size", [64, 128])
def test_xformers_and_another_agree_on_a_gpu(name: str, head_size: int) -> None:
    """In bf16, over packed documents and padding."""
    if missing := ATTENTIONS.get("xformers").missing(CUDA):
        pytest.skip(f"needs {missing}")
    sample_BT = places([[600, 1, 423], [300, 500]]).cuda()
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, sample_BT.shape[1], head_size)
    inputs = [
        torch.randn(*shape, generator=generator).bfloat16().cuda().requires_grad_()
        for _ in range(3)
    ]
    results = []
    for backend in (ATTENTIONS.build("xformers"), ATTENTIONS.build(name)):
        plan = backend.plan(sample_BT)
        results.append(
            with_gradients(lambda *qkv, backend=backend, plan=plan: backend(*qkv, plan), inputs)
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)
