"""Every backend of the attention against the formula: its outputs and its gradients.

Documents come packed into rows, padded, and alone. Kernels that need a GPU are checked by stand-ins
for the package around them, so that all of the project's own code runs on a CPU.
"""

from __future__ import annotations

import math
import re
import sys
import types
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cm3leon.models import attention, packed
from cm3leon.models.attention import Attention, choose, packed_mask, run_lengths
from cm3leon.models.packed import Packing, packed_attention, packing_of
from cm3leon.models.transformer import Transformer
from cm3leon.registry import ATTENTIONS
from cm3leon.types import UserError

pytestmark = pytest.mark.stack

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
A, E = 2, 8

packings = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)
"""Lengths of the samples of each row."""


def sample_numbers(rows: list[list[int]]) -> Tensor:
    """sample_BT of rows with these lengths of samples; all but the longest row are padded by -1."""
    T = max(map(sum, rows))
    sample_BT = torch.full((len(rows), T), -1)
    for row, lengths in enumerate(rows):
        numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        sample_BT[row, : len(numbers)] = numbers
    return sample_BT


def tensors(
    B: int, T: int, dtype: torch.dtype = torch.float64, device: torch.device = CPU
) -> list[Tensor]:
    """Queries, keys and values, random and with gradients."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, A, T, E, generator=generator, dtype=dtype).to(device).requires_grad_()
        for _ in range(3)
    ]


def by_formula(q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor, sample_BT: Tensor) -> Tensor:
    """Position by position: each attends to those of its sample up to itself."""
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
    """The output, and the gradients of a weighted sum of it, which differ for each element."""
    output = function(*inputs)
    weights = torch.arange(output.numel(), dtype=output.dtype, device=output.device)
    weights = weights.view_as(output).sin()
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


def assert_is_the_formula(backend: Attention, sample_BT: Tensor) -> None:
    inputs = tensors(*sample_BT.shape)
    found = with_gradients(
        lambda *qkv: backend(*qkv, backend.plan(sample_BT, sample_BT.device)), inputs
    )
    expected = with_gradients(lambda *qkv: by_formula(*qkv, sample_BT), inputs)

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["naive", "sdpa"])
@given(rows=packings)
@settings(max_examples=25)
def test_outputs_and_gradients_are_the_formulas(name: str, rows: list[list[int]]) -> None:
    assert_is_the_formula(ATTENTIONS.build(name), sample_numbers(rows))


def test_samples_one_by_one_are_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend does so on a CPU from a certain length of blocks on, here from 8."""
    monkeypatch.setattr(attention, "LONG", 8)
    for rows in ([[8]], [[3, 5], [2]], [[1, 1, 1], [2, 6], [8]], [[4, 4], [4, 5]]):
        assert isinstance(attention.Sdpa().plan(sample_numbers(rows), CPU), Packing)
        assert_is_the_formula(attention.Sdpa(), sample_numbers(rows))


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
    """Its gradients need CUDA, so only the outputs are compared."""
    backend, sample_BT = ATTENTIONS.build("flex"), sample_numbers(rows)
    inputs = [tensor.detach().float() for tensor in tensors(*sample_BT.shape)]
    expected = by_formula(*inputs, sample_BT)
    plan = backend.plan(sample_BT, sample_BT.device)
    torch.testing.assert_close(backend(*inputs, plan), expected, atol=1e-5, rtol=1e-5)

    alone = by_formula(*inputs, torch.zeros_like(sample_BT))
    torch.testing.assert_close(backend(*inputs, None), alone, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------- xformers


Lse = Literal["packed", "padded"]
"""How a kernel lays out the logarithms of its denominators: packed as (1, A, N), or with a padded
row for each sample as (S, A, positions of the longest)."""


@dataclass
class Lengths:
    """Stands in for `_SeqLenInfo`."""

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]


@dataclass
class Mask:
    """Stands in for `BlockDiagonalCausalMask`."""

    q_seqinfo: Lengths
    k_seqinfo: Lengths


