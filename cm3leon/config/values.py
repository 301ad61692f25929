"""The values of a swept key, written on one line: `1e-4,3e-4`, `range(3)`, `uniform(0,0.3)`,
`loguniform(1e-5,1e-3)`."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cm3leon.config.check import settled
from cm3leon.config.files import Word, parse_word
from cm3leon.types import UserError

MAX_VALUES = 1000
"""Most values of a key: each is a run or a row."""
DIGITS = 4
"""Significant digits of a drawn value: few enough to be shown whole in the name of its point."""
LEGEND = (
    "write values as a,b,c or range(n), or uniform(low,high) and loguniform(low,high) for "
    "sweep_trials"
)

_CALL = re.compile(r"([a-z_]+)\(([^()]*)\)")
_INT = re.compile(r"-?\d{1,9}")


@dataclass(frozen=True)
class Choice:
    """One of several values, of any type that YAML has."""

    values: Sequence[Any]

    def draw(self, random: random.Random) -> Any:
        """One of the values, all equally likely."""
        return random.choice(self.values)


@dataclass(frozen=True)
class Interval:
    """A number between two others; uniform on a logarithmic scale if `logarithmic`."""

    low: float
    high: float
    logarithmic: bool

    def draw(self, random: random.Random) -> float:
        """A number of `DIGITS` significant digits, within the bounds."""
        if self.logarithmic:
            value = math.exp(random.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = random.uniform(self.low, self.high)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)


def parse_values(
    where: str, given: Any, read: Callable[[Any], Any] = lambda word: settled(Any, word)
) -> Choice | Interval:
    """The values of a swept key: a list as it is, a text as `LEGEND` says,
    anything else as one value.

    Args:
        where: the dotted path of the key, for messages.
        read: converts a single value to the key's type; the value is a `Word` if it was typed.

    Raises:
        UserError: for a text that is none of these, bounds in the wrong order, or no values.
    """
    values = _values(where, given, read)
    if isinstance(values, Choice) and not len(values.values):
        raise UserError(f"{where} is {given}, which has no values; {LEGEND}")
    return values


def parse_lists(swept: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    """The values of every swept key, where none can be drawn at random.

    Raises:
        UserError: for values that are not understood, or of which there are infinitely many.
    """
    lists = {}
    for key, given in swept.items():
        values = parse_values(f"{where}.{key}", given)
        if isinstance(values, Interval):
            raise UserError(
                f"{where}.{key} is {given}, a range to draw from, which is for sweeps with "
                "sweep_trials; write values as a,b,c or range(n)"
            )
        if len(values.values) > MAX_VALUES:
            raise UserError(
                f"{where}.{key} has {len(values.values):,} values; it must have at most "
                f"{MAX_VALUES:,}"
            )
        lists[key] = list(values.values)
    return lists


def _values(where: str, given: Any, read: Callable[[Any], Any]) -> Choice | Interval:
    if isinstance(given, list):
        return Choice(tuple(given))
    if not isinstance(given, str):
        return Choice((given,))

    # Without a call such as range(3), it is a list; the brackets may be left out.
    call = _CALL.fullmatch(given.strip())
    if call is None:
        values = parse_word(Word(f"[{given}]"), where)
        if isinstance(given, Word) and len(values) == 1 and isinstance(values[0], list):
            (values,) = values
        return Choice(tuple(map(read, values)))

    name, numbers = call[1], [number.strip() for number in call[2].split(",")]
    if name == "range" and len(numbers) <= 3 and all(map(_INT.fullmatch, numbers)):
        step = int(numbers[2]) if len(numbers) == 3 else 1
        if step != 0:
            return Choice(range(*map(int, numbers)))
    if name in ("uniform", "loguniform") and len(numbers) == 2:
        interval = _interval(*numbers, logarithmic=name == "loguniform")
        if interval:
            return interval
        least = "0 < low < high" if name == "loguniform" else "low < high"
        raise UserError(f"{where} is {given}; it must be {name}(low,high) with numbers, {least}")
    raise UserError(f"{where} is {given}, which is not understood; {LEGEND}")


def _interval(low: str, high: str, *, logarithmic: bool) -> Interval | None:
    """The interval between two numbers; None if they are not the bounds of one."""
    try:
        bounds = Interval(float(low), float(high), logarithmic)
    except ValueError:
        return None
    if not (math.isfinite(bounds.low) and math.isfinite(bounds.high)):
        return None
    if bounds.low >= bounds.high or (logarithmic and bounds.low <= 0):
        return None
    return bounds
