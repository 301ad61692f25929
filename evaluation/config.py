"""How models are asked, as in YAML: the settings of an evaluation, what it sweeps, and aims."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cm3leon.config import (
    Component,
    NoEffect,
    NonNegativeInt,
    PositiveInt,
    Seed,
    Settings,
    apply_overrides,
    component_sections,
    from_mapping,
    parse_lists,
    split_key,
)
from cm3leon.registry import DECODERS, PROTOCOLS
from cm3leon.types import UserError


@dataclass(kw_only=True)
class AskConfig:
    """How a model is asked."""

    documents: NonNegativeInt = 0
    """Retrieved documents before the prompt."""
    shuffled: bool = False
    """Whether to give each prompt the documents of another prompt, as a control."""
    samples: PositiveInt = 1
    """Answers drawn for an item; the best by CLIP counts."""
    decoder: Annotated[Component, DECODERS] | None = None
    """How tokens are drawn; null: as the model's own experiment says."""
    bank: Path | None = None
    """Run folder whose documents are the memory bank; null: that of the model's own experiment."""
    ranker: Path | None = None
    """Run folder whose retriever's CLIP chooses the best of several samples; null: that of the
    model's own run."""
    checkpoint: PositiveInt | None = None
    """Step of the pretraining whose weights are asked, one that its `training.keep_every` kept;
    null: the last."""
    seed: Seed = 0
    """Seed of the first sample of the first item."""
    max_tokens: PositiveInt | None = None
    """Most tokens of an answer in text; null: as many as the protocol says."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """A protocol, and the settings under which models are asked its items."""

    title: Annotated[str, NoEffect("what the report calls it")]
    """What the report calls it."""
    protocol: Annotated[Component, PROTOCOLS]
    """What is asked, and how the answers are measured."""
    setting: Annotated[dict[str, Any], Settings(AskConfig)] = field(default_factory=dict)
    """How models are asked: documents, shuffled, samples, decoder, bank, ranker, checkpoint,
    seed, max_tokens."""
    sweep: Annotated[dict[str, Any], Settings(AskConfig, swept=True)] = field(default_factory=dict)
    """Dotted keys of the setting and their values: a list, `1,2,5` or `range(3)`; each model and
    combination is a row."""
    plot: Annotated[str | None, NoEffect("what is drawn")] = None
    """The metric to plot; null: only a table."""

    def check(self) -> None:
        given, self.sweep = self.sweep, {}  # refused values must not become rows
        self.sweep = parse_lists(given, "sweep")
        if self.plot and not self.sweep and self.needs_sweep():
            raise UserError(
                f"plot is {self.plot}, which is drawn against the first key of sweep; sweep is "
                "empty: give it a key, or leave plot out"
            )

    def needs_sweep(self) -> bool:
        """Whether its plot needs a swept key."""
        return True

    def points(self, where: str) -> Iterator[tuple[dict[str, Any], AskConfig]]:
        """Each combination of the swept values, with its setting.

        Args:
            where: the section of the setting, for messages.

        Raises:
            UserError: for an invalid setting.
        """
        for point in combinations(self.sweep):
            yield point, from_mapping(AskConfig, with_values(self.setting, point), where)


@dataclass(kw_only=True)
class Aim:
    """What a figure should reach, shown at the top of the report."""

    label: str
    """Its label there."""
    evaluation: str
    """Name of the evaluation."""
    row: str
    """Name of the row: the model, and the swept values."""
    metric: str
    """Name of the figure."""
    at_least: float | None = None
    """The value it should reach; null: none."""
    at_most: float | None = None
    """The value it should not exceed; null: none."""


def with_values(setting: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """A setting with the values of a point. Raises UserError for keys that lead nowhere."""
    overrides = [(split_key(key), value) for key, value in point.items()]
    return apply_overrides(dict(setting), overrides, component_sections(AskConfig))


def combinations(sweep: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of some keys; {} alone if there are no keys."""
    for values in itertools.product(*sweep.values()):
        yield dict(zip(sweep, values, strict=True))


def named(point: Mapping[str, Any]) -> list[str]:
    """The values of a point as in the name of a row: `documents 2`, `cfg 3`."""
    return [f"{key.split('.')[-1]} {shown(value)}" for key, value in point.items()]


def shown(value: Any) -> str:
    """A swept value as in the name of a row: `2`, `0.5`, `contrastive alpha 0.3`."""
    if isinstance(value, Mapping):
        words = [str(value.get("name", ""))]
        for key, of_key in value.items():
            if key != "name":
                words.append(f"{key} {shown(of_key)}")
        return " ".join(words).strip()
    if isinstance(value, list):
        return " and ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
