"""The parts of config classes: bounds, marks, components, and how fields are read."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, Union, get_args, get_origin, runtime_checkable


@dataclass(frozen=True)
class Range:
    """Bounds of a number, as in `Annotated[int, Range(ge=1)]`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the value lies within the bounds; NaN never does."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Temperature = Annotated[float, Range(ge=0.01)]
"""Lower temperatures would make the softmax of float32 logits one-hot or NaN;
use the decoder greedy."""
Guidance = Annotated[float, Range(ge=0, le=1000)]
"""Weight of guidance; with larger ones float32 logits of a trained model can overflow."""
Seed = Annotated[int, Range(ge=0, le=2**64 - 1)]
"""Any number of 64 bits, such as a time in nanoseconds; see `seeds.wrapped`."""
Probability = Annotated[float, Range(ge=0, le=1)]


@dataclass(frozen=True)
class Location:
    """Marks a field that says where files lie: `Annotated[str, Location()]`.

    Fields of type Path need no mark. A result depends on what the files hold, not on where they
    lie; see `result_settings`. In a mapping, the keys are the locations.
    """

    or_name: bool = False
    """Whether a value that is not a file on this machine is a name,
    such as the tag of published weights."""


@dataclass(frozen=True)
class Settings:
    """Marks a mapping from keys of a config class, dotted or whole sections, to values.

    Whoever applies the mapping checks it; the schema for editors knows the keys by this mark.
    """

    cls: type
    swept: bool = False
    """Whether each key has several values, as a list or words such as range(3)."""


@dataclass(frozen=True)
class NoEffect:
    """Marks a field that changes no result:
    `Annotated[int, NoEffect("how often figures are logged")]`."""

    why: str
    """What the field is about instead, for readers of the class."""


@dataclass(frozen=True)
class Later:
    """Marks a field that came after results that are still valid:
    `Annotated[Probability, Later()]`. At its default it is left out of what results depend on, so
    that finished runs stay up to date."""


@dataclass(frozen=True)
class Component:
    """A component chosen by its registry name, with its checked `Config`; the registry builds it.

    A field for one is annotated `Annotated[Component, MODELS]`; in YAML it is
    `{name: cm3leon, layers: 24}`, or only the name.
    """

    name: str
    config: Any


@dataclass(kw_only=True)
class NoSettings:
    """The `Config` of a component without settings."""


@runtime_checkable
class SelfChecked(Protocol):
    """A config class that checks what the types of its fields cannot say."""

    def check(self) -> None:
        """Raise UserError for settings that do not go together."""


@runtime_checkable
class ComponentChecker(Protocol):
    """What the metadata of an `Annotated[Component, ...]` must offer; registries do."""

    kind: str

    def check(self, section: Any, where: str, *, unfit: list[str] | None = None) -> Component:
        """Check a section of a config at a dotted path; `unfit` as in `from_mapping`."""

    def config_class(self, name: str) -> Any:
        """The `Config` of a component. Raises UserError for an unknown name."""

    def names(self) -> list[str]:
        """All names, sorted."""

    def summary(self, name: str) -> str:
        """What a component is, on one line."""


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The annotations of a config class's fields, with their marks."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def key_of(field: dataclasses.Field[Any]) -> str:
    """The key of a field: its name without the underscore that keeps it from being a Python
    keyword, as in `from_`."""
    return field.name.removesuffix("_")


def component_sections(cls: type) -> frozenset[str]:
    """Dotted paths of the component fields of a config class;
    `*` stands for the index in a list."""
    paths = set()
    for name, annotation in hints_of(cls).items():
        nested = nested_dataclass(annotation)
        if checker_of(annotation):
            paths.add(name)
        elif get_origin(annotation) is list and checker_of(get_args(annotation)[0]):
            paths.add(f"{name}.*")
        elif nested:
            paths |= {f"{name}.{path}" for path in component_sections(nested)}
    return frozenset(paths)


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a config must give the field."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field that has one."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def is_union(annotation: Any) -> bool:
    """Whether it is `X | Y`, written in either way."""
    return get_origin(annotation) in (Union, types.UnionType)


def checker_of(annotation: Any) -> ComponentChecker | None:
    """The registry of `Annotated[Component, REGISTRY]`, also with `| None`;
    None for other annotations."""
    if is_union(annotation):
        return next(filter(None, map(checker_of, get_args(annotation))), None)
    if get_origin(annotation) is Annotated and get_args(annotation)[0] is Component:
        return annotation.__metadata__[0]
    return None


def nested_dataclass(annotation: Any) -> type | None:
    """The dataclass of `X` or `X | None`; None for other annotations."""
    members = get_args(annotation) if is_union(annotation) else (annotation,)
    return next((member for member in members if dataclasses.is_dataclass(member)), None)  # type: ignore[return-value]  # a class
