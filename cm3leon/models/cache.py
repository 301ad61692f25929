"""The key-value cache: preallocated, separate from the model, with prefixes that rows share.

A batch of G = 2 groups of W = 2 rows holds its keys and values in two stores:

    prefix store, one strip per group        tail store, one strip per row

    group 0   <eos> documents ......         row 0   a red dog <break> I7 I2 ..
                                             row 1   <mask:0> <break> I7 I2 ..
    group 1   <eos> ................         row 2   a small ..
                                             row 3   ..

A token's position number counts through the group's prefix and then the row's tail. Since a prefix
is read by all rows of its group in one matrix product, W rows cost little more than one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Keys and values of G groups of W rows that decode together.

    The rows of a group begin with the same tokens, the prefix, which is computed and kept once.
    What follows is the tail of each row. Three passes through the model fill them: `prefix_pass`,
    `tail_pass`, and `step_pass` for the next tokens of every row. Each is handed to the model as
    its `attend`.

    Args:
        layers: number of the model's layers.
        heads: number of heads of keys and values. With fewer of them than heads of queries,
            consecutive heads of queries read the same keys.
        head_size: width of a head.
        groups: number of groups, G.
        width: rows of each group, W.
        prefix: columns of each prefix.
        tail: columns of each tail.
        dtype: precision of keys and values.
        device: where they are kept.
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
        """The device of keys and values."""
        return self._tail_k.device

    @property
    def score_dtype(self) -> torch.dtype:
        """The precision of attention's scores, float32 at least."""
        return torch.promote_types(self._tail_k.dtype, torch.float32)

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(
            each.nbytes for each in (self._prefix_k, self._prefix_v, self._tail_k, self._tail_v)
        )

    def prefix_pass(self, group_B: Tensor, length_B: Tensor) -> PrefixPass:
        """Return the pass for prefixes of the given groups and lengths, padded on the right."""
        self.prefix_length_G[group_B] = length_B
        return PrefixPass(self, group_B)

    def tail_pass(self, group_B: Tensor, row_BCN: Tensor, length_BC: Tensor) -> TailPass:
        """Return the pass for C different tails in each given group, padded on the right.

        Args:
            group_B: the groups, whose prefixes are complete.
            row_BCN: the N rows of a group that keep each tail.
            length_BC: tokens of each tail.
        """
        self.tail_length_R[row_BCN] = length_BC[:, :, None].expand_as(row_BCN)
        return TailPass(self, group_B, row_BCN)

    def step_pass(self, groups: int, prefix: int, tail: int, tokens: int = 1) -> StepPass:
        """Return the pass for the next tokens of every row of the first `groups` groups.

        The tokens join the tails only when the caller raises `tail_length_R`; until then the next
        pass overwrites them.

        Args:
            groups: number of groups that are computed.
            prefix: columns of each prefix that are read.
            tail: columns of each tail that are read, including those of these tokens.
            tokens: tokens of each row.
        """
        return StepPass(self, groups, prefix, tail, tokens)

    def reorder(self, row_N: Tensor, source_N: Tensor) -> None:
        """Copy tails between rows of one group: row N takes the tail of its source."""
        for store in (self._tail_k, self._tail_v):
            store[:, row_N] = store[:, source_N]
        self.tail_length_R[row_N] = self.tail_length_R[source_N]


class PrefixPass:
    """Causal attention inside each prefix; it fills the prefixes of the cache."""

    def __init__(self, cache: KVCache, group_B: Tensor) -> None:
        self._cache, self._group_B = cache, group_B

    def positions(self, T: int) -> Tensor:
        """Position numbers (1, T) of the first T columns."""
        return torch.arange(T, device=self._group_B.device)[None]

    def __call__(self, layer: int, q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor) -> Tensor:
        cache, T = self._cache, q_BATE.shape[2]
        cache._prefix_k[layer, self._group_B, :, :T] = k_BATE.to(cache._prefix_k.dtype)
        cache._prefix_v[layer, self._group_B, :, :T] = v_BATE.to(cache._prefix_v.dtype)

        # The new keys are all that there is to see: nothing has to be read back.
        fewer = k_BATE.shape[1] < q_BATE.shape[1]
        return F.scaled_dot_product_attention(
            q_BATE, k_BATE, v_BATE, is_causal=True, enable_gqa=fewer
        )


