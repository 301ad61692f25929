"""Moving average of the weights (Polyak averaging)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a module's parameters; its buffers are not averaged.

    The decay rises to `decay` as (1 + step) / (10 + step), so that a short run is not an average of its beginning.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._parameters = dict(module.named_parameters())
        self._average = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after that many steps."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, average in self._average.items():
            average.lerp_(self._parameters[name], 1 - decay)

    @torch.no_grad()
    def install(self) -> None:
        """Makes the average the module's weights."""
        for name, average in self._average.items():
            self._parameters[name].copy_(average)

    def tensors(self) -> dict[str, Tensor]:
        """The average itself by the parameters' names, to be saved or loaded into."""
        return self._average
