"""The output layer in chunks: the loss and gradients of its formula, without holding all logits."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cm3leon.objectives import base
from cm3leon.objectives.loss import linear_cross_entropy, plain_linear_cross_entropy
from cm3leon.objectives.packing import collate, pack
from cm3leon.registry import OBJECTIVES, discover
from cm3leon.tokenizers.document import lay_out
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Sample, TokenDocument, TokenSegment

pytestmark = pytest.mark.stack

discover()
D = 6


def problem(
    tokens: int, vocabulary: int, seed: int = 0, width: int = D
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets and weights, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(tokens, width, generator=generator)
    head_VD = torch.randn(vocabulary, width, generator=generator)
    target_N = torch.randint(vocabulary, (tokens,), generator=generator)
    weight_N = torch.tensor([0.0, 0.1, 1.0])[torch.randint(3, (tokens,), generator=generator)]
    weight_N[0] = 1.0
    return hidden_ND, head_VD, target_N, weight_N


def by_formula(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, weight_N: Tensor, z: float
) -> tuple[Any, ...]:
    """Loss, losses of the tokens, and both gradients, in float64."""
    hidden, head = hidden_ND.double().requires_grad_(), head_VD.double().requires_grad_()
    logits = hidden @ head.T
    lse = torch.log(torch.exp(logits).sum(1))
    nll = lse - logits[torch.arange(len(logits)), target_N]
    loss = ((nll + z * lse**2) * weight_N).sum() / weight_N.sum()
    return loss, nll.detach(), *torch.autograd.grad(loss, (hidden, head))


class Watch(TorchDispatchMode):
    """Records the size of the largest tensor made, and the precision of each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.products: list[torch.dtype] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.mm:
            self.products.append(result.dtype)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 30),
    rows=st.integers(1, 50),
    z=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=60)
def test_chunks_are_the_formula(tokens: int, vocabulary: int, rows: int, z: float) -> None:
    given_tensors = problem(tokens, vocabulary)
    hidden, head = (tensor.clone().requires_grad_() for tensor in given_tensors[:2])
    loss, nll = linear_cross_entropy(
        hidden, head, *given_tensors[2:], z_loss=z, most_logits=rows * vocabulary
    )

    # A factor behind the loss reaches the gradients, which are made in the forward pass.
    (0.25 * loss).backward()
    expected = by_formula(*given_tensors, z)
    for found, wanted in zip((loss, nll, 4 * hidden.grad, 4 * head.grad), expected, strict=True):
        torch.testing.assert_close(found.detach().double(), wanted.detach(), rtol=1e-4, atol=1e-5)
    assert not hidden.grad[given_tensors[3] == 0].any()


def test_logits_far_from_zero_neither_overflow_nor_vanish() -> None:
    hidden, head, target, weight = problem(20, 30)
    given_tensors = 100 * hidden, head, target, weight
    loss, nll = linear_cross_entropy(*given_tensors, most_logits=90)
    logits_NV = (given_tensors[0].double() @ head.double().T).numpy()
    assert logits_NV.max() > 500  # exp of it is no float32

    wanted_N = np.logaddexp.reduce(logits_NV, 1) - logits_NV[np.arange(20), target.numpy()]
    np.testing.assert_allclose(nll.numpy(), wanted_N, rtol=1e-4, atol=1e-3)
    mean = (wanted_N * weight.numpy()).sum() / weight.sum().item()
    assert loss.item() == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("z", [0.0, 1e-2])
