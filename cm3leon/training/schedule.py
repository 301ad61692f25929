"""Learning rate as a pure function of the step."""

from __future__ import annotations


def linear_schedule(step: int, *, peak: float, warmup_steps: int, steps: int) -> float:
    """Linear warm-up to `peak`, then linear decay to zero at `steps` (OPT's polynomial decay of power 1).

    >>> [linear_schedule(s, peak=1.0, warmup_steps=2, steps=6) for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (steps - step) / (steps - warmup_steps)
