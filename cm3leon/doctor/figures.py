"""A measured number, its goal, and what other projects reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured number, or the reason why there is none."""

    part: str
    """The measurement that it belongs to."""
    name: str
    value: float | None
    unit: str
    note: str = ""
    """What it was measured with; without a value, the reason."""


@dataclass(frozen=True)
class Goal:
    """A number to reach on a device, and what other projects reach."""

    gpu: str
    """A word of the device's name by CUDA."""
    name: str
    """The figure's name."""
    bound: float
    lowest: bool
    """Whether the figure should be at least `bound`; else at most."""
    anchor: str
    """What other projects reach, with the source."""

    def is_met(self, value: float) -> bool:
        """Whether a figure reaches the goal."""
        if self.lowest:
            return value >= self.bound
        return value <= self.bound

    @property
    def text(self) -> str:
        """The goal for a table: ≥ 0.5."""
        return f"{'≥' if self.lowest else '≤'} {self.bound:g}"


MFU_7B = "MFU, layers of the 7B, bf16"
FLOAT8_GAIN = "float8 over bf16, layers of the 7B"
ONE_IMAGE = {kind: f"one image, 7B, {kind}" for kind in ("bf16", "int8", "fp8")}
MANY_IMAGES = {kind: f"64 images at once, 7B, {kind}" for kind in ("bf16", "int8", "fp8")}

_PAPER = (
    "the paper: 11.8 s in bf16, 9.1 s in int8, on its hardware; "
    "floor of the bandwidth: 4.1 s in bf16"
)
_TENSORRT = "2.6: what TensorRT-LLM's published rate comes to"
GOALS = (
    Goal("H100", MFU_7B, 0.5, True, "llm-foundry 7B: 0.404; torchtitan 8B: 0.33 to 0.39"),
    Goal("H100", FLOAT8_GAIN, 1.25, True, "torchtitan: 1.28 over compiled bf16"),
    Goal("H100", ONE_IMAGE["bf16"], 6.0, False, _PAPER),
    Goal("H100", ONE_IMAGE["int8"], 3.7, False, _PAPER),
    Goal("H100", ONE_IMAGE["fp8"], 3.7, False, _PAPER),
    Goal("H100", MANY_IMAGES["bf16"], 4.0, True, _TENSORRT),
    Goal("H200", MFU_7B, 0.5, True, "llm-foundry 7B on H100: 0.404; torchtitan 8B: 0.33 to 0.39"),
    Goal("H200", FLOAT8_GAIN, 1.25, True, "torchtitan on H100: 1.28 over compiled bf16"),
    Goal("H200", ONE_IMAGE["bf16"], 4.0, False, _PAPER),
    Goal("H200", ONE_IMAGE["int8"], 3.7, False, _PAPER),
    Goal("H200", ONE_IMAGE["fp8"], 3.7, False, _PAPER),
    Goal("H200", MANY_IMAGES["bf16"], 5.0, True, _TENSORRT),
)


def goal_of(name: str, device: str) -> tuple[Goal | None, bool]:
    """The goal of a figure, and whether it is for this device; on other devices, the H100's
    goal."""
    goals = [goal for goal in GOALS if goal.name == name]
    for goal in goals:
        if goal.gpu in device:
            return goal, True
    return next(iter(goals), None), False


def attempted(
    part: str, name: str, unit: str, measure: Callable[[], tuple[float, str]]
) -> Iterator[Figure]:
    """The figure of a function that returns value and note; if it raises, a figure with the
    reason."""
    try:
        value, note = measure()
    except Exception as error:  # of any kernel and library: the next figure may still be there
        yield Figure(part, name, None, unit, reason(error))
        return
    yield Figure(part, name, value, unit, note)


def reason(error: BaseException) -> str:
    """An error in one line."""
    first = str(error).strip().partition("\n")[0]
    if not first:
        return type(error).__name__
    return f"{type(error).__name__}: {first}"
