"""Cross-entropy of a linear output layer, without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 2**26
"""Most float32 logits that are held at a time, 256 MiB: those of 1,024 tokens over the paper's vocabulary."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    *,
    z_loss: float = 0.0,
    most_logits: int = LOGITS,
) -> tuple[Tensor, Tensor]:
    """Weighted mean of -log softmax(hidden @ head.T)[target] + z_loss * logsumexp^2, in nats.

    The second term is PaLM's (arXiv 2204.02311, section 5). Tokens are taken in chunks of at most `most_logits`
    logits. Where there are several, the gradients of both factors are made with the loss, in the forward pass, so that
    no product is computed twice and no logits are kept; the backward pass scales them.

    Args:
        weight_N: share of each token in the mean; a token of weight 0 has no gradient.

    Returns:
        the scalar loss in float32, and the negative log-likelihood of each token (N,), which carries no gradient.
    """
    rows = max(1, most_logits // len(head_VD))
    if len(hidden_ND) <= rows:
        return plain_linear_cross_entropy(hidden_ND, head_VD, target_N, weight_N, z_loss=z_loss)
    return _Chunked.apply(hidden_ND, head_VD, target_N, weight_N, z_loss, rows)


def plain_linear_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, weight_N: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same from all logits at once, by autograd alone."""
    logits_NV = F.linear(hidden_ND, head_VD).float()
    nll_N = F.cross_entropy(logits_NV, target_N, reduction="none")
    each_N = nll_N + z_loss * logits_NV.logsumexp(-1).square() if z_loss else nll_N
    return (each_N * weight_N).sum() / weight_N.sum().clamp(min=1e-8), nll_N.detach()


class _Chunked(torch.autograd.Function):
    """Chunk by chunk: dloss/dlogits = w ((1 + 2 z lse) p - y) / sum w, p the softmax and y the target's indicator."""

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
        kind = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        whole = weight_N.sum().clamp(min=1e-8)
        head = head_VD.to(dtype)
        loss = torch.zeros((), device=hidden_ND.device)
        nll_N = torch.empty(len(hidden_ND), device=hidden_ND.device)
        d_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        d_head_VD = torch.zeros(head_VD.shape, device=head_VD.device) if wants_head else None
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden_ND), rows):
                part = slice(start, start + rows)
                hidden, target, weight = hidden_ND[part].to(dtype), target_N[part, None], weight_N[part] / whole
                logits = (hidden @ head.T).float()
                lse = logits.logsumexp(-1)
                nll_N[part] = lse - logits.gather(1, target)[:, 0]
                loss += ((nll_N[part] + z_loss * lse.square()) * weight).sum()
                if not (wants_hidden or wants_head):
                    continue
                probabilities = logits.sub_(lse[:, None]).exp_()
                gradient = probabilities.mul_((weight * (1 + 2 * z_loss * lse))[:, None])
                gradient = gradient.scatter_add_(1, target, -weight[:, None]).to(dtype)
                if d_hidden_ND is not None:
                    d_hidden_ND[part] = (gradient @ head).to(d_hidden_ND.dtype)
                if d_head_VD is not None:
                    d_head_VD += gradient.T @ hidden
        ctx.d_head, ctx.dtype = d_head_VD, head_VD.dtype
        ctx.d_hidden = d_hidden_ND
        ctx.mark_non_differentiable(nll_N)
        return loss, nll_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        scale, d_hidden, d_head = gradients[0], ctx.d_hidden, ctx.d_head
        ctx.d_hidden = ctx.d_head = None
        return (
            None if d_hidden is None else d_hidden.mul_(scale),
            None if d_head is None else d_head.mul_(scale).to(ctx.dtype),
            None,
            None,
            None,
            None,
        )