def test_one_chunk_is_bit_for_bit_what_these_operations_give(z: float) -> None:
    hidden_ND, head_VD, target_N, weight_N = problem(20, 30)

    def written_out(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, head).float()
        nll = F.cross_entropy(logits, target_N, reduction="none")
        total = nll + z * logits.logsumexp(-1).square() if z else nll
        return (total * weight_N).sum() / weight_N.sum().clamp(min=1e-8), nll.detach()

    # In one chunk, without chunks, and written out.
    results = []
    for function in (
        lambda *both: linear_cross_entropy(*both, target_N, weight_N, z_loss=z),
        lambda *both: plain_linear_cross_entropy(*both, target_N, weight_N, z_loss=z),
        written_out,
    ):
        hidden, head = (tensor.clone().requires_grad_() for tensor in (hidden_ND, head_VD))
        loss, nll = function(hidden, head)
        loss.backward()
        results.append((loss, nll, hidden.grad, head.grad))

    for ours in results[:2]:
        assert all(torch.equal(one, other) for one, other in zip(ours, results[2], strict=True))


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)
def test_torch_has_the_same_loss_and_gradients() -> None:
    *given_tensors, target, _ = problem(20, 30)
    results = []
    for function in (
        lambda *both: linear_cross_entropy(*both, target, torch.ones(20), most_logits=90)[0],
        lambda *both: F.linear_cross_entropy(*both, target),
    ):
        hidden, head = (tensor.clone().requires_grad_() for tensor in given_tensors)
        loss = function(hidden, head)
        loss.backward()
        results.append((loss.detach(), hidden.grad, head.grad))

    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_weight_is_no_loss_and_no_gradient() -> None:
    hidden, head, target, weight = problem(20, 30)
    loss, nll = linear_cross_entropy(
        hidden.requires_grad_(),
        head.requires_grad_(),
        target,
        torch.zeros_like(weight),
        most_logits=90,
    )
    loss.backward()

    assert loss.item() == 0
    assert (nll > 0).all()
    assert not hidden.grad.any()
    assert not head.grad.any()


@pytest.mark.parametrize(
    ("of_hidden", "of_head", "autocast"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, False),
    ],
)
def test_bf16_is_within_its_rounding_of_the_formula(
    of_hidden: Any, of_head: Any, autocast: bool
) -> None:
    given_tensors = problem(64, 50, width=32)
    hidden = given_tensors[0].to(of_hidden).requires_grad_()
    head = given_tensors[1].to(of_head).requires_grad_()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), Watch() as watch:
        loss, nll = linear_cross_entropy(hidden, head, *given_tensors[2:], most_logits=500)
    loss.backward()
    assert watch.products == [torch.bfloat16] * 3 * 7  # 10 tokens a chunk
    assert (loss.dtype, nll.dtype) == (torch.float32, torch.float32)
    assert (hidden.grad.dtype, head.grad.dtype) == (of_hidden, of_head)

    # The bound is a few roundings of bf16, which has 8 bits.
    of_loss, _, *of_gradients = by_formula(*given_tensors, 0.0)
    results = (loss, hidden.grad, head.grad)
    for found, wanted in zip(results, (of_loss, *of_gradients), strict=True):
        difference = found.detach().double() - wanted.detach()
        error = difference.abs().max() / wanted.detach().abs().max()
        assert error < 0.02


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
        without_gradients, _ = linear_cross_entropy(*given_tensors, most_logits=90)
        assert without_gradients.item() == pytest.approx(loss.item())


def test_gradients_are_scaled_once() -> None:
    """The backward pass scales the gradients in place, so a second one is an error."""
    hidden, head, target, weight = problem(20, 30)
    loss, _ = linear_cross_entropy(hidden.requires_grad_(), head, target, weight, most_logits=90)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


TOKENS, VOCABULARY, ROWS = 500, 300, 32
CHUNKS = 16
"""Each of 32 tokens, except for the last one of 20."""


def test_the_logits_of_all_tokens_are_never_held_and_no_product_is_taken_twice() -> None:
    hidden, head, target, weight = problem(TOKENS, VOCABULARY)
    hidden.requires_grad_(), head.requires_grad_()
    most_logits = ROWS * VOCABULARY
    with Watch() as chunked:
        loss, _ = linear_cross_entropy(hidden, head, target, weight, most_logits=most_logits)
        loss.backward()

    # Three products: the logits and the two gradients.
    assert chunked.elements == ROWS * VOCABULARY
    assert len(chunked.products) == 3 * CHUNKS

    with Watch() as plain:
        plain_linear_cross_entropy(hidden, head, target, weight)[0].backward()
    assert plain.elements == TOKENS * VOCABULARY
    assert len(plain.products) == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_made_where_none_is_kept(mode: Any) -> None:
    hidden, head, target, weight = problem(TOKENS, VOCABULARY)
    hidden.requires_grad_(), head.requires_grad_()
    with mode(), Watch() as watch:
        loss, _ = linear_cross_entropy(hidden, head, target, weight, most_logits=ROWS * VOCABULARY)
    assert len(watch.products) == CHUNKS
    expected, *_ = by_formula(hidden.detach(), head.detach(), target, weight, 0.0)
    assert loss.item() == pytest.approx(expected.item())


