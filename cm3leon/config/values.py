"""What a swept key takes, written in a line: `1e-4,3e-4`, `range(3)`, `uniform(0,0.3)`,
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
"""Values that a key of a run or an evaluation may take: there is a run, or a row, for each."""
DIGITS = 4
"""Significant digits of a drawn value: few enough for the name of its point to tell it whole."""
LEGEND = "write values as a,b,c or range(n), or uniform(low,high) and loguniform(low,high) for sweep_trials"

_CALL = re.compile(r"([a-z_]+)\(([^()]*)\)")
_INT = re.compile(r"-?\d{1,9}")


@dataclass(frozen=True)
class Choice:
    """One of several values, of any type that YAML has."""

    values: Sequence[Any]

    def draw(self, random: random.Random) -> Any:
        """One of them, each as likely as the others."""
        return random.choice(self.values)


@dataclass(frozen=True)
class Interval:
    """A number between two others; even on a logarithmic scale where `logarithmic`."""

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
    """The values of a swept key: a list as it is, text as `LEGEND` says,
    anything else as a single value.

    Args:
        where: the dotted path of the key, for messages.
        read: makes what the key takes of one value, which is a `Word` where it was typed.

    Raises:
        UserError: for text that is none of these, bounds in the wrong order, or no values at all.
    """
    values = _values(where, given, read)
    if isinstance(values, Choice) and not len(values.values):
        raise UserError(f"{where} is {given}, which has no values; {LEGEND}")
    return values


def parse_lists(swept: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    """The values of every key that is swept, for what has no draws.

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
    call = _CALL.fullmatch(given.strip())
    if call is None:
        values = parse_word(Word(f"[{given}]"), where)
        # Typed with brackets around all of them, they are a list as a file has it.
        if isinstance(given, Word) and len(values) == 1 and isinstance(values[0], list):
            (values,) = values
        return Choice(tuple(map(read, values)))
    name, numbers = call[1], [number.strip() for number in call[2].split(",")]
    if (
        name == "range"
        and 1 <= len(numbers) <= 3
        and all(map(_INT.fullmatch, numbers))
        and (len(numbers) < 3 or int(numbers[2]) != 0)
    ):
        return Choice(range(*map(int, numbers)))
    if name in ("uniform", "loguniform") and len(numbers) == 2:
        interval = _interval(*numbers, logarithmic=name == "loguniform")
        if interval:
            return interval
        least = "0 < low < high" if name == "loguniform" else "low < high"
        raise UserError(f"{where} is {given}; it must be {name}(low,high) with numbers, {least}")
    raise UserError(f"{where} is {given}, which is not understood; {LEGEND}")


def _interval(low: str, high: str, *, logarithmic: bool) -> Interval | None:
    try:
        bounds = Interval(float(low), float(high), logarithmic)
    except ValueError:
        return None
    finite = math.isfinite(bounds.low) and math.isfinite(bounds.high)
    return (
        bounds
        if finite and bounds.low < bounds.high and (bounds.low > 0 or not logarithmic)
        else None
    )
