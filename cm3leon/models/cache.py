"""The key-value cache of the decoder: preallocated, and separate from the model."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the positions seen so far, for rows that may be padded on the left.

    Rows of different prompt lengths are aligned at their last token, so that every step writes one column.

    Args:
        layers, heads, head_size: of the model.
        capacity: columns, the longest prompt plus the tokens to generate.
        padding_B: number of padding columns at the left of each row.
        dtype: of keys and values.
    """

    def __init__(
        self, *, layers: int, heads: int, head_size: int, capacity: int, padding_B: Tensor, dtype: torch.dtype
    ) -> None:
        shape = (layers, padding_B.shape[0], heads, capacity, head_size)
        self._keys = torch.zeros(shape, dtype=dtype, device=padding_B.device)
        self._values = torch.zeros(shape, dtype=dtype, device=padding_B.device)
        self._padding_B = padding_B
        self._least_padding = int(padding_B.min())
        self.capacity = capacity
        self.length = 0

    def mask(self, T: int) -> Tensor:
        """Boolean mask (B, 1, T, length + T) for the next T columns: earlier columns that are not padding.

        A padding column attends to itself: a softmax over nothing would be NaN. Its output is never used.
        Raises ValueError when there is no room for T more.
        """
        self._check_room(T)
        columns_S = torch.arange(self.length + T, device=self._padding_B.device)
        query_T1 = columns_S[self.length :, None]
        causal_TS = columns_S <= query_T1
        real_BS = columns_S >= self._padding_B[:, None]
        return ((causal_TS & real_BS[:, None, :]) | (columns_S == query_T1))[:, None]

    def longest(self, T: int) -> int:
        """Positions of the longest row, padding not counted, after the next T columns."""
        return self.length + T - self._least_padding

    def positions(self, T: int) -> Tensor:
        """Position numbers (B, T) of the next T columns: 0 at each row's first token; padding has 0."""
        columns_T = torch.arange(self.length, self.length + T, device=self._padding_B.device)
        return (columns_T - self._padding_B[:, None]).clamp(min=0)

    def append(self, layer: int, k_BATE: Tensor, v_BATE: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the keys and values of the next T columns; returns all so far, (B, A, length + T, E) each."""
        end = self.length + k_BATE.shape[2]
        self._keys[layer, :, :, self.length : end] = k_BATE
        self._values[layer, :, :, self.length : end] = v_BATE
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def advance(self, T: int) -> None:
        """Moves on by T columns, once all layers have appended theirs."""
        self.length += T

    def _check_room(self, T: int) -> None:
        if self.length + T > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} columns, {self.length} + {T} were asked for")
