"""Attention where fairseq2 lets it be replaced: by xformers, or by a pass of our cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from fairseq2.logging import log
from fairseq2.models.transformer import (
    SDPA,
    AttentionBias,
    AttentionBiasCache,
    CausalAttentionBias,
    IdentityBias,
    NaiveSDPA,
    TorchSDPA,
)
from fairseq2.nn import BatchLayout
from torch import Tensor

from cm3leon.models.attention import Attention
from cm3leon.models.base import Attend
from cm3leon.registry import ATTENTIONS


class XformersSDPA(SDPA):
    """xformers' memory_efficient_attention on CUDA; elsewhere, and for anything that it cannot do,
    fairseq2's TorchSDPA.

    The reason for falling back is logged once. All sequences become one row with a block-diagonal
    mask: those of a packed batch as they lie, those of a padded batch each followed by its padding
    as a sequence of its own.

        seq_lens [2, 1] of a padded batch of width 3        seq_lens [2, 1] of a packed batch of width 4
            a b .   ->   a b | . | c | . .                      a b c .   ->   a b | c | .
            c . .

    Args:
        bias: which keys each query may attend to.
        dropout_p: dropout of the attention weights, in training.
        scale: factor of the scores; None = 1/sqrt(K).
    """

    def __init__(
        self, bias: AttentionBias, *, dropout_p: float = 0.0, scale: float | None = None
    ) -> None:
        super().__init__()
        self.bias, self.dropout_p, self.scale = bias, dropout_p, scale
        self._torch = TorchSDPA(bias, dropout_p=dropout_p, scale=scale)

    def forward(
        self,
        q: Tensor,
        q_layout: BatchLayout,
        k: Tensor,
        k_layout: BatchLayout,
        v: Tensor,
        bias_cache: AttentionBiasCache,
        *,
        needs_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: values in the shape of q, (N, S, H, K) for a padded batch or (S, H, K) for a
        packed one.

        Raises:
            NotSupportedError: if attention weights are asked for, which neither xformers nor
                TorchSDPA returns.
        """
        reason = "it gives no weights of attention"
        if not needs_weights:
            reason = self._why_not(q, q_layout, k_layout)
        if reason:
            _log_fallback(reason)
            return self._fall_back(q, q_layout, k, k_layout, v, bias_cache, needs_weights)

        from xformers.ops import memory_efficient_attention

        # xformers does not follow autocast by itself, and takes all sequences as one row.
        device = q.device.type
        if torch.is_autocast_enabled(device):
            q, k, v = (each.to(torch.get_autocast_dtype(device)) for each in (q, k, v))
        attended = memory_efficient_attention(
            *(each.reshape(1, -1, *each.shape[-2:]) for each in (q, k, v)),
            attn_bias=self._mask(q_layout, k_layout, bias_cache),
            p=self.dropout_p if self.training else 0.0,
            scale=self.scale,
        )
        return attended.view(*q.shape[:-1], v.shape[-1]), None

    def _why_not(self, q: Tensor, q_layout: BatchLayout, k_layout: BatchLayout) -> str:
        """Why xformers cannot be used; "" if it can."""
        if missing := ATTENTIONS.get("xformers").missing(q.device):
            return f"it lacks {missing}"
        if q.dtype == torch.float64:
            return "it has no float64"
        if not isinstance(self.bias, IdentityBias | CausalAttentionBias):
            return f"it has no mask for {self.bias}"
        if q_layout is k_layout:
            return ""
        if _is_padded(q_layout) != _is_padded(k_layout):
            return "it has no mask for padding among queries or keys alone"
        if getattr(self.bias, "attn_window_len", None) and _lengths(q_layout) != _lengths(k_layout):
            return "it has no mask for a window over more keys than queries"
        return ""

    def _fall_back(
        self,
        q: Tensor,
        q_layout: BatchLayout,
        k: Tensor,
        k_layout: BatchLayout,
        v: Tensor,
        bias_cache: AttentionBiasCache,
        needs_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by TorchSDPA. A packed batch is computed sequence by sequence, since its mask
        would have a row for every position."""
        if not q_layout.packed or q_layout is not k_layout or needs_weights:
            return self._torch(q, q_layout, k, k_layout, v, bias_cache, needs_weights=needs_weights)

        # Each sequence is a batch of its own for a moment, whose mask is no larger than it needs.
        lengths = _lengths(q_layout)
        pieces = []
        sequences = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        for one_q, one_k, one_v in sequences:
            layout = BatchLayout.of(one_q[None])
            attended, _ = self._torch(
                one_q[None], layout, one_k[None], layout, one_v[None], AttentionBiasCache()
            )
            pieces.append(attended[0])
        return torch.cat(pieces), None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def _mask(
        self, q_layout: BatchLayout, k_layout: BatchLayout, bias_cache: AttentionBiasCache
    ) -> Any:
        """The bias for xformers, made once for all layers of a pass."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        mask = bias_cache.maybe_get(self.bias, "xformers", BlockDiagonalMask)
        if mask is None:
            mask = xformers_mask(self.bias, _lengths(q_layout), _lengths(k_layout))
            bias_cache.set(self.bias, "xformers", mask)
        return mask

    def extra_repr(self) -> str:
        return f"bias={self.bias}, dropout_p={self.dropout_p:G}"


def xformers_mask(bias: AttentionBias, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> Any:
    """The block-diagonal mask of xformers that allows what `bias` allows within each sequence.

    If there are more keys than queries, the last query stands at the last key, as in fairseq2.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(q_lengths, k_lengths)
    if isinstance(bias, IdentityBias):
        return mask
    if q_lengths != k_lengths:
        return mask.make_causal_from_bottomright()
    if bias.attn_window_len is None:
        return mask.make_causal()
    return mask.make_local_attention(bias.attn_window_len)


def _lengths(layout: BatchLayout) -> list[int]:
    """The lengths of a batch's sequences in the order of memory; padding counts as sequences,
    too."""
    if layout.packed:
        lengths = list(layout.seq_lens)
        padding = layout.width - sum(lengths)
        if padding:
            lengths.append(padding)
        return lengths

    # Each row is a sequence and its padding, either of which may be empty.
    lengths = []
    for length in layout.seq_lens:
        for part in (length, layout.width - length):
            if part:
                lengths.append(part)
    return lengths


def _is_padded(layout: BatchLayout) -> list[bool]:
    """Whether there is padding behind each row; a packed batch is one row."""
    ends = [sum(layout.seq_lens)] if layout.packed else layout.seq_lens
    return [end < layout.width for end in ends]


@cache
def _log_fallback(reason: str) -> None:
    """Log once that xformers is not used."""
    log.info("Attention is computed by TorchSDPA, not by xformers: {}.", reason)


SDPAS = {"auto": XformersSDPA, "sdpa": TorchSDPA, "naive": NaiveSDPA}
"""The factory of a layer's attention, by the value of `model.attention`."""


class Pass:
    """Takes the place of a BatchLayout in a pass in which our cache computes the attention."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend


class Packed:
    """Takes the place of a BatchLayout in training with one of our attention backends.

    The positions at which samples begin are a tensor in its plan, so that one compiled graph serves
    every packing; in fairseq2's layouts they are Python's numbers.
    """

    def __init__(self, attention: Attention, plan: Any) -> None:
        self.attention, self.plan = attention, plan


class CacheableSDPA(SDPA):
    """Attention of one layer: by whatever takes the place of the layout, or by another SDPA."""

    def __init__(self, layer: int, sdpa: SDPA) -> None:
        super().__init__()
        self.layer, self.sdpa = layer, sdpa

    def forward(
        self,
        q: Tensor,
        q_layout: BatchLayout | Pass | Packed,
        k: Tensor,
        k_layout: BatchLayout | Pass | Packed,
        v: Tensor,
        bias_cache: AttentionBiasCache,
        *,
        needs_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        q_BATE, k_BATE, v_BATE = (each.transpose(1, 2) for each in (q, k, v))
        if isinstance(q_layout, Packed):
            attended_BATE = q_layout.attention(q_BATE, k_BATE, v_BATE, q_layout.plan)
        elif isinstance(q_layout, Pass):
            attended_BATE = q_layout.attend(self.layer, q_BATE, k_BATE, v_BATE)
        else:
            return self.sdpa(q, q_layout, k, k_layout, v, bias_cache, needs_weights=needs_weights)
        return attended_BATE.transpose(1, 2), None