VOCAB = Vocab(text_size=40, image_size=16, sentinels=4)


@pytest.mark.parametrize("most_logits", [2**26, 5 * VOCAB.size])
def test_modalities_are_counted_one_by_one_over_a_packed_batch(
    monkeypatch: pytest.MonkeyPatch, most_logits: int
) -> None:
    chunked = functools.partial(linear_cross_entropy, most_logits=most_logits)
    monkeypatch.setattr(base, "linear_cross_entropy", chunked)
    rng = np.random.default_rng(0)
    objective = OBJECTIVES.build("cm3", vocab=VOCAB)

    def document(number: int) -> TokenDocument:
        text_T = rng.integers(VOCAB.text_size - 10, VOCAB.text_size, 5)
        image_T = rng.integers(VOCAB.image_start, VOCAB.image_start + 16, 9)
        segments = (TokenSegment("text", text_T), TokenSegment("image", image_T))
        return TokenDocument(str(number), segments)

    samples = [objective.corrupt(lay_out(Sample(document(n)), VOCAB), rng, 30) for n in range(4)]
    blocks = [pack(samples[:2], 64, VOCAB.pad), pack(samples[2:], 64, VOCAB.pad)]
    batch = collate(blocks, torch.device("cpu"))
    hidden_BTD = torch.randn(2, 64, D, generator=torch.Generator().manual_seed(0))
    head = torch.nn.Linear(D, VOCAB.size, bias=False)
    loss, figures = objective.loss(hidden_BTD, head, batch)

    # The same sums, position by position.
    totals, counts, positions = Counter[str](), Counter[str](), 0
    logits_BTV = (hidden_BTD.double() @ head.weight.detach().double().T).numpy()
    for b, block in enumerate(blocks):
        for t in range(64):
            positions += block.sample_T[t] >= 0
            if block.weight_T[t] == 0:
                continue

            target = int(block.target_T[t])
            nll = np.log(np.exp(logits_BTV[b, t]).sum()) - logits_BTV[b, t, target]
            modality = "other"
            if target < 40:
                modality = "text"
            elif target < 56:
                modality = "image"
            for kind in (modality, "all"):
                totals[kind] += nll
                counts[kind] += 1

    assert min(counts["text"], counts["image"]) > 10
    assert loss.item() == pytest.approx(totals["all"] / counts["all"], rel=1e-5)
    assert figures["tokens"] == positions
    for kind in ("text", "image"):
        total, count = figures[f"loss_{kind}"]
        kinds = (total.dtype, count.dtype, total.requires_grad)
        assert kinds == (torch.float32, torch.float32, False)
        assert total.item() == pytest.approx(totals[kind], rel=1e-5)
        assert count.item() == counts[kind]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_peak_is_below_half_of_the_logits() -> None:
    hidden, head, target, weight = (tensor.cuda() for tensor in problem(4096, 65_536, width=64))
    hidden.requires_grad_(), head.requires_grad_()

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, nll = linear_cross_entropy(hidden, head, target, weight, z_loss=1e-4)
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 4096 * 65_536 * 4 / 2

    # The plain loss, whose logits would not have fitted below that bound.
    found = loss.detach(), nll, hidden.grad, head.grad
    hidden.grad = head.grad = None
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss, nll = plain_linear_cross_entropy(hidden, head, target, weight, z_loss=1e-4)
    loss.backward()
    for ours, reference in zip(found, (loss.detach(), nll, hidden.grad, head.grad), strict=True):
        assert (ours - reference).abs().max() < 0.02 * reference.abs().max()  # bf16 has 8 bits
