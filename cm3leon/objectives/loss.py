"""Cross-entropy of a linear output layer, without ever holding the logits of all tokens.

A batch of 8 blocks of 4,096 tokens over 65,536 ids has 8.6 GB of float32 logits. Here at most 256
MiB of them exist at a time: each chunk of tokens passes through the output layer, gives its losses
and its part of the gradients, and its memory serves the next chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 2**26
"""Most float32 logits that are held at a time (256 MiB):
1,024 tokens over the paper's vocabulary."""
TOKENS = 1024
"""Tokens of a chunk over a smaller vocabulary."""
FEW_LOGITS = 2**22
"""Logits that always fit one chunk."""


def tokens_at_once(vocab_size: int, most_logits: int | None = None) -> int:
    """Tokens of a chunk, whose logits are held at a time."""
    if not most_logits:
        most_logits = min(LOGITS, max(FEW_LOGITS, TOKENS * vocab_size))
    return max(1, most_logits // vocab_size)


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    *,
    z_loss: float = 0.0,
    most_logits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted mean of -log softmax(hidden @ head.T)[target] + z_loss * logsumexp^2, in nats.

    The second term is PaLM's (arXiv 2204.02311, section 5). Tokens are taken in chunks of at most
    `most_logits` logits, by default of 1,024 tokens. With several chunks, the forward pass also
    makes the gradients of both factors, so that no product is computed twice and no logits are
    kept; the backward pass only scales them, once.

    Args:
        hidden_ND: inputs of the output layer; autocast applies to it and to `head_VD`, the
            layer's weight.
        target_N: ids of the tokens to predict.
        weight_N: share of each token in the mean; a token of weight 0 has no gradient.

    Returns:
        the scalar loss in float32, and the negative log-likelihood of each token (N,), which
        carries no gradient.
    """
    rows = tokens_at_once(len(head_VD), most_logits)
    if len(hidden_ND) <= rows:
        return plain_linear_cross_entropy(hidden_ND, head_VD, target_N, weight_N, z_loss=z_loss)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_ND, head_VD)]
    if any(wanted):
        return _Chunked.apply(hidden_ND, head_VD, target_N, weight_N, z_loss, rows)
    return _by_chunks(hidden_ND, head_VD, target_N, weight_N, z_loss, rows, (False, False))[:2]


def plain_linear_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, weight_N: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same from all logits at once, by autograd alone."""
    logits_NV = F.linear(hidden_ND, head_VD).float()
    nll_N = F.cross_entropy(logits_NV, target_N, reduction="none")
    each_N = nll_N + z_loss * logits_NV.logsumexp(-1).square() if z_loss else nll_N
    return (each_N * weight_N).sum() / weight_N.sum().clamp(min=1e-8), nll_N.detach()


class _Results(NamedTuple):
    loss: Tensor
    nll_N: Tensor
    d_hidden_ND: Tensor | None
    d_head_VD: Tensor | None


class _Chunked(torch.autograd.Function):
    """Scales, in the backward pass, the gradients that the forward pass has made."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        target_N: Tensor,
        weight_N: Tensor,
        z_loss: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        loss, nll_N, *gradients = _by_chunks(
            hidden_ND, head_VD, target_N, weight_N, z_loss, rows, ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_ND.dtype, head_VD.dtype
        ctx.mark_non_differentiable(nll_N)
        return loss, nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> Any:
        # In place, as the head's gradient is as large as the head; torch then refuses a second
        # backward pass.
        gradients = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            gradients.append(None if gradient is None else gradient.mul_(scale).to(dtype))
        return (*gradients, None, None, None, None)


def _by_chunks(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    z_loss: float,
    rows: int,
    wanted: tuple[bool, bool],
) -> _Results:
    """Compute the loss and, where `wanted`, gradients of hidden states and head, by chunks.

    With p the softmax and y the indicator of the target, dloss/dlogits = w ((1 + 2 z lse) p - y) /
    sum w. Logits, p and this gradient use the same float32 memory one after the other. Factors of
    matrix products are in the precision of autocast, or of the hidden states without it; the head's
    gradient is summed in float32.

    Args:
        rows: tokens of a chunk.
    """
    device, count = hidden_ND.device, len(hidden_ND)
    dtype = hidden_ND.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)

    # Memory that all chunks share: the product's output, and its copy in float32.
    head = head_VD.to(dtype)
    product_RV = torch.empty(rows, len(head), dtype=dtype, device=device)
    float_RV = product_RV
    if dtype != torch.float32:
        float_RV = torch.empty_like(product_RV, dtype=torch.float32)

    share_N = weight_N / weight_N.sum().clamp(min=1e-8)
    loss = torch.zeros((), device=device)
    nll_N = torch.empty(count, device=device)
    d_hidden_ND = torch.empty_like(hidden_ND, dtype=dtype) if wanted[0] else None
    d_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wanted[1] else None
    with torch.autocast(device.type, enabled=False):
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            hidden, target, share = hidden_ND[part].to(dtype), target_N[part, None], share_N[part]
            product, scores = product_RV[: len(hidden)], float_RV[: len(hidden)]

            # The logits, in float32.
            torch.mm(hidden, head.T, out=product)
            if float_RV is not product_RV:
                scores.copy_(product)

            # The loss. `scores` becomes exp(logits - highest), whose sum is `total`.
            of_target, highest = scores.gather(1, target)[:, 0], scores.amax(1)
            total = scores.sub_(highest[:, None]).exp_().sum(1)
            lse = highest + total.log()
            nll_N[part] = lse - of_target
            loss += ((nll_N[part] + z_loss * lse.square()) * share).sum()
            if not any(wanted):
                continue

            # The gradient of the logits, in the same memory: the softmax scaled, less the target.
            scores.mul_((share * (1 + 2 * z_loss * lse) / total)[:, None])
            scores.scatter_add_(1, target, -share[:, None])
            if float_RV is not product_RV:
                product.copy_(scores)
            if d_hidden_ND is not None:
                torch.mm(product, head, out=d_hidden_ND[part])
            if d_head_VD is not None:
                d_head_VD += product.T @ hidden
    return _Results(loss, nll_N, d_hidden_ND, d_head_VD)
