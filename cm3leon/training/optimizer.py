"""AdamW, with its groups of parameters."""

from __future__ import annotations

import torch
from torch import nn

from cm3leon.training.config import TrainingConfig
from cm3leon.types import UserError


def new_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that are trained; matrices decay, vectors (biases, norms) and `undecayed` ones do not.

    Raises:
        UserError: for 8-bit moments without torchao.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or any(word in name for word in config.undecayed)
            (others if spared else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "training.optimizer is adamw_8bit, which needs the package torchao (pip install torchao)"
        ) from error
    return AdamW8bit(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=betas
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of all groups; in place where the optimizer keeps it in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def prime(optimizer: torch.optim.Optimizer) -> None:
    """Gives a new optimizer its state tensors, to be loaded into: by a step of rate 0 that does not count."""
    rate = float(optimizer.param_groups[0]["lr"])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    set_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad()
    set_rate(optimizer, rate)
    for state in optimizer.state.values():
        state["step"].zero_()
