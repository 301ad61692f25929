"""Min-p sampling (Nguyen et al. 2024, arXiv 2407.01082): the surer the model, the fewer tokens are
drawn from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cm3leon.config import PositiveFloat, Probability
from cm3leon.decoders.base import Decoder
from cm3leon.registry import DECODERS


@DECODERS.register("min_p")
class MinP(Decoder):
    """Samples among the tokens that are not much less likely than the most likely one.

    Of the probabilities 0.6, 0.3, 0.07 and 0.03, min_p = 0.1 keeps the first three.
    """

    @dataclass(kw_only=True)
    class Config:
        """0.05 to 0.1 are usual."""

        min_p: Probability = 0.1
        """A token stays if its probability is at least this share of the largest; 1 is greedy
        decoding."""
        temperature: PositiveFloat = 1.0
        """Divides the logits before."""

    config: Config

    def logits(self, conditional_BV: Tensor, unconditional_BV: Tensor | None = None) -> Tensor:
        scaled_BV = conditional_BV / self.config.temperature
        probability_BV = scaled_BV.softmax(-1)
        threshold_B1 = self.config.min_p * probability_BV.amax(-1, keepdim=True)
        return scaled_BV.masked_fill(probability_BV < threshold_B1, float("-inf"))
