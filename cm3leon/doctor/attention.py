"""Time one layer's attention by every backend that the device has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cm3leon.doctor.figures import Figure, reason
from cm3leon.doctor.hardware import median_seconds
from cm3leon.models.attention import choose, run_lengths
from cm3leon.registry import ATTENTIONS, MODELS

PART = "attention"


class Row(NamedTuple):
    """What one backend reaches."""

    backend: str
    lacks: str = ""
    """What it is missing, or the error with which it ended; the figures are 0 then."""
    seconds: float = 0.0
    rate: float = 0.0
    """FLOP/s, counting only what a causal mask leaves."""
    memory: int = 0
    """The most bytes beyond the inputs; 0 on a CPU."""
    error: float = 0.0
    """The largest difference from float32, of output and gradients, as a share of the largest
    number."""


def compare(
    size: str, sample_1T: Tensor, dtype: torch.dtype, *, repeats: int, judge: bool = True
) -> Iterator[Row]:
    """Time forward and backward of a block by every backend.

    Args:
        size: a registered model, whose heads are used.
        sample_1T: the sample of each position.
        judge: compare with the naive formula in float32, which holds T x T scores of every head.
    """
    config, device = MODELS.check(size).config, sample_1T.device
    heads, lengths = config.width // config.head_size, run_lengths(sample_1T)

    # q, k, v and the gradient of the output.
    torch.manual_seed(0)
    shape = (4, 1, heads, sample_1T.shape[1], config.head_size)
    *given, gradient = torch.randn(shape, device=device).to(dtype).unbind()

    # Two products forward and four backward, of which a causal mask leaves half.
    flops = 6 * config.head_size * heads * sum(length**2 for length in lengths)

    def both_passes(name: str, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        backend = choose(name, device).attention
        plan = None
        if len(lengths) > 1:
            plan = backend.plan(sample_1T, device)
        q, k, v = (each.to(dtype).requires_grad_() for each in given)

        def call() -> list[Tensor]:
            output = backend(q, k, v, plan)
            return [output.detach(), *torch.autograd.grad(output, (q, k, v), gradient.to(dtype))]

        return call

    exact: list[Tensor] = []
    if judge:
        exact = both_passes("naive", torch.float32)()
    for name in ATTENTIONS.names():
        if lacks := ATTENTIONS.get(name).missing(device):
            yield Row(name, f"lacks {lacks}")
            continue
        try:
            call = both_passes(name, dtype)
            pairs = zip(call(), exact, strict=judge)
            errors = [((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs]
            memory = 0
            if device.type == "cuda":
                memory = peak_bytes(call)
            taken = median_seconds(call, device, repeats)
        except Exception as error:  # a kernel that does not run here; the others may
            yield Row(name, reason(error))
            continue
        yield Row(name, "", taken, flops / taken, memory, max(errors, default=0.0))


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that a call holds on the GPU, beyond those that were held before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def measure(device: torch.device, full: bool) -> Iterator[Figure]:
    """A block with one document, and one with packed documents.

    In full, a block has 4,096 tokens and the heads of the 7B; else 256 tokens and those of the tiny
    model.
    """
    length, size, repeats = (4096, "cm3leon_7b", 20) if full else (256, "cm3leon_tiny", 3)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for documents, each in (("one document", length), ("packed documents", 1100 * length // 4096)):
        sample_1T = torch.arange(length, device=device)[None] // each
        for row in compare(size, sample_1T, dtype, repeats=repeats):
            name = f"attention of a layer, {row.backend}, {documents}"
            if row.lacks:
                yield Figure(PART, name, None, "ms", row.lacks)
                continue

            note = f"{length:,} tokens, {size}; "
            note += f"{row.rate / 1e12:.3g} TFLOP/s, error {row.error:.1e}"
            if row.memory:
                note += f", {row.memory / 2**20:,.0f} MiB"
            yield Figure(PART, name, 1000 * row.seconds, "ms", note)
