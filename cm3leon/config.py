"""Typed configuration: plain mappings (YAML, command line) to checked dataclasses and back.

A config class is a keyword-only dataclass with one sentence under every field:

    @dataclass(kw_only=True)
    class Config:
        layers: PositiveInt = 24
        \"\"\"Number of transformer layers.\"\"\"

`from_mapping(Config, {"layers": 0}, "model")` then raises UserError("model.layers is 0; it must be a whole number, at
least 1").
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import yaml

from cm3leon.paths import path_of
from cm3leon.types import UserError, refuse, sentences_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")
M = TypeVar("M")
Override = tuple[tuple[str, ...], Any]


class Word(str):
    """A value of the command line, or a part of one, as it was typed: its field decides how it is read."""


_package = Path(__file__).resolve().parent
SHIPPED = _package if (_package / "experiments.yaml").is_file() else _package.parent
"""The folder that holds experiments.yaml and experiments/: the package in a wheel, the repository in a clone."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, written `Annotated[int, Range(ge=1)]`."""

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

    def text(self, base: str) -> str:
        """The bounds behind the name of a type: `a whole number, at least 1`, `a number from 0 to 1`."""
        if self.ge is not None and self.le is not None:
            return f"{base} from {self.ge} to {self.le}"
        lower = (
            f"at least {self.ge}"
            if self.ge is not None
            else f"above {self.gt}"
            if self.gt is not None
            else ""
        )
        upper = (
            f"at most {self.le}"
            if self.le is not None
            else f"below {self.lt}"
            if self.lt is not None
            else ""
        )
        bounds = " and ".join(filter(None, [lower, upper]))
        return f"{base}, {bounds}" if bounds else base


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Temperature = Annotated[float, Range(ge=0.01)]
"""Below it the softmax of float32 logits is that of the largest alone, or no number: take the decoder greedy."""
Guidance = Annotated[float, Range(ge=0, le=1000)]
"""Weights of guidance; with larger ones float32 logits of a trained model can overflow."""
Seed = Annotated[int, Range(ge=0, le=2**64 - 1)]
"""Any number of 64 bits, such as a time in nanoseconds; see `data.shuffle.wrapped`."""
Probability = Annotated[float, Range(ge=0, le=1)]


@dataclass(frozen=True)
class Location:
    """Marks a field that says where files lie: `Annotated[str, Location()]`. Fields of type Path are such unmarked.

    A result depends on what the files hold, not on where they lie; see `result_settings`. Of a mapping, the keys are
    the locations.
    """

    or_name: bool = False
    """Whether a value that is no file on this machine is a name, such as the tag of published weights."""


@dataclass(frozen=True)
class NoEffect:
    """Marks a field that changes no result: `Annotated[int, NoEffect("how often figures are written down")]`."""

    why: str
    """What the field is about instead, for whoever reads the class."""


@dataclass(frozen=True)
class Component:
    """A component chosen by its registry name, with its checked `Config`; the registry builds it.

    A field for one is annotated `Annotated[Component, MODELS]`; in YAML it is `{name: cm3leon, layers: 24}`, or the
    bare name.
    """

    name: str
    config: Any


@dataclass(kw_only=True)
class NoSettings:
    """The `Config` of a component that has nothing to choose."""


class ComponentChecker(Protocol):
    """What the metadata of an `Annotated[Component, ...]` has to offer; registries do."""

    kind: str

    def check(self, section: Any, where: str, *, unfit: list[str] | None = None) -> Component:
        """Checks a section of a config, named by its dotted path; `unfit` as in `from_mapping`."""

    def config_class(self, name: str) -> Any:
        """The `Config` of a component. Raises UserError for an unknown name."""


@dataclass(frozen=True)
class FieldDoc:
    """One field of a config class, as text for people."""

    name: str
    type: str
    default: str
    sentence: str


# ------------------------------------------------------------------------------------------------ mapping -> dataclass