def sample_by_sample(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
    """Attention by the formula, a sample after the other.

    Returns:
        The output (1, N, A, E), and the logarithms of the denominators (1, A, N).
    """
    outputs, lses = [], []
    for start, end in pairwise(starts):
        scores_ATT = torch.einsum("tae,sae->ats", q[0, start:end], k[0, start:end])
        hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        scores_ATT = (scores_ATT / math.sqrt(q.shape[3])).masked_fill(hidden, -math.inf)
        outputs.append(torch.einsum("ats,sae->tae", scores_ATT.softmax(-1), v[0, start:end]))
        lses.append(scores_ATT.logsumexp(-1))

    return torch.cat(outputs)[None], torch.cat(lses, 1)[None]


def padded(lse: Tensor, starts: list[int]) -> Tensor:
    """Logarithms of denominators (1, A, N), with a padded row a sample as CUTLASS has them."""
    longest = max(end - start for start, end in pairwise(starts))
    rows = [lse[0, :, start:end] for start, end in pairwise(starts)]

    # CUTLASS pads rows to multiples of 32.
    width = -(-longest // 32) * 32
    return torch.stack([F.pad(row, (0, width - row.shape[1]), value=math.inf) for row in rows])


class Fmha:
    """Stands in for `xformers.ops.fmha`, with one kernel that suits every device."""

    def __init__(self, lse: Lse) -> None:
        self.lse = lse
        self.Inputs = lambda *args: args

    def memory_efficient_attention_forward_requires_grad(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor]:
        starts = mask.q_seqinfo.seqstart.tolist()
        output, lse = sample_by_sample(q, k, v, starts)
        return output, lse if self.lse == "packed" else padded(lse, starts)

    def memory_efficient_attention_backward(
        self, grad: Tensor, output: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask
    ) -> tuple[Tensor, ...]:
        starts = mask.q_seqinfo.seqstart.tolist()
        inputs = [each.detach().requires_grad_() for each in (q, k, v)]
        with torch.enable_grad():
            expected, own_lse = sample_by_sample(*inputs, starts)
            gradients = torch.autograd.grad(expected, inputs, grad)

        # The project has to hand back what the forward pass returned, in the kernel's own layout.
        torch.testing.assert_close(output, expected)
        if self.lse == "padded":
            own_lse = padded(own_lse, starts)[:, :, : mask.q_seqinfo.max_seqlen]
        torch.testing.assert_close(lse, own_lse)

        return gradients


@pytest.fixture(params=["packed", "padded"])
def xformers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fmha:
    """Stands in for the package xformers, on any device.

    It computes the formulas of the real one's documentation.
    """
    fmha = Fmha(request.param)

    # The parts of the package that the project imports.
    bias: Any = types.ModuleType("xformers.ops.fmha.attn_bias")
    bias.BlockDiagonalCausalMask, bias._SeqLenInfo = Mask, Lengths

    dispatch: Any = types.ModuleType("xformers.ops.fmha.dispatch")
    kernel = SimpleNamespace(VARLEN_LSE_PACKED=fmha.lse == "packed")
    dispatch._dispatch_fw = lambda inputs, needs_gradient: kernel

    ops: Any = types.ModuleType("xformers.ops")
    ops.fmha = fmha

    modules = {
        "xformers": types.ModuleType("xformers"),
        "xformers.ops": ops,
        "xformers.ops.fmha": fmha,
        "xformers.ops.fmha.attn_bias": bias,
        "xformers.ops.fmha.dispatch": dispatch,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fmha


def assert_kernels_of_both_devices_agree(
    rows: list[list[int]], dtype: torch.dtype, **tolerance: float
) -> None:
    """What runs on CUDA, run here on the CPU, against what runs on a CPU: outputs and gradients."""
    packing = packing_of(sample_numbers(rows), CPU)
    N = int(packing.starts_cpu[-1])
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, N, A, E, generator=generator).to(dtype)

    # The forward passes, then the backward passes from what each has returned.
    outputs = packed_attention(q, k, v, *packing)
    found = packed._by_xformers(q, k, v, *packing)
    expected = [*outputs, *packed.packed_attention_backward(grad, q, k, v, *outputs, *packing)]
    gradients = packed._backward_by_xformers(grad, q, k, v, *found, *packing)

    for one, other in zip([*found, *gradients], expected, strict=True):
        assert one.is_contiguous()
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


SAMPLES = [[[5]], [[3, 4], [2]], [[4, 3], [4, 3]], [[1, 1, 1], [2, 6], [8]], [[33, 2], [1, 40]]]


@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize("rows", SAMPLES)
def test_xformers_is_given_the_samples_as_one_row(rows: list[list[int]]) -> None:
    assert_kernels_of_both_devices_agree(rows, torch.float32)


@pytest.mark.parametrize("rows", SAMPLES)
def test_packed_attention_is_the_formula(rows: list[list[int]]) -> None:
    assert_is_the_formula(ATTENTIONS.build("xformers"), sample_numbers(rows))


def test_the_operator_is_what_it_says_it_is() -> None:
    """Its shapes without numbers, its gradients, and that it can be traced."""
    q, k, v = torch.randn(3, 10, A, E, dtype=torch.float64).requires_grad_().unbind()
    arguments = (q, k, v, *packing_of(sample_numbers([[2, 3], [4]]), CPU))
    torch.library.opcheck(packed_attention, arguments)


def test_samples_of_another_batch_are_refused() -> None:
    """Kernels would read beyond their tensors."""
    q, k, v = torch.randn(3, 9, A, E).unbind()
    with pytest.raises(ValueError, match="samples of 10 positions were given with 9 queries"):
        packed_attention(q, k, v, *packing_of(sample_numbers([[2, 3], [4]]), CPU))


def test_keys_are_taken_in_the_precision_of_the_values() -> None:
    """Norms of queries and keys are float32 under autocast; kernels want one precision."""
    q, k, v = (tensor.detach().float() for tensor in tensors(1, 6))
    for name in ("xformers", "flex"):
        backend = ATTENTIONS.build(name)
        found = backend(q, k, v.bfloat16(), backend.plan(sample_numbers([[2, 4]]), CPU))
        assert found.dtype == torch.bfloat16


def test_samples_on_the_cpu_are_planned_without_the_device() -> None:
    """The numbers are read where they are; only the plan goes to the device."""
    packing = packing_of(sample_numbers([[2, 3], [4]]), torch.device("meta"))
    assert packing.starts.device.type == "meta"
    assert packing.starts_cpu.tolist() == [0, 2, 5, 9, 10]


@pytest.mark.cluster
@pytest.mark.skipif(find_spec("xformers") is None, reason="needs xformers")
class TestInstalledXformers:
    """Checks of the real package that need no GPU."""

    def test_its_operators_load(self) -> None:
        assert attention._missing_of_xformers() == ""

    @pytest.mark.parametrize("rows", [[[5]], [[3, 4], [2]], [[1, 1, 1], [2, 6], [8]]])
    def test_its_mask_is_that_of_the_samples(self, rows: list[list[int]]) -> None:
        sample_BT = sample_numbers(rows)
        mask = packed._mask(*packing_of(sample_BT, CPU), sample_BT.numel())
        mask_NN = mask.materialize((sample_BT.numel(),) * 2)
        expected_NN = torch.block_diag(*packed_mask(sample_BT)[:, 0].int()) == 1
        assert torch.equal(mask_NN == 0, expected_NN)
        assert torch.equal(mask_NN == -math.inf, ~expected_NN)

    @pytest.mark.parametrize("rows", SAMPLES)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_its_own_code_around_kernels_of_the_cpu(
        self, rows: list[list[int]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its choice of a kernel, its checks and its layouts.

        FlashAttention's for 16 bits, CUTLASS's for float32.
        """
        kernels_on_the_cpu(monkeypatch)
        assert_kernels_of_both_devices_agree(rows, dtype, atol=3e-2, rtol=3e-2)


def kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the real xformers take stand-ins for its kernels on a CPU.

    The stand-ins compute by the formula, and check what a backward pass is given.
    """
    from xformers.ops.fmha import cutlass, flash

    def gradients(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = [each.detach().requires_grad_() for each in (q, k, v)]
        with torch.enable_grad():
            output, _ = sample_by_sample(*inputs, starts.tolist())
            return torch.autograd.grad(output, inputs, grad)

    def flash_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *_: Any, **__: Any) -> Any:
        output, lse = sample_by_sample(q[None], k[None], v[None], starts.tolist())
        return output[0], lse[0].float(), torch.empty(2)

    def flash_backward(
        _: bool,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *rest: Any,
        **__: Any,
    ) -> Any:
        assert lse.shape == (q.shape[1], len(q))
        found = gradients(grad[None], q[None], k[None], v[None], rest[0])
        return tuple(gradient[0] for gradient in found)

    def cutlass_forward(**given: Any) -> Any:
        starts = given["cu_seqlens_q"]
        output, lse = sample_by_sample(
            given["query"], given["key"], given["value"], starts.tolist()
        )
        return output, padded(lse, starts.tolist()), None, None, None, None

    def cutlass_backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        logsumexp: Tensor,
        **_: Any,
    ) -> Any:
        starts = cu_seqlens_q.tolist()
        expected = padded(sample_by_sample(q, k, v, starts)[1], starts)
        torch.testing.assert_close(logsumexp, expected)
        return (*gradients(grad, q, k, v, cu_seqlens_q), None)

    # xformers asks each operator which devices it has, and the GPU for its generation.
    for module, forward, backward in (
        (flash, flash_forward, flash_backward),
        (cutlass, cutlass_forward, cutlass_backward),
    ):
        for operator, kernel in ((module.FwOp, forward), (module.BwOp, backward)):
            monkeypatch.setattr(operator, "OPERATOR", staticmethod(kernel))
            monkeypatch.setattr(operator, "SUPPORTED_DEVICES", {"cpu"})

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@given(rows=packings)
def test_run_lengths_are_the_samples_and_the_padding(rows: list[list[int]]) -> None:
    T = max(map(sum, rows))
    expected = []
    for lengths in rows:
        expected += lengths
        if sum(lengths) < T:
            expected.append(T - sum(lengths))
    assert run_lengths(sample_numbers(rows)) == expected


# ------------------------------------------------------------------------------------- the choice


def decoder(attention: str) -> Transformer:
    """A small model in double precision with this backend of its attention."""
    torch.manual_seed(0)
    config = Transformer.Config(
        layers=2, width=32, head_size=8, seq_len=32, init_std=0.3, attention=attention
    )
    model = Transformer(config, vocab_size=20)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.double()


def logits_and_gradients(attention: str) -> list[Tensor]:
    """Logits of two rows of packed samples, and the gradients of all weights."""
    model, sample_BT = decoder(attention), sample_numbers([[5, 9], [3, 3, 3]])
    ids_BT = torch.arange(sample_BT.numel()).view_as(sample_BT) % 20
    logits_BTV = model(ids_BT, sample_BT=sample_BT)

    logits_BTV.sin().sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return [logits_BTV.detach(), *gradients]


@pytest.mark.parametrize("attention", ["auto", "sdpa", "xformers"])
def test_the_whole_model_is_the_same_with_each(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ATTENTIONS.get("xformers"), "missing", staticmethod(lambda device: ""))
    choose.cache_clear()
    found, expected = logits_and_gradients(attention), logits_and_gradients("naive")
    for one, other in zip(found, expected, strict=True):
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
    """Stands in for an operator of xformers, loaded or not."""

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
    fmha: Any = sys.modules["xformers.ops.fmha"]
    fmha.ALL_FW_OPS, fmha.ALL_BW_OPS = map(Operator, forward), map(Operator, backward)
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
            "model.attention is xformers, which needs a CUDA device: "
            "memory_efficient_attention has no",
        ),
        (
            "flex",
            CPU,
            "model.attention is flex, which needs a CUDA device: "
            "FlexAttention has no gradients elsewhere",
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
    if lacking := ATTENTIONS.get(name).missing(CUDA):
        pytest.skip(f"needs {lacking}")

    sample_BT = sample_numbers([[100, 156], [90, 30, 60]]).cuda()
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 2, 256, 64, generator=generator).bfloat16().cuda().requires_grad_()
        for _ in range(3)
    ]
    backend = ATTENTIONS.build(name)
    plan = backend.plan(sample_BT, CUDA)
    found = with_gradients(lambda *qkv: backend(*qkv, plan), inputs)

    # The reference is the formula in double precision.
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    naive = ATTENTIONS.build("naive")
    expected = with_gradients(lambda *qkv: naive(*qkv, naive.plan(sample_BT, CUDA)), exact)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=0.05, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sdpa", "flex"])
@pytest.mark.parametrize("head_size", [64, 128])
def test_xformers_and_another_agree_on_a_gpu(name: str, head_size: int) -> None:
    """In bf16, over packed documents and padding."""
    if missing := ATTENTIONS.get("xformers").missing(CUDA):
        pytest.skip(f"needs {missing}")

    sample_BT = sample_numbers([[600, 1, 423], [300, 500]]).cuda()
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, sample_BT.shape[1], head_size)
    inputs = [
        torch.randn(*shape, generator=generator).bfloat16().cuda().requires_grad_()
        for _ in range(3)
    ]

    results = []
    for backend in (ATTENTIONS.build("xformers"), ATTENTIONS.build(name)):
        plan = backend.plan(sample_BT, sample_BT.device)
        results.append(
            with_gradients(lambda *qkv, backend=backend, plan=plan: backend(*qkv, plan), inputs)
        )

    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)