class TailPass:
    """Attention of tails to their group's prefix and, causally, to themselves.

    It fills the tails of all rows that begin with these tokens.
    """

    def __init__(self, cache: KVCache, group_B: Tensor, row_BCN: Tensor) -> None:
        self._cache, self._group_B = cache, group_B
        self._row_QN = row_BCN.flatten(0, 1)
        self._streams = row_BCN.shape[1]
        self._length_B = cache.prefix_length_G[group_B]
        self._prefix = int(self._length_B.max())

    def positions(self, T: int) -> Tensor:
        """Position numbers (B * C, T), which continue those of the prefix."""
        first_Q = self._length_B.repeat_interleave(self._streams)
        return first_Q[:, None] + torch.arange(T, device=first_Q.device)

    def __call__(self, layer: int, q_QATE: Tensor, k_QATE: Tensor, v_QATE: Tensor) -> Tensor:
        cache, T = self._cache, q_QATE.shape[2]
        k_QATE, v_QATE = (each.to(cache._tail_k.dtype) for each in (k_QATE, v_QATE))
        cache._tail_k[layer, self._row_QN, :, :T] = k_QATE[:, None]
        cache._tail_v[layer, self._row_QN, :, :T] = v_QATE[:, None]

        # Every query sees the whole prefix of its group, and the tail up to itself.
        causal_TT = torch.ones(T, T, dtype=torch.bool, device=q_QATE.device).tril()
        seen_BP = _below(self._length_B, self._prefix)
        return shared_attention(
            q_QATE,
            cache._prefix_k[layer, self._group_B, :, : self._prefix],
            cache._prefix_v[layer, self._group_B, :, : self._prefix],
            k_QATE,
            v_QATE,
            _bias(seen_BP, causal_TT.expand(len(q_QATE), T, T), cache.score_dtype),
        )


class StepPass:
    """Attention of every row's next tokens to the group's prefix, the row's tail and themselves.

    With W = 2, a prefix of 3 of the 4 columns read, tails of 2 and 1 tokens and one new token each
    (`n`), the columns that the two queries see are:

                prefix     tail
        row 0   1 1 1 .    1 1 n .
        row 1   1 1 1 .    1 n . .
    """

    def __init__(self, cache: KVCache, groups: int, prefix: int, tail: int, tokens: int) -> None:
        self._cache, self._groups, self._prefix, self._tail = cache, groups, prefix, tail
        self._rows = rows = groups * cache.width
        column_RT = cache.tail_length_R[:rows, None] + torch.arange(tokens, device=cache.device)
        self._column_RT = column_RT.clamp(max=cache.tail - 1)  # unused rows may be full
        self._length_G = cache.prefix_length_G[:groups]

        # All layers share these two: the index that new keys and values are written to, counted
        # through rows, heads and columns, and the columns that each query sees.
        heads = cache._tail_k.shape[2]
        strip_RA = torch.arange(rows * heads, device=cache.device).view(rows, heads)
        self._place_N = (strip_RA[..., None] * cache.tail + self._column_RT[:, None]).flatten()
        self._bias_RTX = _bias(
            _below(self._length_G, prefix), _below(self._column_RT + 1, tail), cache.score_dtype
        )

    def positions(self, T: int) -> Tensor:
        """Position numbers (R, T), behind the tail so far."""
        return self._length_G.repeat_interleave(self._cache.width)[:, None] + self._column_RT

    def __call__(self, layer: int, q_RATE: Tensor, k_RATE: Tensor, v_RATE: Tensor) -> Tensor:
        cache, rows, E = self._cache, self._rows, q_RATE.shape[-1]
        for store, new_RATE in ((cache._tail_k, k_RATE), (cache._tail_v, v_RATE)):
            new_NE = new_RATE.reshape(-1, E).to(store.dtype)
            store[layer].view(-1, E).index_copy_(0, self._place_N, new_NE)

        return shared_attention(
            q_RATE,
            cache._prefix_k[layer, : self._groups, :, : self._prefix],
            cache._prefix_v[layer, : self._groups, :, : self._prefix],
            cache._tail_k[layer, :rows, :, : self._tail],
            cache._tail_v[layer, :rows, :, : self._tail],
            self._bias_RTX,
        )


def _below(length_N: Tensor, columns: int) -> Tensor:
    """Return the mask (..., columns) that is true for the first `length` columns of each."""
    return torch.arange(columns, device=length_N.device) < length_N[..., None]


