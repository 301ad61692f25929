"""Attention inside packed samples as one operator, for compilers and activation checkpointing.

Samples follow each other in a row of N positions. `starts` lists where each begins, and at last
where the row ends:

    positions   0 1 2 | 3 4 | 5 6 7 8          starts   0 3 5 9

Since `starts` is a tensor whose length is marked as dynamic, torch.compile makes one graph for all
packings. The kernels also need the numbers in Python. They get them from `starts_cpu`, a copy on
the CPU, so that reading them waits for no device.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten


class Packing(NamedTuple):
    """Where the S samples of a batch begin, if its rows are taken as one row of B * T positions.

    Both tensors are (S + 1,) int32, from 0 to the number of positions.
    """

    starts: Tensor
    """On the device that computes attention."""
    starts_cpu: Tensor
    """The same on the CPU."""


def packing_of(sample_BT: Tensor, device: torch.device) -> Packing:
    """Find the runs of equal numbers, row after row; a run ends with its row.

    Args:
        sample_BT: number of the sample at each position. If it is on a GPU, this waits for it.
        device: where attention is computed.
    """
    begins_BT = torch.ones_like(sample_BT, dtype=torch.bool)
    begins_BT[:, 1:] = sample_BT[:, 1:] != sample_BT[:, :-1]
    starts = begins_BT.flatten().nonzero()[:, 0].int()
    starts_cpu = torch.cat([starts.cpu(), torch.tensor([sample_BT.numel()], dtype=torch.int32)])
    packing = Packing(starts_cpu.to(device, non_blocking=True), starts_cpu)
    for each in packing:
        torch._dynamo.maybe_mark_dynamic(each, 0)
    return packing


def one_sample_a_row(B: int, T: int, device: torch.device) -> Packing:
    """Return the packing of B rows that are one sample each; works inside a compiled layer."""
    starts = (
        torch.arange(0, B * T + 1, T, dtype=torch.int32, device=each) for each in (device, "cpu")
    )
    return Packing(*starts)


def attend_packed(q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor, packing: Packing) -> Tensor:
    """Compute causal softmax attention inside each sample, scaled by 1/sqrt(E): (B, A, T, E)."""
    B, A, T, E = q_BATE.shape
    rows_NAE = (x.transpose(1, 2).reshape(B * T, A, E) for x in (q_BATE, k_BATE, v_BATE))
    out_NAE, _ = packed_attention(*rows_NAE, *packing)
    return out_NAE.view(B, T, A, E).transpose(1, 2)


# ----------------------------------------------------------------------------------- the operator


@torch.library.custom_op(
    "cm3leon::packed_attention",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor starts_cpu) -> (Tensor, Tensor)",
)
def packed_attention(
    q_NAE: Tensor, k_NAE: Tensor, v_NAE: Tensor, starts: Tensor, starts_cpu: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the attended values (N, A, E), and the log-sum-exp of the scores (A, N).

    The latter is float32 or float64; the backward pass needs it. A CPU computes one sample after
    the other, because a mask of all pairs of positions would save no work.
    """
    out_NAE, lse_AN = _like_fake(q_NAE)
    for start, end in pairwise(_numbers(starts_cpu, len(q_NAE))):
        q, k, v = (_heads_first(x_NAE[start:end]) for x_NAE in (q_NAE, k_NAE, v_NAE))
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        out_NAE[start:end] = out[0].transpose(0, 1)
        lse_AN[:, start:end] = lse[0]
    return out_NAE, lse_AN


@packed_attention.register_kernel("cuda")
def _by_xformers(
    q_NAE: Tensor, k_NAE: Tensor, v_NAE: Tensor, starts: Tensor, starts_cpu: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the same by xformers, with the kernel that suits the GPU and the precision."""
    from xformers.ops import fmha

    out_1NAE, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q_NAE[None], k_NAE[None], v_NAE[None], _mask(starts, starts_cpu, len(q_NAE))
    )

    # The log-sum-exp of FlashAttention's kernels is (1, A, N). That of CUTLASS's is (S, A, L), for L
    # positions of the longest sample and padding.
    N = len(q_NAE)
    if len(lse) == 1:
        lse_AN = lse[0, :, :N]
    else:
        sample_N, place_N = _places(starts, N)
        lse_AN = lse[sample_N, :, place_N].T
    return out_1NAE[0].contiguous(), lse_AN.contiguous()


@packed_attention.register_fake
def _like_fake(q_NAE: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    N, A, _E = q_NAE.shape
    dtype = torch.float64 if q_NAE.dtype == torch.float64 else torch.float32
    return q_NAE.new_empty(q_NAE.shape), q_NAE.new_empty(A, N, dtype=dtype)


@torch.library.custom_op(
    "cm3leon::packed_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts, "
    "Tensor starts_cpu) -> (Tensor, Tensor, Tensor)",
)
def packed_attention_backward(
    grad_NAE: Tensor,
    q_NAE: Tensor,
    k_NAE: Tensor,
    v_NAE: Tensor,
    out_NAE: Tensor,
    lse_AN: Tensor,
    starts: Tensor,
    starts_cpu: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, each (N, A, E)."""
    gradients = _gradients_fake(grad_NAE, q_NAE, k_NAE, v_NAE)
    for start, end in pairwise(_numbers(starts_cpu, len(q_NAE))):
        rows = (x_NAE[start:end] for x_NAE in (grad_NAE, q_NAE, k_NAE, v_NAE, out_NAE))
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(_heads_first, rows), lse_AN[None, :, start:end], 0.0, True
        )
        for gradient_NAE, part_1ATE in zip(gradients, found, strict=True):
            gradient_NAE[start:end] = part_1ATE[0].transpose(0, 1)
    return gradients


