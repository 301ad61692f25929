"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from cm3leon.training.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up to the peak, then a fall to `final_rate` of it, reached after step `steps`.

    linear: OPT's polynomial decay of power 1. cosine: half a period (Loshchilov and Hutter, arXiv
    1608.03983). wsd: the peak until the last `decay_share` of the steps, then linear (arXiv
    2404.06395).

    Examples:
        >>> config = TrainingConfig(steps=6, warmup_steps=2, learning_rate=1.0)
        >>> [learning_rate(step, config) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    peak, warmup, steps = config.learning_rate, config.warmup_steps, config.steps
    if step < warmup:
        return peak * (step + 1) / warmup

    last = config.final_rate * peak
    if config.schedule == "cosine":
        angle = math.pi * (step - warmup) / (steps - warmup)
        return last + (peak - last) * (1 + math.cos(angle)) / 2

    falling = steps - warmup
    if config.schedule == "wsd":
        falling = min(falling, max(1, round(config.decay_share * steps)))
    return last + (peak - last) * min(steps - step, falling) / falling