def _bias(seen_GP: Tensor, seen_RTS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias (R, T, P + S) of scores: 0 where a query sees the column, -inf elsewhere.

    Args:
        seen_GP: whether the rows of a group see each column of its prefix.
        seen_RTS: whether each query sees each column of its row.
        dtype: precision of the scores.
    """
    R, T, _ = seen_RTS.shape
    seen_RTP = seen_GP.repeat_interleave(R // len(seen_GP), 0)[:, None].expand(R, T, -1)
    seen_RTX = torch.cat([seen_RTP, seen_RTS], -1)
    return torch.zeros_like(seen_RTX, dtype=dtype).masked_fill_(~seen_RTX, -math.inf)


def shared_attention(
    q_RATE: Tensor,
    prefix_k_GBPE: Tensor,
    prefix_v_GBPE: Tensor,
    k_RBSE: Tensor,
    v_RBSE: Tensor,
    bias_RTX: Tensor,
) -> Tensor:
    """Compute softmax attention to a group's prefix and the row's own columns, scaled by 1/sqrt(E).

    All queries of a group read its prefix in one matrix product. The A / B heads of queries that
    read the same keys are treated as further queries of one head, Q = A / B * T in all. Scores and
    softmax are float32. The time of a step with few rows is that of launching its operators, so
    the scores of prefix and tail are added side by side to one copy of the bias.

    Args:
        q_RATE: queries of A heads.
        prefix_k_GBPE: keys of each group's prefix, B heads and P columns.
        prefix_v_GBPE: values of the same.
        k_RBSE: keys of each row's own columns.
        v_RBSE: values of the same.
        bias_RTX: 0 for the columns (X = P + S) that a query sees and -inf for others, in the
            precision of the scores.

    Returns:
        The attended values (R, A, T, E).
    """
    R, A, T, E = q_RATE.shape
    G, B, P, _ = prefix_k_GBPE.shape
    S, W, Q, dtype = k_RBSE.shape[2], R // G, A // B * T, k_RBSE.dtype
    scale = 1 / math.sqrt(E)

    with torch.autocast(q_RATE.device.type, enabled=False):
        q_NQE = q_RATE.to(dtype).reshape(R * B, Q, E)
        k_NSE, v_NSE = k_RBSE.flatten(0, 1), v_RBSE.flatten(0, 1)
        if not P:
            score_NQS = _for_each_head(bias_RTX, 1, B, A // B).view(R * B, Q, S)
            _add_product(score_NQS, q_NQE, k_NSE, scale)
            attended_NQE = score_NQS.softmax(-1).to(dtype) @ v_NSE
            return attended_NQE.view(R, A, T, E).to(q_RATE.dtype)

        # Scores of the prefix, for all rows of a group at once ...
        score_MLX = _for_each_head(bias_RTX, W, B, A // B).view(G * B, W * Q, P + S)
        q_MLE = q_NQE.view(G, W, B, Q, E).transpose(1, 2).reshape(G * B, W * Q, E)
        _add_product(score_MLX[..., :P], q_MLE, prefix_k_GBPE.flatten(0, 1), scale)

        # ... and, in the columns behind it, scores of each row's own keys.
        own_NQS = _float_product(q_NQE, k_NSE.transpose(1, 2))
        own_GBWQS = score_MLX.view(G, B, W, Q, P + S)[..., P:]
        own_GBWQS.add_(own_NQS.view(G, W, B, Q, S).transpose(1, 2), alpha=scale)

        # One softmax over both; then the values of each part, summed.
        share_MLX = score_MLX.softmax(-1).to(dtype)
        own_NQS = share_MLX.view(G, B, W, Q, P + S)[..., P:].transpose(1, 2).reshape(R * B, Q, S)
        shared_MLE = share_MLX[..., :P] @ prefix_v_GBPE.flatten(0, 1)
        attended_GWBQE = shared_MLE.view(G, B, W, Q, E).transpose(1, 2) + (own_NQS @ v_NSE).view(
            G, W, B, Q, E
        )
    return attended_GWBQE.reshape(R, A, T, E).to(q_RATE.dtype)


def _for_each_head(bias_RTX: Tensor, rows: int, heads: int, queries: int) -> Tensor:
    """Copy the bias for each head of keys and for each of the heads of queries that read it.

    Returns:
        A contiguous tensor (R / rows, heads, rows, queries, T, X).
    """
    R, T, X = bias_RTX.shape
    bias_GBWHTX = bias_RTX.view(R // rows, 1, rows, 1, T, X).expand(-1, heads, -1, queries, -1, -1)
    return bias_GBWHTX.clone(memory_format=torch.contiguous_format)


def _add_product(score_NQS: Tensor, q_NQE: Tensor, k_NSE: Tensor, scale: float) -> None:
    """Add the scaled products of queries and keys to the scores, in place."""
    if score_NQS.dtype == q_NQE.dtype:
        score_NQS.baddbmm_(q_NQE, k_NSE.transpose(1, 2), alpha=scale)
    else:
        score_NQS.add_(_float_product(q_NQE, k_NSE.transpose(1, 2)), alpha=scale)


def _float_product(x_NMK: Tensor, y_NKL: Tensor) -> Tensor:
    """Multiply matrices, with a float32 result for factors of 16 bits.

    A GPU also sums the products in float32.
    """
    if x_NMK.dtype.itemsize >= 4:
        return x_NMK @ y_NKL
    if x_NMK.device.type != "cuda":
        return (x_NMK @ y_NKL).float()
    return torch.bmm(x_NMK, y_NKL, out_dtype=torch.float32)
