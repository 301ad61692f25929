"""The smallest complete plugin: one decoder, registered by name, chosen with `decoder=top_k decoder.k=64`.

`python -m cm3leon.run --list` shows it as `top_k` from `plugins/example`. To make your own, copy this folder, or put
one like it anywhere and name its path in the experiment: `plugins: [path/to/folder]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cm3leon.config import PositiveInt
from cm3leon.registry import DECODERS


@DECODERS.register("top_k")
class TopK:
    """Samples among the k most likely tokens.

    With k = 2, the logits `[1, 4, 3, 2]` become `[-inf, 4, 3, -inf]`.
    """

    streams = 1

    @dataclass(kw_only=True)
    class Config:
        """One setting is enough for an example."""

        k: PositiveInt = 50
        """Number of tokens kept; ties with the last of them stay too."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def logits(self, conditional_BV: Tensor, unconditional_BV: Tensor | None) -> Tensor:
        """The conditional logits, those below the k largest set to -inf."""
        k = min(self.config.k, conditional_BV.shape[-1])
        threshold_B1 = conditional_BV.topk(k).values[:, -1:]
        return conditional_BV.masked_fill(conditional_BV < threshold_B1, float("-inf"))
