"""Points of a sweep: all combinations of its values, or some drawn at random, by their names.

`sweep: {training.learning_rate: [1e-4, 3e-4], seed: range(2)}` has four points:

    learning_rate=0.0001,seed=0    learning_rate=0.0001,seed=1
    learning_rate=0.0003,seed=0    learning_rate=0.0003,seed=1
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from cm3leon.config import (
    LEGEND,
    Choice,
    Interval,
    NonNegativeInt,
    PositiveInt,
    Settings,
    parse_values,
    settled,
    split_key,
    typed_value,
)
from cm3leon.evaluation.config import combinations, shown
from cm3leon.experiment import SWEEP, Experiment
from cm3leon.types import UserError

MAX_POINTS = 1000
"""Most points of a sweep: SLURM's arrays have no more elements by default."""
MAX_NAME = 200
"""Most characters of a point's name, which is the name of a folder."""
_FIXED = ("launcher", "plugins", "until")
_DRAWS = 100


@dataclass(kw_only=True)
class SweepConfig:
    """What is swept; the same keys in an experiment and in the run of a study."""

    sweep: Annotated[dict[str, Any], Settings(Experiment, swept=True)] = field(default_factory=dict)
    """Dotted keys of the experiment and their values: a list, `1e-4,3e-4`, `range(3)`,
    `uniform(0,0.3)`, `loguniform(1e-5,1e-3)`; each combination is a run."""
    sweep_trials: PositiveInt | None = None
    """Number of points drawn at random; null: all combinations of the values."""
    sweep_seed: NonNegativeInt = 0
    """Seed of the draws; more trials with the same seed are the same points and further ones."""
    sweep_retries: NonNegativeInt = 1
    """Times that a failed point is tried again."""
    sweep_best: str | None = None
    """Which point the table marks as best: `lowest` or `highest`, and a column of the table; null:
    lowest loss, if there is one."""

    def check(self) -> None:
        if self.sweep_best and not re.fullmatch(r"(lowest|highest) \S.*", self.sweep_best):
            raise UserError(
                f"sweep_best is {self.sweep_best}; it must be lowest or highest, a space, and a "
                "column of the table, for example lowest loss"
            )
        for key in self.sweep:
            if key.partition(".")[0] in _FIXED:
                raise UserError(
                    f"sweep.{key} cannot be swept; {', '.join(_FIXED)} are the same for all points"
                )


@dataclass(kw_only=True)
class ExperimentSweep(SweepConfig):
    """What an experiment says of its sweep, beside the sections of an experiment."""

    sweep_of: str | None = None
    """What the report calls the experiment; null:
    the name with which the sweep was first started."""

    def check(self) -> None:
        if not self.sweep:
            raise UserError(
                f"sweep is empty; give sweep.KEY=VALUES with a key of the experiment; {LEGEND}"
            )
        super().check()


Point = Mapping[str, Any]
"""Dotted keys and their values at one point."""


def values_of(swept: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """The values of each swept key, see `parse_values`, each of the type that its key has.

    Raises:
        UserError: for values that are not understood.
    """

    def reader(key: str) -> Callable[[Any], Any]:
        path = split_key(key)
        return lambda value: settled(Any, typed_value(Experiment, sections, path, value))

    found = {}
    for key, given in swept.items():
        found[key] = parse_values(f"{SWEEP}.{key}", given, reader(key))
    return found


def named_points(
    config: SweepConfig,
    values: Mapping[str, Choice | Interval],
    name_of: Callable[[Point], str] | None = None,
) -> dict[str, Point]:
    """The points by name, in the order of the keys and their values.

    Args:
        name_of: names a point; None: as in `learning_rate=0.001,seed=2`.

    Raises:
        UserError: for values of which there are infinitely many, too many points, or two points of
            one name.
    """
    points = _drawn(config, values) if config.sweep_trials else list(_grid(config, values))
    short = short_names(list(values))

    named: dict[str, Point] = {}
    for point in points:
        name = name_of(point) if name_of else point_name(point, short)
        if name in named:
            raise UserError(
                f"sweep: two points are named {name}, so they would share a folder; leave out "
                "values that are equal, or that differ only in characters which names of folders "
                "cannot have"
            )
        if len(name) > MAX_NAME:
            raise UserError(
                f"sweep: the name of a point, {name[:40]}..., has more than {MAX_NAME} letters; "
                "sweep fewer keys"
            )
        named[name] = point
    return named


def point_name(point: Point, short: Mapping[str, str]) -> str:
    """`learning_rate=0.001,seed=2`, of characters that need no quotes in shells,
    SLURM and file names."""
    parts = []
    for key, value in point.items():
        parts.append(f"{short[key]}={_safe(shown(value))}")
    return ",".join(parts)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, with as many parts before it as tell it from the others.

    `["training.steps", "retriever_training.steps", "seed"]` have `training.steps`,
    `retriever_training.steps`, `seed`.
    """
    short = {}
    for key in keys:
        parts = key.split(".")
        others = [f".{other}" for other in keys if other != key]
        short[key] = key
        for count in range(1, len(parts) + 1):
            tail = ".".join(parts[-count:])
            if not any(other.endswith(f".{tail}") for other in others):
                short[key] = tail
                break
    return short


def _grid(config: SweepConfig, values: Mapping[str, Choice | Interval]) -> Iterator[Point]:
    lists: dict[str, Sequence[Any]] = {}
    for key, of in values.items():
        if isinstance(of, Interval):
            raise UserError(
                f"sweep.{key} is {config.sweep[key]}, a range to draw from; say how many points to "
                "draw with sweep_trials=N, for example sweep_trials=20"
            )
        lists[key] = of.values
    count = math.prod(map(len, lists.values()))
    if count > MAX_POINTS:
        raise UserError(
            f"sweep has {count:,} points; it must have at most {MAX_POINTS:,}, or sweep_trials=N "
            "of them"
        )
    return combinations(lists)


def _drawn(config: SweepConfig, values: Mapping[str, Choice | Interval]) -> list[Point]:
    """Different random points; more trials only add points."""
    trials = config.sweep_trials or 0
    if trials > MAX_POINTS:
        raise UserError(f"sweep_trials is {trials:,}; it must be at most {MAX_POINTS:,}")

    source = random.Random(config.sweep_seed)
    different: dict[str, Point] = {}
    for _ in range(_DRAWS * trials):
        point = {key: of.draw(source) for key, of in values.items()}
        different.setdefault(str(point), point)
        if len(different) == trials:
            return list(different.values())
    raise UserError(
        f"sweep_trials is {trials}, but only {len(different)} different points were found; ask for "
        "fewer"
    )


def _safe(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