def from_mapping(
    cls: type[C], mapping: Mapping[str, Any], where: str = "", *, unfit: list[str] | None = None
) -> C:
    """Builds a config dataclass from plain data; `where` is the dotted path of the mapping, for messages.

    A method `check(self)` of the dataclass, if any, is called on the result: it raises ValueError for fields that do
    not go together. All mistakes, of all sections, are given in one answer.

    Args:
        unfit: is given what the `check` of this and of inner sections object to, in place of an error, for a caller
            that has more to check: the config that is returned is of the right types then, but not fit for use.

    Raises:
        UserError: for unknown or missing keys, wrong types, values out of range, or a failed `check`.
    """
    mapping = settled(cls, mapping, where)
    if not isinstance(mapping, Mapping):
        raise _not_allowed(where, mapping, "a section of key: value")
    hints = _hints(cls)
    mistakes = [
        f"{_join(where, key)} is not a known key; {choices(str(key), hints)}"
        for key in mapping
        if key not in hints
    ]
    objections: list[str] = []
    values = {}
    for field in dataclasses.fields(cls):
        path = _join(where, field.name)
        if field.name in mapping:
            value = _with_default_name(field, hints[field.name], mapping[field.name])
            try:
                values[field.name] = _convert(hints[field.name], value, path, objections)
            except UserError as error:
                mistakes += sentences_of(error)
        elif _is_required(field):
            mistakes.append(f"{path} is missing; it must be {type_text(hints[field.name])}")
    if mistakes:
        refuse([*mistakes, *objections])

    config = cls(**values)
    if hasattr(config, "check"):
        try:
            config.check()
        except UserError as error:
            objections += [f"{where}: {each}" if where else each for each in sentences_of(error)]
        except ValueError as error:
            objections.append(f"{where}: {error}" if where else str(error))
    if unfit is None:
        refuse(objections)
    else:
        unfit += objections
    return config


def checked_value(annotation: Any, value: Any, where: str) -> Any:
    """A single value as the annotated type, by the rules of a config's fields.

    Raises:
        UserError: for another type or a value out of range, naming it by `where`.
    """
    return _convert(annotation, value, where)


def _with_default_name(field: dataclasses.Field[Any], annotation: Any, value: Any) -> Any:
    """Completes `{nodes: 4}` to `{name: slurm, nodes: 4}` where the field has a default component."""
    nameless = isinstance(value, Mapping) and "name" not in value
    if nameless and _checker(annotation) is not None and not _is_required(field):
        default = _default(field)
        return value if default is None else {**to_mapping(default), **value}
    return value


def _convert(annotation: Any, value: Any, where: str, unfit: list[str] | None = None) -> Any:
    """The value as the annotated type; `unfit` as in `from_mapping`."""
    origin, args = get_origin(annotation), get_args(annotation)
    checker = _checker(annotation)
    if checker is not None and (value is not None or not _is_union(annotation)):
        return checker.check(value, where, unfit=unfit)
    if origin is Annotated:
        return _convert_in_range(annotation, value, where)
    if _is_union(annotation):
        return _convert_union(annotation, value, where, unfit)
    if dataclasses.is_dataclass(annotation):
        return from_mapping(typing.cast(type, annotation), value, where, unfit=unfit)
    if origin is list and args[0] is str and isinstance(value, str):
        return [value]  # one text may stand without brackets
    if origin is list and isinstance(value, (list, tuple)):
        return _convert_items(args * len(value), value, where, unfit)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) == len(value):
            return tuple(_convert_items(args, value, where, unfit))
    if origin is dict and isinstance(value, Mapping):
        keys = [_convert(args[0], key, where) for key in value]
        items = _convert_items(
            (args[1],) * len(keys), list(value.values()), where, unfit, names=list(value)
        )
        return dict(zip(keys, items, strict=True))
    if origin is Literal and any(value == arg and type(value) is type(arg) for arg in args):
        return value
    return _convert_scalar(annotation, value, where)


def _is_number(value: Any) -> bool:
    """Whether it is a number, or a text that YAML 1.2 reads as one, such as 1e-4."""
    if isinstance(value, str):
        return _FLOAT.match(value) is not None
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _convert_items(
    annotations: Sequence[Any],
    values: Sequence[Any],
    where: str,
    unfit: list[str] | None,
    names: Sequence[Any] | None = None,
) -> list[Any]:
    """The values as the annotated types; `names` stand in messages, the places in the list without them."""
    converted: list[Any] = []
    mistakes: list[str] = []
    for place, (annotation, value) in enumerate(zip(annotations, values, strict=True)):
        try:
            path = _join(where, names[place] if names else place)
            converted.append(_convert(annotation, value, path, unfit))
        except UserError as error:
            mistakes += sentences_of(error)
    refuse(mistakes)
    return converted


