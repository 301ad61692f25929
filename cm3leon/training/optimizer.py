"""AdamW or Muon, with their groups of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cm3leon.models.base import Model
from cm3leon.training.config import TrainingConfig
from cm3leon.training.muon import MuonWithAdamW
from cm3leon.types import UserError


def new_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained.

    Matrices decay; vectors (biases, norms) and `undecayed` ones do not. Muon takes the matrices of
    a decoder's layers, and AdamW its embeddings, positions, head and vectors.

    Raises:
        UserError: for 8-bit moments without torchao.
    """
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "muon":
        assert isinstance(module, Model)
        inside = {id(p) for p in module.blocks.parameters() if p.ndim == 2}
        return MuonWithAdamW(
            _groups([(n, p) for n, p in trained if id(p) in inside], config),
            _groups([(n, p) for n, p in trained if id(p) not in inside], config),
            rate=config.learning_rate,
            betas=betas,
            precision=config.precision,
        )

    groups = _groups(trained, config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "training.optimizer is adamw_8bit, which needs the package torchao (pip install "
            "torchao)"
        ) from error
    return AdamW8bit(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=betas
    )


def _groups(
    named: Sequence[tuple[str, nn.Parameter]], config: TrainingConfig
) -> list[dict[str, Any]]:
    """Two groups: the parameters that decay, and those that do not."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        spared = parameter.ndim < 2 or any(word in name for word in config.undecayed)
        (others if spared else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups, in place if the optimizer keeps it in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def prime(optimizer: torch.optim.Optimizer) -> None:
    """Create a new optimizer's state tensors, to be loaded into, by a step at rate 0 that does not
    count."""
    rate = float(optimizer.param_groups[0]["lr"])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    set_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad()
    set_rate(optimizer, rate)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
