"""Moving average of the weights (Polyak averaging)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cm3leon.training.distributed import local


class WeightAverage:
    """Exponential moving average of a module's parameters; its buffers are not averaged.

    The decay rises to `decay` as (1 + step) / (10 + step), so that the average of a short run is
    not dominated by its beginning.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._parameters = dict(module.named_parameters())
        self._average = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int, bad: Tensor) -> None:
        """Add the weights after `step` steps to the average, unless the step was bad.

        Args:
            bad: 1 for a bad step, else 0; a float32 scalar on the weights' device, which is not
                waited for.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        share = (1 - decay) * (1 - bad)
        for name, average in self._average.items():
            local(average).lerp_(local(self._parameters[name]), share)

    @torch.no_grad()
    def install(self) -> None:
        """Replace the module's weights by the average."""
        for name, average in self._average.items():
            self._parameters[name].copy_(average)

    def tensors(self) -> dict[str, Tensor]:
        """The average by the parameters' names; saving and loading use these tensors themselves."""
        return self._average