def _convert_scalar(annotation: Any, value: Any, where: str) -> Any:
    if annotation is Any or (annotation in (bool, str) and isinstance(value, annotation)):
        return value
    if annotation is int and _is_number(value) and isinstance(value, int):
        return value
    if annotation is float and _is_number(value):
        return _finite(value, where)
    if annotation is Path and isinstance(value, (str, Path)) and str(value):
        return path_of(value, where)  # the shell leaves the ~ of key=~/folder alone
    if value is None and annotation is types.NoneType:
        return None
    raise _not_allowed(where, value, type_text(annotation))


def _convert_in_range(annotation: Any, value: Any, where: str) -> Any:
    base, *metadata = get_args(annotation)
    bounds = [item for item in metadata if isinstance(item, Range)]
    try:
        number = _convert(base, value, where)
    except UserError:
        if bounds:  # say the bounds too, so that the next try is right
            finite = "" if base is int or not _is_number(value) else ", and finite"
            raise _not_allowed(where, value, type_text(annotation) + finite) from None
        raise
    if not all(item.holds(number) for item in bounds):
        raise _not_allowed(where, value, type_text(annotation))
    return number


def _finite(value: Any, where: str) -> float:
    """A number as a float. Raises UserError for infinities, NaN, and what is too large to be one, such as 1e400."""
    try:
        number = float(value)
    except (
        OverflowError,
        ValueError,
    ):  # an integer of hundreds of digits; ".inf" and ".nan" as texts
        number = math.inf
    if not math.isfinite(number):
        raise _not_allowed(where, value, "a finite number")
    return number


def _convert_union(annotation: Any, value: Any, where: str, unfit: list[str] | None = None) -> Any:
    if value is None and types.NoneType in get_args(annotation):
        return None
    members = [arg for arg in get_args(annotation) if arg is not types.NoneType]
    if len(members) == 1 and isinstance(value, (Mapping, list, tuple)):
        return _convert(members[0], value, where, unfit)  # its message names the item at fault
    for member in members:
        try:
            return _convert(member, value, where, unfit)
        except UserError:
            continue
    raise _not_allowed(where, value, type_text(annotation))