@packed_attention_backward.register_kernel("cuda")
def _backward_by_xformers(
    grad_NAE: Tensor,
    q_NAE: Tensor,
    k_NAE: Tensor,
    v_NAE: Tensor,
    out_NAE: Tensor,
    lse_AN: Tensor,
    starts: Tensor,
    starts_cpu: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from xformers.ops import fmha
    from xformers.ops.fmha.dispatch import _dispatch_fw

    mask, lse = _mask(starts, starts_cpu, len(q_NAE)), lse_AN[None]
    rows = [x_NAE[None] for x_NAE in (q_NAE, k_NAE, v_NAE)]

    # The backward pass takes the log-sum-exp in the layout of the kernel that the forward pass ran.
    if not _dispatch_fw(fmha.Inputs(*rows, mask), True).VARLEN_LSE_PACKED:
        sample_N, place_N = _places(starts, len(q_NAE))
        shape = (len(starts) - 1, len(lse_AN), mask.q_seqinfo.max_seqlen)
        lse = lse_AN.new_full(shape, math.inf)
        lse[sample_N, :, place_N] = lse_AN.T

    found = fmha.memory_efficient_attention_backward(
        grad_NAE[None], out_NAE[None], lse, *rows, mask
    )
    q_grad, k_grad, v_grad = (gradient_1NAE[0].contiguous() for gradient_1NAE in found)
    return q_grad, k_grad, v_grad


@packed_attention_backward.register_fake
def _gradients_fake(
    grad_NAE: Tensor, q_NAE: Tensor, k_NAE: Tensor, v_NAE: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q_NAE.new_empty(q_NAE.shape), k_NAE.new_empty(k_NAE.shape), v_NAE.new_empty(v_NAE.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q_NAE, k_NAE, v_NAE, starts, starts_cpu = inputs
    ctx.save_for_backward(q_NAE, k_NAE, v_NAE, *output, starts, starts_cpu)


def _differentiate(ctx: Any, grad_NAE: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*packed_attention_backward(grad_NAE, *ctx.saved_tensors), None, None)


packed_attention.register_autograd(_differentiate, setup_context=_keep)


def _numbers(starts_cpu: Tensor, N: int) -> list[int]:
    """Return the starts as Python numbers.

    Kernels trust them and crash on those of another batch, so they are checked here.

    Raises:
        ValueError: for starts that do not end at N positions.
    """
    numbers: list[int] = starts_cpu.tolist()
    if numbers[-1] != N:
        raise ValueError(f"samples of {numbers[-1]} positions were given with {N} queries")
    return numbers


def _heads_first(x_TAE: Tensor) -> Tensor:
    """Arrange the rows of a sample for torch's kernel, (1, A, T, E)."""
    return x_TAE.transpose(0, 1)[None]


def _places(starts: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Return for each of N positions the index of its sample, and its index within the sample."""
    position_N = torch.arange(N, device=starts.device, dtype=starts.dtype)
    sample_N = torch.searchsorted(starts, position_N, right=True) - 1
    return sample_N, position_N - starts[sample_N]


def _mask(starts: Tensor, starts_cpu: Tensor, N: int) -> Any:
    """Build xformers' mask from its parts.

    The library's constructor would copy the numbers to the device once more.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, _SeqLenInfo

    lengths = starts_cpu.diff()
    samples = _SeqLenInfo(
        seqstart=starts,
        max_seqlen=int(lengths.max()),
        min_seqlen=int(lengths.min()),
        seqstart_py=_numbers(starts_cpu, N),
    )
    return BlockDiagonalCausalMask(q_seqinfo=samples, k_seqinfo=samples)
