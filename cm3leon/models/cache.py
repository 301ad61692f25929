"""The key-value cache of the decoder: preallocated, separate from the model, with prefixes that rows share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Keys and values of G groups of W rows that decode together.

    The rows of a group begin alike: what they have in common, the prefix, is computed and kept once. What follows is
    each row's own, its tail. Three passes through the model fill them: `prefix_pass`, `tail_pass`, and `step_pass` for
    the next tokens of every row. Each is given to the model as `attend`.

        group 0   prefix  <eos> documents           rows 0, 1   tails  a red dog <break> I7 I2 ...
                                                    rows 2, 3   tails  <mask:0> <break> I7 I2 ...
        group 1   prefix  <eos>                     rows 4 ...

    Args:
        layers, heads, head_size: of the model; `heads` are those of keys and values, which may be fewer than those of
            queries. Each is then read by as many heads of queries in a row.
        prefix, tail: columns of each prefix and of each tail.
        dtype: of keys and values.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        head_size: int,
        groups: int,
        width: int,
        prefix: int,
        tail: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.groups, self.width, self.prefix, self.tail = groups, width, prefix, tail
        shared = (layers, groups, heads, prefix, head_size)
        own = (layers, groups * width, heads, tail, head_size)
        self._prefix_k, self._prefix_v = (
            torch.zeros(shared, dtype=dtype, device=device) for _ in range(2)
        )
        self._tail_k, self._tail_v = (
            torch.zeros(own, dtype=dtype, device=device) for _ in range(2)
        )
        self.prefix_length_G = torch.zeros(groups, dtype=torch.int64, device=device)
        self.tail_length_R = torch.zeros(groups * width, dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        return self._tail_k.device

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(
            each.nbytes for each in (self._prefix_k, self._prefix_v, self._tail_k, self._tail_v)
        )

    def prefix_pass(self, group_B: Tensor, length_B: Tensor) -> PrefixPass:
        """For the prefixes of some groups, of these lengths, padded on the right."""
        self.prefix_length_G[group_B] = length_B
        return PrefixPass(self, group_B)

    def tail_pass(self, group_B: Tensor, row_BCN: Tensor, length_BC: Tensor) -> TailPass:
        """For C different tails in each of some groups, padded on the right, each kept for N rows."""
        self.tail_length_R[row_BCN] = length_BC[:, :, None].expand_as(row_BCN)
        return TailPass(self, group_B, row_BCN)

    def step_pass(self, groups: int, prefix: int, tail: int, tokens: int = 1) -> StepPass:
        """For the next tokens of every row of the first `groups` groups.

        They become part of the tails for good when `tail_length_R` is raised; until then the next pass replaces them.

        Args:
            prefix, tail: columns of each that are read; these tokens' own are among the latter.
        """
        return StepPass(self, groups, prefix, tail, tokens)

    def reorder(self, row_N: Tensor, source_N: Tensor) -> None:
        """Gives rows the tails of others of their group."""
        for store in (self._tail_k, self._tail_v):
            store[:, row_N] = store[:, source_N]
        self.tail_length_R[row_N] = self.tail_length_R[source_N]


class PrefixPass:
    """Causal attention inside each prefix, whose keys and values are kept."""

    def __init__(self, cache: KVCache, group_B: Tensor) -> None:
        self._cache, self._group_B = cache, group_B

    def positions(self, T: int) -> Tensor:
        """Position numbers (1, T)."""
        return torch.arange(T, device=self._group_B.device)[None]

    def __call__(self, layer: int, q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor) -> Tensor:
        cache, T = self._cache, q_BATE.shape[2]
        cache._prefix_k[layer, self._group_B, :, :T] = k_BATE.to(cache._prefix_k.dtype)
        cache._prefix_v[layer, self._group_B, :, :T] = v_BATE.to(cache._prefix_v.dtype)
        fewer = k_BATE.shape[1] < q_BATE.shape[1]
        return F.scaled_dot_product_attention(
            q_BATE, k_BATE, v_BATE, is_causal=True, enable_gqa=fewer
        )


class TailPass:
    """Attention of tails to their group's prefix and causally to themselves; keys and values are kept for all rows."""

    def __init__(self, cache: KVCache, group_B: Tensor, row_BCN: Tensor) -> None:
        self._cache, self._group_B = cache, group_B
        self._row_QN = row_BCN.flatten(0, 1)
        self._streams = row_BCN.shape[1]
        self._length_B = cache.prefix_length_G[group_B]
        self._prefix = int(self._length_B.max())

    def positions(self, T: int) -> Tensor:
        """Position numbers (B * C, T)."""
        first_Q = self._length_B.repeat_interleave(self._streams)
        return first_Q[:, None] + torch.arange(T, device=first_Q.device)

    def __call__(self, layer: int, q_QATE: Tensor, k_QATE: Tensor, v_QATE: Tensor) -> Tensor:
        cache, T = self._cache, q_QATE.shape[2]
        k_QATE, v_QATE = (each.to(cache._tail_k.dtype) for each in (k_QATE, v_QATE))
        cache._tail_k[layer, self._row_QN, :, :T] = k_QATE[:, None]
        cache._tail_v[layer, self._row_QN, :, :T] = v_QATE[:, None]
        causal_TT = torch.ones(T, T, dtype=torch.bool, device=q_QATE.device).tril()
        return shared_attention(
            q_QATE,
            cache._prefix_k[layer, self._group_B, :, : self._prefix],
            cache._prefix_v[layer, self._group_B, :, : self._prefix],
            k_QATE,
            v_QATE,
            _below(self._length_B, self._prefix),
            causal_TT.expand(len(q_QATE), T, T),
        )


