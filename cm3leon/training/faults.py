"""Faults of a long training: losses that jump, losses and gradients that are not finite."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path

WINDOW = 100
"""Losses that a spike is compared with."""
LEAST = 20
"""Losses that must be there before one can be a spike."""


class Spikes:
    """Find losses that stand out from those before them.

    Args:
        sigma: standard deviations above the mean of the last `WINDOW` losses from which a loss is
            a spike.
    """

    def __init__(self, sigma: float, losses: Iterable[float] = ()) -> None:
        self._sigma = sigma
        self._losses: deque[float] = deque(losses, maxlen=WINDOW)

    def look_at(self, loss: float) -> dict[str, float] | None:
        """Take in a finite loss; return figures about it if it is a spike."""
        said = None
        if len(self._losses) >= LEAST:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > mean + self._sigma * deviation:
                said = {"loss": loss, "mean_before": mean, "deviation_before": deviation}
        self._losses.append(loss)
        return said

    def state(self) -> list[float]:
        """The losses seen last, which another `Spikes` can start with."""
        return list(self._losses)


def diagnosis(*, step: int, skipped_in_a_row: int, loss: float, norm: float) -> str:
    """Why a training without finite losses or gradients is given up."""
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    return (
        f"{skipped_in_a_row} steps in a row were skipped; at step {step} {what} "
        "(events.jsonl lists their documents)"
    )


def diverged(title: str, why: str, last: Path | None) -> FloatingPointError:
    """The error that ends a training whose result would be useless.

    Args:
        last: its last good checkpoint, if there is one.
    """
    kept = f"the last good checkpoint is {last}" if last else "it has no good checkpoint"
    return FloatingPointError(f"{title} diverged: {why}; {kept}")