def _not_allowed(where: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{where or 'the config'} is {_shown(value)}; it must be {allowed}")


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


# ------------------------------------------------------------------------------------------------ dataclass -> mapping


def to_mapping(config: Any) -> Any:
    """Plain data that YAML can hold; `from_mapping` is its inverse. Components become `{name: ..., **fields}`."""
    if isinstance(config, Component):
        return {"name": config.name, **to_mapping(config.config)}
    if dataclasses.is_dataclass(config):
        return {
            field.name: to_mapping(getattr(config, field.name))
            for field in dataclasses.fields(config)
        }
    if isinstance(config, Mapping):
        return {key: to_mapping(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_mapping(value) for value in config]
    return str(config) if isinstance(config, Path) else config


# ------------------------------------------------------------------------------------------------ what results need


def result_settings(config: Any, held: Callable[[str], Any] | None = None) -> Any:
    """The settings that a result depends on, as plain data: `to_mapping` without what changes no result.

    Fields marked `NoEffect` are left out. Locations are left out too, or replaced by what lies there:

        result_settings(config)                    # {"layout": "auto"}
        result_settings(config, held=path_digest)  # {"path": "sha256:9f86...", "layout": "auto"}

    Args:
        held: a location -> what stands for its files, for example a digest; None where the caller says what the files
            hold in another way.
    """

    def at(mark: Location, value: Any) -> Any:
        if held is None:
            return _LEFT_OUT
        if isinstance(value, Mapping):  # the order of folders may count, so they stay a list
            return [[held(str(key)), to_mapping(item)] for key, item in value.items()]
        return _each(value, held)

    return _plain(config, at, results_only=True)


def recorded_settings(config: Any) -> Any:
    """`to_mapping` with every local location absolute, so that it means the same in another working directory."""

    def at(mark: Location, value: Any) -> Any:
        def moved(place: str) -> str:
            return place if mark.or_name and not Path(place).exists() else absolute_location(place)

        if isinstance(value, Mapping):
            return {moved(str(key)): to_mapping(item) for key, item in value.items()}
        return _each(value, moved)

    return _plain(config, at, results_only=False)


def absolute_location(location: str) -> str:
    """A local path, or a glob of such, made absolute; a URL, and an empty text, stay as they are."""
    if "::" in location and not Path(location).exists():  # several paths, or one through another
        return "::".join(
            os.path.abspath(each) if Path(each).exists() else each for each in location.split("::")
        )
    if not location or "://" in location or location.startswith("{/"):
        return location
    home = str(Path(location).expanduser()) if location.startswith("~/") else location
    return os.path.abspath(home)


_LEFT_OUT = object()


def _plain(config: Any, at: Callable[[Location, Any], Any], *, results_only: bool) -> Any:
    """`to_mapping`, with locations given to `at` and, for results, without the fields that change none."""
    again = functools.partial(_plain, at=at, results_only=results_only)
    if isinstance(config, Component):
        return {"name": config.name, **again(config.config)}
    if isinstance(config, Mapping):
        return {key: again(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [again(value) for value in config]
    if not dataclasses.is_dataclass(config):
        return to_mapping(config)

    result = {}
    for name, annotation in _hints(typing.cast(type, type(config))).items():
        value = getattr(config, name)
        if results_only and _marked(annotation, NoEffect) is not None:
            continue
        place = _marked(annotation, Location)
        found = at(place, value) if place and value is not None else again(value)
        if found is not _LEFT_OUT:
            result[name] = found
    return result


def _marked(annotation: Any, kind: type[M]) -> M | None:
    """The mark of an annotation, also inside `X | None`, a list, or the keys of a mapping."""
    if annotation is Path and kind is Location:
        return typing.cast(M, Location())
    for mark in getattr(annotation, "__metadata__", ()):
        if isinstance(mark, kind):
            return mark
    inner = get_args(annotation)
    if get_origin(annotation) is dict:
        inner = inner[:1]
    return next(filter(None, (_marked(each, kind) for each in inner)), None)


def _each(value: Any, change: Callable[[str], Any]) -> Any:
    """One location changed, or each of a list."""
    return (
        [change(str(item)) for item in value]
        if isinstance(value, (list, tuple))
        else change(str(value))
    )


# ------------------------------------------------------------------------------------------------ description


def describe(cls: type, defaults: Mapping[str, Any] | None = None) -> list[FieldDoc]:
    """The fields of a config class in order, those of nested dataclasses under their dotted names.

    `defaults` are plain values that stand in for the defaults of the class.
    """
    return list(_describe(cls, defaults or {}, ""))


def _describe(cls: type, defaults: Mapping[str, Any], prefix: str) -> Iterator[FieldDoc]:
    hints, sentences = _hints(cls), _sentences(cls)
    for field in dataclasses.fields(cls):
        annotation, name = hints[field.name], prefix + field.name
        nested = _nested_dataclass(annotation)
        if field.name in defaults and not nested:
            default = _shown(to_mapping(defaults[field.name]))
        elif _is_required(field):
            default = "required"
        else:
            value = _default(field)
            default = "" if nested and value is not None else _shown(to_mapping(value))
        yield FieldDoc(name, type_text(annotation), default, sentences.get(field.name, ""))
        if nested:
            yield from _describe(nested, defaults.get(field.name, {}), f"{name}.")


def check_config_class(cls: type) -> None:
    """Checks that a class can serve as a config.

    Raises:
        TypeError: for a class that is no keyword-only dataclass, a field without a sentence, or a type that a config
            cannot hold.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__qualname__} must be a dataclass")
    hints, sentences = _hints(cls), _sentences(cls)
    for field in dataclasses.fields(cls):
        if not field.kw_only:
            raise TypeError(
                f"{cls.__qualname__}.{field.name} must be keyword-only: use @dataclass(kw_only=True)"
            )
        if not sentences.get(field.name):
            raise TypeError(
                f"{cls.__qualname__}.{field.name} needs one sentence (a string) under it"
            )
        type_text(hints[field.name])
        nested = _nested_dataclass(hints[field.name])
        if nested:
            check_config_class(nested)


def component_sections(cls: type) -> frozenset[str]:
    """Dotted paths of the component fields of a config class; `*` stands for the index in a list of components."""
    paths = set()
    for name, annotation in _hints(cls).items():
        nested = _nested_dataclass(annotation)
        if _checker(annotation):
            paths.add(name)
        elif get_origin(annotation) is list and _checker(get_args(annotation)[0]):
            paths.add(f"{name}.*")
        elif nested:
            paths |= {f"{name}.{path}" for path in component_sections(nested)}
    return frozenset(paths)


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    Any: "any value",
}


def type_text(annotation: Any) -> str:
    """An annotation in words: `a whole number, at least 1`, `a list, each a text`, `a path, or null for none`.

    Raises:
        TypeError: for a type that a config cannot hold.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    checker = _checker(annotation)
    if checker is not None:
        text = f"a {checker.kind} by its name, or as a section"
        return f"{text}, or null for none" if _is_union(annotation) else text
    if origin is Annotated:
        text = type_text(args[0])
        for bounds in annotation.__metadata__:
            text = bounds.text(text) if isinstance(bounds, Range) else text
        return text
    if _is_union(annotation):
        text = " or ".join(type_text(arg) for arg in args if arg is not types.NoneType)
        return f"{text}, or null for none" if types.NoneType in args else text
    if origin is Literal:
        return "one of " + ", ".join(map(str, args)) if len(args) > 1 else str(args[0])
    if origin is list or (origin is tuple and args[1:] == (Ellipsis,)):
        return f"a list, each {type_text(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(map(type_text, args))}"
    if origin is dict and args[0] is str:
        return f"a section of names, each with {type_text(args[1])}"
    if dataclasses.is_dataclass(annotation) and annotation is not Component:
        return "a section of key: value"
    if annotation in _NAMES:
        return _NAMES[annotation]
    raise TypeError(f"a config cannot hold the type {annotation!r}")


def choices(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, if any is near, and the list."""
    known = sorted(names)
    best = nearest(name, known)
    listed = f"known: {', '.join(known)}" if known else "none is known"
    return f"did you mean {best}? ({listed})" if best else listed


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like the given one, None where none is alike."""
    by_lower = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else None


def _shown(value: Any) -> str:
    """A value as YAML would write it, cut where it is long."""
    return textwrap.shorten(
        json.dumps(value, default=str, ensure_ascii=False), 100, placeholder=" ..."
    )


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _checker(annotation: Any) -> ComponentChecker | None:
    """The registry of `Annotated[Component, REGISTRY]`, also where it is `| None`; None for any other annotation."""
    if _is_union(annotation):
        return next(filter(None, map(_checker, get_args(annotation))), None)
    if get_origin(annotation) is Annotated and get_args(annotation)[0] is Component:
        return annotation.__metadata__[0]
    return None


def _nested_dataclass(annotation: Any) -> type | None:
    """The dataclass of `X` or `X | None`, None for any other annotation."""
    members = get_args(annotation) if _is_union(annotation) else (annotation,)
    return next((member for member in members if dataclasses.is_dataclass(member)), None)  # type: ignore[return-value]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _sentences(cls: type) -> dict[str, str]:
    """The string under each field, inherited fields included. A class without source has none."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
        for statement, below in itertools.pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[statement.target.id] = " ".join(below.value.value.split())
    return found


# ------------------------------------------------------------------------------------------------ YAML

_FLOAT = re.compile(
    r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)
_INT = re.compile(r"^[-+]?(0|[1-9]\d*)$")


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, and reads numbers as YAML 1.2 does: 1e-4 is one; 16:9 and 2024-01-31 are strings."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in pairs if tag.rsplit(":")[-1] in ("null", "bool")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value} is given twice"
                raise yaml.constructor.ConstructorError(
                    problem=problem, problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file whose top is a mapping.

    Raises:
        UserError: with file and line, for a missing file, bad syntax, a duplicate key, or another top.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        content = _parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {_shown(content)}; it must hold a section of key: value")
    return content


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """The mapping as YAML, keys in their order."""
    return yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _reason(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f", line {mark.line + 1}" if mark else ""
    return f"{line}: {problem or error}"


# ------------------------------------------------------------------------------------------------ overrides


def parse_override(text: str) -> Override:
    """`"model.layers=2"` -> `(("model", "layers"), Word("2"))`; `settled` reads the word by the type of its field.

    Raises:
        UserError: for text without `=`, or an empty part of the key.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text} has no value; write {text}=VALUE")
    return split_key(key), Word(value)


def split_key(key: str) -> tuple[str, ...]:
    """`"model.layers"` -> `("model", "layers")`.

    Raises:
        UserError: for an empty part.
    """
    parts = tuple(key.strip().split("."))
    if not all(parts):
        raise UserError(f"the key {_shown(key)} has an empty part; write section.key=VALUE")
    return parts


def settled(annotation: Any, value: Any, where: str = "") -> Any:
    """Plain data with every `Word` in it read as the annotated type wants it; what is no word stays as it is.

    A text or a path takes the word as it was typed, quotes and all; only `null` is none where that is
    allowed. A choice among texts may stand in quotes. Anything else is read as YAML: a number, true,
    false, null, or a list or section in brackets, whose parts are read by the same rule. A single
    value where a list is wanted is a list of it, and numbers with commas between them are a list
    where numbers are wanted; what is no such list stays as it was typed.

    Raises:
        UserError: for brackets that are not valid YAML.
    """
    if isinstance(value, Word):
        value = _read_word(annotation, value, where)
    if isinstance(value, Mapping):
        types_of = _member_types(annotation, value)
        return {
            str(key) if isinstance(key, Word) else key: settled(
                types_of(key), inner, _join(where, key)
            )
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        item = next(
            (
                get_args(each)[0]
                for each in _members(annotation)
                if get_origin(each) in (list, tuple)
            ),
            Any,
        )
        return [settled(item, inner, _join(where, index)) for index, inner in enumerate(value)]
    return value


def _read_word(annotation: Any, word: Word, where: str) -> Any:
    members = _members(annotation)
    if word == "null" and types.NoneType in members:
        return None
    for each in members:
        numbers = _numbers_of(each, word, where)
        if numbers is not None:
            return numbers
    if not any(map(_takes_text, members)):
        value = parse_word(word, where)
        alone = value is not None and not isinstance(value, list)
        takes_list = any(get_origin(each) in (list, tuple) for each in members)
        return [word] if alone and takes_list and not any(map(_takes_numbers, members)) else value
    # A choice may stand in quotes, as YAML has it; a free text keeps the quotes that were typed.
    unquoted = word.strip().strip("\"'")
    if any(get_origin(each) is Literal and unquoted in get_args(each) for each in members):
        return unquoted
    # Beside a text, the field may also take a list, or a number.
    others = [each for each in members if not _takes_text(each) and each is not types.NoneType]
    for other in others:
        try:
            value = settled(other, parse_word(word, where), where)
            _convert(other, value, where)
        except UserError:
            continue
        return value
    return str(word)


def _numbers_of(annotation: Any, word: Word, where: str) -> list[Any] | None:
    """The numbers of a word such as `0,0,4,4`, where the annotated type is a list that they fit; None otherwise."""
    if not _takes_numbers(annotation) or word.strip().startswith(("[", "{", '"', "'")):
        return None
    numbers = settled(annotation, [Word(part.strip()) for part in word.split(",")], where)
    try:
        _convert(annotation, numbers, where)
    except UserError:  # whoever checks the value as it was typed says so
        return None
    return typing.cast(list[Any], numbers)


def _takes_numbers(annotation: Any) -> bool:
    """Whether it is a list or a tuple of numbers."""
    parts = [each for each in get_args(annotation) if each is not Ellipsis]
    return get_origin(annotation) in (list, tuple) and all(
        set(_members(each)) <= {int, float} for each in parts
    )


def _takes_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return all(isinstance(arg, str) for arg in get_args(annotation))
    return annotation in (str, Path)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types that a value may have, without the marks beside them."""
    if get_origin(annotation) is Annotated and _checker(annotation) is None:
        annotation = get_args(annotation)[0]
    if not _is_union(annotation):
        return (annotation,)
    return tuple(member for each in get_args(annotation) for member in _members(each))


def _member_types(annotation: Any, section: Mapping[str, Any]) -> Callable[[str], Any]:
    """Key of a section -> the type of its value; Any where it is not known."""
    checker = _checker(annotation)
    if checker is not None:
        try:
            hints = _hints(checker.config_class(str(section.get("name"))))
        except UserError:  # whoever checks the section says so
            hints = {}
        return lambda key: str if key == "name" else hints.get(key, Any)
    cls = _nested_dataclass(annotation)
    if cls is not None:
        known = _hints(cls)
        return lambda key: known.get(key, Any)
    values = [get_args(each)[1] for each in _members(annotation) if get_origin(each) is dict]
    return lambda key: values[0] if values else Any


def parse_word(word: Word, where: str) -> Any:
    """The word as YAML; the plain scalars within brackets are words again.

    Raises:
        UserError: for brackets or quotes that are not valid YAML.
    """
    text = word.strip()
    if text.startswith(("[", "{")):
        try:
            return yaml.load(text, Loader=_WordLoader)
        except yaml.YAMLError as error:
            raise UserError(
                f"{where} is {text}, which is not valid YAML{_reason(error)}"
            ) from error
    if text.startswith(('"', "'")):
        try:
            return _parse_yaml(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"{where} is {text}, which is not valid YAML{_reason(error)}"
            ) from error
    # A plain scalar taken whole: inside it neither ": " nor " #" means anything.
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text))


class _WordLoader(_Loader):
    """Leaves plain scalars as words."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            return Word(node.value)
        return super().construct_object(node, deep=deep)


def typed_value(cls: type, mapping: Mapping[str, Any], path: tuple[str, ...], word: Any) -> Any:
    """What a word is as the value of a path of a config class, given the sections around it."""
    if not isinstance(word, Word):
        return word
    at: Any = settled(cls, apply_overrides(mapping, [(path, word)], component_sections(cls)))
    for part in path:
        at = at[int(part)] if isinstance(at, list) else at[part]
    # A component named by its bare name has become its section.
    return str(word) if isinstance(at, Mapping) and not word.strip().startswith("{") else at


def apply_overrides(
    mapping: Mapping[str, Any],
    overrides: Iterable[Override],
    component_sections: Collection[str] = (),
) -> dict[str, Any]:
    """A copy of the mapping with the overrides applied in order.

    A path in `component_sections` (see the function of that name) takes a bare name: one that differs from the current
    replaces the section, so that no key of the old component leaks into the new one.

    Raises:
        UserError: where a path leads through something that is no section, or past the end of a list.
    """
    result = copy.deepcopy(dict(mapping))
    for path, value in overrides:
        parent: Any = result
        for depth in range(1, len(path)):
            parent = _section(parent, path[:depth], component_sections)
        key = _key(parent, path)
        if _pattern(path) in component_sections:
            value = _parsed(value, path)
        if _pattern(path) in component_sections and isinstance(value, str):
            current = parent.get(key) if isinstance(parent, dict) else parent[key]
            current = {"name": current} if isinstance(current, str) else current or {}
            value = current if current.get("name") == value else {"name": value}
        parent[key] = copy.deepcopy(value)
    return result


def _section(parent: Any, path: tuple[str, ...], component_sections: Collection[str]) -> Any:
    """The mapping or list at the path, made where there is none yet."""
    key = _key(parent, path)
    current = _parsed(parent.get(key) if isinstance(parent, dict) else parent[key], path)
    if current is None:
        current = {}
    elif isinstance(current, str) and _pattern(path) in component_sections:
        current = {"name": current}
    parent[key] = current
    if not isinstance(current, (dict, list)):
        raise UserError(f"{'.'.join(path)} is {_shown(current)}; it has no keys to set")
    return current


def _parsed(value: Any, path: tuple[str, ...]) -> Any:
    """The value, a word as YAML has it: for what can only be a name, a section or a list."""
    return parse_word(value, ".".join(path)) if isinstance(value, Word) else value


def _key(parent: Any, path: tuple[str, ...]) -> Any:
    key = path[-1]
    if isinstance(parent, dict):
        return key
    if not key.isdecimal() or int(key) >= len(parent):
        raise UserError(
            f"{'.'.join(path)} does not exist; {'.'.join(path[:-1])} is a list of {len(parent)}, from 0"
        )
    return int(key)


def _pattern(path: tuple[str, ...]) -> str:
    return ".".join("*" if part.isdecimal() else part for part in path)