class StepPass:
    """Attention of the next tokens of every row to its group's prefix, its own tail, and causally to themselves."""

    def __init__(self, cache: KVCache, groups: int, prefix: int, tail: int, tokens: int) -> None:
        self._cache, self._groups, self._prefix, self._tail = cache, groups, prefix, tail
        rows = groups * cache.width
        self._row_R1 = torch.arange(rows, device=cache.device)[:, None]
        column_RT = cache.tail_length_R[:rows, None] + torch.arange(tokens, device=cache.device)
        self._column_RT = column_RT.clamp(max=cache.tail - 1)  # rows that nobody uses may be full
        self._length_G = cache.prefix_length_G[:groups]
        self._mask_GP = _below(self._length_G, prefix)
        self._mask_RTS = _below(self._column_RT + 1, tail)

    def positions(self, T: int) -> Tensor:
        """Position numbers (R, T)."""
        return self._length_G.repeat_interleave(self._cache.width)[:, None] + self._column_RT

    def __call__(self, layer: int, q_RATE: Tensor, k_RATE: Tensor, v_RATE: Tensor) -> Tensor:
        cache, rows = self._cache, len(self._row_R1)
        cache._tail_k[layer, self._row_R1, :, self._column_RT] = k_RATE.transpose(1, 2).to(
            cache._tail_k.dtype
        )
        cache._tail_v[layer, self._row_R1, :, self._column_RT] = v_RATE.transpose(1, 2).to(
            cache._tail_v.dtype
        )
        return shared_attention(
            q_RATE,
            cache._prefix_k[layer, : self._groups, :, : self._prefix],
            cache._prefix_v[layer, : self._groups, :, : self._prefix],
            cache._tail_k[layer, :rows, :, : self._tail],
            cache._tail_v[layer, :rows, :, : self._tail],
            self._mask_GP,
            self._mask_RTS,
        )


def _below(length_N: Tensor, columns: int) -> Tensor:
    """Mask (..., columns) of the first columns of each."""
    return torch.arange(columns, device=length_N.device) < length_N[..., None]


def shared_attention(
    q_RATE: Tensor,
    prefix_k_GAPE: Tensor,
    prefix_v_GAPE: Tensor,
    k_RASE: Tensor,
    v_RASE: Tensor,
    mask_GP: Tensor,
    mask_RTS: Tensor,
) -> Tensor:
    """Softmax attention to a group's prefix and the row's own columns together, scaled by 1/sqrt(E): (R, A, T, E).

    All queries of a group read its prefix in one matrix product. Scores and softmax are float32.
    """
    R, A, T, E = q_RATE.shape
    shared = A // k_RASE.shape[1]
    if shared > 1:
        # Heads of queries that read the same keys are so many more queries of one head.
        folded = shared_attention(
            q_RATE.unflatten(1, (-1, shared)).flatten(2, 3),
            prefix_k_GAPE,
            prefix_v_GAPE,
            k_RASE,
            v_RASE,
            mask_GP,
            mask_RTS.repeat(1, shared, 1),
        )
        return folded.unflatten(2, (shared, T)).flatten(1, 2)

    G, _, P, _ = prefix_k_GAPE.shape
    W, dtype = R // G, k_RASE.dtype

    def by_group(x_RATN: Tensor) -> Tensor:
        return x_RATN.unflatten(0, (G, W)).transpose(1, 2).flatten(2, 3)

    def by_row(x_GAQN: Tensor) -> Tensor:
        return x_GAQN.unflatten(2, (W, T)).transpose(1, 2).flatten(0, 1)

    with torch.autocast(q_RATE.device.type, enabled=False):
        scaled_RATE = q_RATE.to(dtype) / math.sqrt(E)
        own_RATS = _float_product(scaled_RATE, k_RASE.transpose(2, 3)).masked_fill(
            ~mask_RTS[:, None], -math.inf
        )
        if not P:
            return (own_RATS.softmax(-1).to(dtype) @ v_RASE).to(q_RATE.dtype)
        prefix_GAQP = _float_product(by_group(scaled_RATE), prefix_k_GAPE.transpose(2, 3))
        prefix_GAQP = prefix_GAQP.masked_fill(~mask_GP[:, None, None], -math.inf)
        share_RATX = torch.cat([by_row(prefix_GAQP), own_RATS], -1).softmax(-1).to(dtype)
        attended_RATE = (
            by_row(by_group(share_RATX[..., :P]) @ prefix_v_GAPE) + share_RATX[..., P:] @ v_RASE
        )
    return attended_RATE.to(q_RATE.dtype)


def _float_product(x_BAMK: Tensor, y_BAKN: Tensor) -> Tensor:
    """The product, in float32 where the factors have 16 bits; on a GPU it is added up in that, too."""
    if x_BAMK.dtype.itemsize >= 4:
        return x_BAMK @ y_BAKN
    if x_BAMK.device.type != "cuda":
        return (x_BAMK @ y_BAKN).float()
    product = torch.bmm(x_BAMK.flatten(0, 1), y_BAKN.flatten(0, 1), out_dtype=torch.float32)
    return product.unflatten(0, x_BAMK.shape[:2])
