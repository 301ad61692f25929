"""The base class of models: hidden states from ids, an output layer, and a cache to decode with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cm3leon.models.cache import KVCache
from cm3leon.models.initial import First, fill
from cm3leon.types import OnCpu, UserError

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v) -> the attended values; each tensor has the shape (B, A, T, E)."""


class LayerBytes(NamedTuple):
    """Bytes that one layer holds for each token of a training in bf16 on a GPU."""

    none: float
    """Kept for the backward pass without activation checkpointing."""
    selective: float
    """Kept under selective checkpointing."""
    full: float
    """Kept under full checkpointing."""
    backward: float
    """Gradients of the layer's widest part, while the backward pass computes them."""


class Model(nn.Module):
    """Base of the models: ids to logits. No loss, no task, no tokenizer."""

    config: Any
    """Has at least `layers`, `head_size` and `seq_len`."""
    vocab_size: int
    heads: int
    """Heads of queries of a layer; where ranks share them (`serving.share`), those of this rank."""
    kv_heads: int
    """Heads of keys and values, which the cache keeps; `heads // kv_heads` heads of queries read
    each of them."""
    matrices: ClassVar[tuple[str, ...]] = ()
    """Names of a layer's linear modules, which LoRA adapts and int8 rounds; empty for a model that
    offers neither."""
    recomputed: ClassVar[tuple[str, ...]] = ("forward",)
    """Methods of a layer that selective activation checkpointing computes again.

    Attention that stands between them is computed once, whichever backend computes it. For a layer
    in one piece, the results of known operators are kept instead.
    """
    embedding: Any
    """Token embedding. Its `weight` gives the model's device and precision."""
    blocks: Any
    """The layers. Each is recomputed, compiled and sharded as one unit."""
    head: Any
    """The output layer: linear, without bias."""

    @staticmethod
    def missing() -> str:
        """Say in a few words what building it on this machine lacks; "" if nothing."""
        return ""

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        position_BT: Tensor | None = None,
        sample_BT: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Compute the normalised hidden states (B, T, D), the input of `head`.

        Args:
            ids_BT: token ids.
            position_BT: position numbers below `seq_len`; None = 0, 1, 2 ...
            sample_BT: number of the sample of each position; attention stays inside a sample.
                None = one sample a row.
            attend: replaces attention in every layer. It is a pass of a `KVCache`, which also keeps
                the keys and values.

        Raises:
            ValueError: for more positions than `seq_len`.
        """
        raise NotImplementedError

    def firsts(self) -> list[First]:
        """List how each parameter is initialised, in the order in which they are drawn.

        With this list each rank draws its own shards. A model with an empty list is built whole by
        the first rank and sent to the others.
        """
        return []

    def share(self, rank: int, count: int) -> None:
        """Leave a rank its part of every layer, in place, as `serving.share` describes.

        Raises:
            UserError: for a number of ranks that does not divide the heads, or a model whose layers
                cannot be shared.
        """
        raise UserError(
            f"several ranks cannot share the layers of a {type(self).__name__}; start one process"
        )

    def reset_parameters(self) -> None:
        """Initialise the parameters by `firsts`, from torch's stream of random numbers."""
        parameters = dict(self.named_parameters())
        for first in self.firsts():
            fill(parameters[first.name], first)

    def layer_bytes(self, *, sharded: bool, frozen: bool) -> LayerBytes | None:
        """Return what a training holds of a layer beside its weights; None if it is not known.

        The command `plan` counts memory by it.

        Args:
            sharded: whether ranks gather the weights in bf16 (FSDP), so that layers hand on bf16.
            frozen: whether adapters alone are trained.
        """
        return None

    @property
    def matrix_weights(self) -> int:
        """Number of weights that multiply each token: the layers' matrices and the head.

        Embedding tables are looked up and do not count.
        """
        return self.head.weight.numel() + sum(matrix.numel() for matrix in self._matrices())

    @property
    def matrix_sizes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a layer's `matrices`, by name."""
        block = self.blocks[0]
        return {name: tuple(getattr(block, name).weight.shape) for name in self.matrices}

    def _matrices(self) -> list[Tensor]:
        """List the weights of the layers' linear modules: by name, or else all of two dimensions."""
        if self.matrices:
            return [getattr(block, name).weight for block in self.blocks for name in self.matrices]
        return [weight for weight in self.blocks.parameters() if weight.dim() == 2]

    def attention_on(self, device: torch.device) -> str:
        """Name the backend for training on the device, with the reasons against preferred ones."""
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
        """Compute the logits (B, T, V) of the token after each position; arguments as in `hidden`.

        With a `readout`, the result of `readout(hidden_BTD, head)` is returned instead. A loss that
        never holds all logits needs the head's weight, and a sharded model has its weights only
        while its forward pass runs.
        """
        if isinstance(sample_BT, OnCpu):
            sample_BT = sample_BT.tensor
        hidden_BTD = self.hidden(
            ids_BT, position_BT=position_BT, sample_BT=sample_BT, attend=attend
        )
        return self.head(hidden_BTD) if readout is None else readout(hidden_BTD, self.head)

    @property
    def seq_len(self) -> int:
        """Largest number of positions of a sequence."""
        return self.config.seq_len

    def default_positions(self, ids_BT: Tensor) -> Tensor:
        """Count the positions (1, T) of ids that were given without position numbers.

        Raises:
            ValueError: for more positions than `seq_len`.
        """
        T = ids_BT.shape[1]
        if self.seq_len < T:
            raise ValueError(f"{T} positions were asked for, the model has seq_len {self.seq_len}")
        return torch.arange(T, device=ids_BT.device)[None]

    def new_cache(self, *, groups: int, width: int, prefix: int, tail: int) -> KVCache:
        """Build an empty cache; `KVCache` explains the arguments.

        Call it under the autocast of the passes, because its precision follows autocast.
        """
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
        """Return the bytes of the cache that `new_cache` would build."""
        columns = groups * (prefix + width * tail)
        return self.cache_numbers * columns * self._cache_dtype().itemsize

    @property
    def cache_numbers(self) -> int:
        """Count of numbers in the keys and values of one position, over all layers."""
        return 2 * self.config.layers * self.kv_heads * self.config.head_size

    def _cache_dtype(self) -> torch.dtype:
        """Return the precision of keys and values: on a GPU that of its computation.

        On a CPU it is float32 at least, because 16-bit products there round their partial sums.
        """
        weight = self.embedding.weight
        device = weight.device.type
        if device == "cpu":
            return torch.float64 if weight.dtype == torch.float64 else torch.float32
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return weight.dtype
