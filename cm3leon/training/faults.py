"""What goes wrong in a long training: losses that jump,
losses and gradients that are no numbers."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path

WINDOW, LEAST = 100, 20
"""Losses that a spike is compared with, and how many there have to be."""


class Spikes:
    """Tells losses that stand out from those before them.

    Args:
        sigma: standard deviations above the mean of the last `WINDOW` losses from which one does.
    """

    def __init__(self, sigma: float, losses: Iterable[float] = ()) -> None:
        self._sigma = sigma
        self._losses: deque[float] = deque(losses, maxlen=WINDOW)

    def look_at(self, loss: float) -> dict[str, float] | None:
        """Takes in a finite loss; what there is to say of it if it is a spike."""
        said = None
        if len(self._losses) >= LEAST:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > mean + self._sigma * deviation:
                said = {"loss": loss, "mean_before": mean, "deviation_before": deviation}
        self._losses.append(loss)
        return said

    def state(self) -> list[float]:
        """The losses looked at, for `losses` of another one."""
        return list(self._losses)


def diagnosis(*, step: int, skipped_in_a_row: int, loss: float, norm: float) -> str:
    """Why a training that gets no finite loss or gradient any more has diverged."""
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    return f"{skipped_in_a_row} steps in a row were skipped; at step {step} {what} (events.jsonl has the documents)"


def diverged(title: str, why: str, last: Path | None) -> FloatingPointError:
    """The error that ends a training whose result would be worth nothing.

    Args:
        last: its last good checkpoint, if it has one.
    """
    kept = f"the last good checkpoint is {last}" if last else "it has no good checkpoint"
    return FloatingPointError(f"{title} diverged: {why}; {kept}")
