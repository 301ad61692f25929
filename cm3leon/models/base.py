"""What a model is: hidden states of ids, an output layer, and the cache that its passes may fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cm3leon.models.cache import KVCache
from cm3leon.models.initial import First, fill
from cm3leon.types import OnCpu, UserError

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v) -> what is attended to, (B, A, T, E) each."""


class LayerBytes(NamedTuple):
    """What a training in bf16 on a GPU holds of a layer for each token, in bytes, by activation checkpointing."""

    none: float
    """Kept for the backward pass where nothing is computed again."""
    selective: float
    full: float
    backward: float
    """Of gradients of its widest part, while they are computed."""


class Model(nn.Module):
    """Base of the models: ids to logits. No loss, no task, no tokenizer."""

    config: Any
    """Has at least `layers`, `head_size` and `seq_len`."""
    vocab_size: int
    heads: int
    """Heads of a layer; where ranks share them (`serving.share`), those of this one."""
    kv_heads: int
    """Heads of keys and values, each read by as many heads of queries: what a cache keeps."""
    matrices: ClassVar[tuple[str, ...]] = ()
    """Names of a layer's linear modules, all that LoRA adapts and int8 rounds; none where a model offers neither."""
    recomputed: ClassVar[tuple[str, ...]] = ("forward",)
    """Methods of a layer that selective activation checkpointing computes again. Where attention stands between them,
    it is computed once, whatever computes it; of a layer in one piece, known operators' results are kept."""
    embedding: Any
    """Table of the tokens; its `weight` says where the decoder is, and in what precision."""
    blocks: Any
    """The layers: what is recomputed, compiled and sharded as one."""
    head: Any
    """The output layer, linear, without bias."""

    @staticmethod
    def missing() -> str:
        """What is missing to build it on this machine, in a few words; "" if nothing is."""
        return ""

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        position_BT: Tensor | None = None,
        sample_BT: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Normalised hidden states (B, T, D), the input of `head`.

        Args:
            ids_BT: token ids.
            position_BT: position numbers below `seq_len`; None = 0, 1, 2 ...
            sample_BT: the sample each position belongs to; attention stays inside it. None = one sample a row.
            attend: attention by other means, in every layer: a pass of a `KVCache`, which keeps keys and values.

        Raises:
            ValueError: for more positions than `seq_len`.
        """
        raise NotImplementedError

    def firsts(self) -> list[First]:
        """How each parameter begins, in the order in which they are drawn; empty for a model that begins otherwise.

        Ranks draw shards of such models by it, where others are built whole by the first rank and sent.
        """
        return []

    def share(self, rank: int, count: int) -> None:
        """Leaves a rank its part of every layer, in place, as `serving.share` says.

        Raises:
            UserError: for a number of ranks that does not divide the heads, or a model whose layers are not shared.
        """
        raise UserError(f"several ranks cannot share the layers of a {type(self).__name__}")

    def reset_parameters(self) -> None:
        """The parameters as they begin, by `firsts`, from torch's stream of random numbers."""
        parameters = dict(self.named_parameters())
        for first in self.firsts():
            fill(parameters[first.name], first)

    def layer_bytes(self, *, sharded: bool, frozen: bool) -> LayerBytes | None:
        """What a training holds of a layer beside weights, as a plan counts it; None = it is not known.

        Args:
            sharded: whether ranks gather the weights in bf16 (FSDP), so that layers hand on bf16.
            frozen: whether adapters alone are trained.
        """
        return None

    @property
    def matrix_weights(self) -> int:
        """Weights that each token is multiplied by: those of the layers' matrices and the head, not of the tables."""
        return self.head.weight.numel() + sum(matrix.numel() for matrix in self._matrices())

    @property
    def matrix_sizes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a layer's `matrices`, by name."""
        block = self.blocks[0]
        return {name: tuple(getattr(block, name).weight.shape) for name in self.matrices}

    def _matrices(self) -> list[Tensor]:
        """Weights of the layers' linear modules; where they are not named, all that have two dimensions."""
        if self.matrices:
            return [getattr(block, name).weight for block in self.blocks for name in self.matrices]
        return [weight for weight in self.blocks.parameters() if weight.dim() == 2]

    def attention_on(self, device: torch.device) -> str:
        """What attention is computed with in a training on that device, and why not with what is preferred."""
        raise NotImplementedError

    def forward(
        self,
        ids_BT: Tensor,
        *,
        position_BT: Tensor | None = None,
        sample_BT: Tensor | OnCpu | None = None,
        attend: Attend | None = None,
        readout: Callable[[Tensor, nn.Linear], Any] | None = None,
    ) -> Any:
        """Logits (B, T, V) of the token after each position; arguments as in `hidden`.

        `readout(hidden_BTD, head)` is called instead where it is given, and its result returned: a loss that never
        holds all logits needs the head's weight, which a sharded model has only while its forward pass runs.
        """
        if isinstance(sample_BT, OnCpu):
            sample_BT = sample_BT.tensor
        hidden_BTD = self.hidden(
            ids_BT, position_BT=position_BT, sample_BT=sample_BT, attend=attend
        )
        return self.head(hidden_BTD) if readout is None else readout(hidden_BTD, self.head)

    @property
    def seq_len(self) -> int:
        """Most positions of a sequence."""
        return self.config.seq_len

    def default_positions(self, ids_BT: Tensor) -> Tensor:
        """Position numbers (1, T) of ids that none were given for.

        Raises:
            ValueError: for more positions than `seq_len`.
        """
        T = ids_BT.shape[1]
        if self.seq_len < T:
            raise ValueError(f"{T} positions were asked for, the model has seq_len {self.seq_len}")
        return torch.arange(T, device=ids_BT.device)[None]

    def new_cache(self, *, groups: int, width: int, prefix: int, tail: int) -> KVCache:
        """An empty cache, see there. Call it under the autocast of the passes: its precision follows it."""
        return KVCache(
            layers=self.config.layers,
            heads=self.kv_heads,
            head_size=self.config.head_size,
            groups=groups,
            width=width,
            prefix=prefix,
            tail=tail,
            dtype=self._cache_dtype(),
            device=self.embedding.weight.device,
        )

    def cache_bytes(self, *, groups: int, width: int, prefix: int, tail: int) -> int:
        """Bytes of such a cache."""
        columns = groups * (prefix + width * tail)
        return self.cache_numbers * columns * self._cache_dtype().itemsize

    @property
    def cache_numbers(self) -> int:
        """Numbers of a position's keys and values in all layers."""
        return 2 * self.config.layers * self.kv_heads * self.config.head_size

    def _cache_dtype(self) -> torch.dtype:
        """That of what is computed on a GPU; float32 on a CPU, whose 16-bit products do not keep their sums."""
        weight = self.embedding.weight
        if weight.device.type == "cpu":
            return torch.float64 if weight.dtype == torch.float64 else torch.float32
        return (
            torch.get_autocast_dtype(weight.device.type)
            if torch.is_autocast_enabled(weight.device.type)
            else weight.dtype
        )
