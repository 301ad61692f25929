"""The chunked output layer: its formula, its gradients, and what it never holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cm3leon.objectives.loss import linear_cross_entropy, plain_linear_cross_entropy

D = 6


def problem(tokens: int, vocabulary: int, seed: int = 0, width: int = D) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets and weights, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(tokens, width, generator=generator)
    head_VD = torch.randn(vocabulary, width, generator=generator)
    target_N = torch.randint(vocabulary, (tokens,), generator=generator)
    weight_N = torch.tensor([0.0, 0.1, 1.0])[torch.randint(3, (tokens,), generator=generator)]
    weight_N[0] = 1.0
    return hidden_ND, head_VD, target_N, weight_N


def by_formula(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, weight_N: Tensor, z: float) -> tuple[Any, ...]:
    """Loss, losses of the tokens, and both gradients, in float64."""
    hidden, head = hidden_ND.double().requires_grad_(), head_VD.double().requires_grad_()
    logits = hidden @ head.T
    lse = torch.log(torch.exp(logits).sum(1))
    nll = lse - logits[torch.arange(len(logits)), target_N]
    loss = ((nll + z * lse**2) * weight_N).sum() / weight_N.sum()
    return loss, nll.detach(), *torch.autograd.grad(loss, (hidden, head))


@given(tokens=st.integers(1, 40), vocabulary=st.integers(2, 30), rows=st.integers(1, 50), z=st.sampled_from([0.0, 0.1]))
@settings(max_examples=60)
def test_chunks_are_the_formula(tokens: int, vocabulary: int, rows: int, z: float) -> None:
    given_tensors = problem(tokens, vocabulary)
    hidden, head = (tensor.clone().requires_grad_() for tensor in given_tensors[:2])
    loss, nll = linear_cross_entropy(hidden, head, *given_tensors[2:], z_loss=z, most_logits=rows * vocabulary)
    (0.25 * loss).backward()
    expected = by_formula(*given_tensors, z)
    for found, wanted in zip((loss, nll, 4 * hidden.grad, 4 * head.grad), expected, strict=True):
        torch.testing.assert_close(found.detach().double(), wanted.detach(), rtol=1e-4, atol=1e-5)


def test_one_chunk_is_bit_for_bit_the_plain_loss() -> None:
    given_tensors = problem(20, 30)
    results = []
    for function in (linear_cross_entropy, plain_linear_cross_entropy):
        hidden, head = (tensor.clone().requires_grad_() for tensor in given_tensors[:2])
        loss, nll = function(hidden, head, *given_tensors[2:])
        loss.backward()
        results.append((loss, nll, hidden.grad, head.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_torch_has_the_same_loss() -> None:
    hidden, head, target, _ = problem(20, 30)
    loss, _ = linear_cross_entropy(hidden, head, target, torch.ones(20), most_logits=90)
    torch.testing.assert_close(loss, F.linear_cross_entropy(hidden, head, target))


def test_bf16_is_within_its_rounding_of_the_formula() -> None:
    given_tensors = problem(64, 50, width=32)
    hidden, head = (tensor.clone().requires_grad_() for tensor in given_tensors[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, nll = linear_cross_entropy(hidden, head, *given_tensors[2:], most_logits=500)
    loss.backward()
    assert (loss.dtype, nll.dtype, hidden.grad.dtype, head.grad.dtype) == (torch.float32,) * 4
    expected = by_formula(*given_tensors, 0.0)
    for found, wanted in zip((loss, hidden.grad, head.grad), (expected[0], *expected[2:]), strict=True):
        error = (found.detach().double() - wanted.detach()).abs().max() / wanted.detach().abs().max()
        assert error < 0.02  # bf16 has 8 bits


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    given_tensors = problem(20, 30)
    hidden = given_tensors[0].clone().requires_grad_(frozen == "head")
    head = given_tensors[1].clone().requires_grad_(frozen == "hidden")
    loss, _ = linear_cross_entropy(hidden, head, *given_tensors[2:], most_logits=90)
    expected = by_formula(*given_tensors, 0.0)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    if frozen != "both":
        loss.backward()
    assert (hidden.grad is None) == (frozen != "head")
    assert (head.grad is None) == (frozen != "hidden")
    with torch.inference_mode():
        assert linear_cross_entropy(*given_tensors, most_logits=90)[0].item() == pytest.approx(loss.item())


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_logits_of_all_tokens_are_never_held() -> None:
    tokens, vocabulary, rows = 512, 300, 32
    hidden, head, target, weight = problem(tokens, vocabulary)
    for function, most in (
        (linear_cross_entropy, rows * vocabulary),
        (plain_linear_cross_entropy, tokens * vocabulary),
    ):
        options = {"most_logits": rows * vocabulary} if function is linear_cross_entropy else {}
        with Largest() as largest:
            loss, _ = function(hidden.requires_grad_(), head.requires_grad_(), target, weight, **options)
            loss.backward()
        assert largest.elements == most


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_peak_is_below_half_of_the_logits() -> None:
    hidden, head, target, weight = (tensor.cuda() for tensor in problem(4096, 65_536, width=512))
    hidden.requires_grad_(), head.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, head, target, weight)
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 4096 * 65_536 * 4 / 2
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        plain, _ = plain_linear_cross_entropy(hidden, head, target, weight)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-3)
