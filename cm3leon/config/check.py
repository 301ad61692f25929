"""Plain data to checked config dataclasses, with one sentence for every mistake."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

from cm3leon.config.describe import choices, shown, type_text
from cm3leon.config.files import FLOAT, Word, apply_overrides, parse_word
from cm3leon.config.plain import to_mapping
from cm3leon.config.schema import (
    Range,
    SelfChecked,
    checker_of,
    component_sections,
    default_of,
    hints_of,
    is_required,
    is_union,
    key_of,
    nested_dataclass,
)
from cm3leon.paths import path_of
from cm3leon.types import UserError, refuse, sentences_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")


def from_mapping(
    cls: type[C], mapping: Mapping[str, Any], where: str = "", *, unfit: list[str] | None = None
) -> C:
    """Build a config dataclass from plain data.

    If the dataclass has a method `check(self)`, it is called on the result and raises ValueError
    for fields that do not go together. All mistakes, of all sections, are reported at once.

    Args:
        where: the dotted path of the mapping, for messages.
        unfit: collects what the `check` of this and of inner sections object to, instead of an
            error, for a caller that has more to check. The returned config then has the right types
            but is not fit for use.

    Raises:
        UserError: for unknown or missing keys, wrong types, values out of range, or a failed
            `check`.
    """
    mapping = settled(cls, mapping, where)
    if not isinstance(mapping, Mapping):
        raise _not_allowed(where, mapping, "a section of key: value")

    hints = hints_of(cls)
    keys = [key_of(field) for field in dataclasses.fields(cls)]
    mistakes = []
    for key in mapping:
        if key not in keys:
            mistakes.append(f"{_join(where, key)} is not a known key; {choices(str(key), keys)}")

    # Every field is read before any mistake is reported.
    objections: list[str] = []
    values = {}
    for field in dataclasses.fields(cls):
        key = key_of(field)
        path = _join(where, key)
        if key in mapping:
            value = _with_default_name(field, hints[field.name], mapping[key])
            try:
                values[field.name] = _convert(hints[field.name], value, path, objections)
            except UserError as error:
                mistakes += sentences_of(error)
        elif is_required(field):
            mistakes.append(f"{path} is missing; it must be {type_text(hints[field.name])}")
    if mistakes:
        refuse([*mistakes, *objections])

    # Then what only the class itself can check.
    config = cls(**values)
    if isinstance(config, SelfChecked):
        try:
            config.check()
        except UserError as error:
            prefix = f"{where}: " if where else ""
            objections += [prefix + sentence for sentence in sentences_of(error)]
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
        UserError: for another type or a value out of range; `where` names it.
    """
    return _convert(annotation, value, where)


def _with_default_name(field: dataclasses.Field[Any], annotation: Any, value: Any) -> Any:
    """Complete `{nodes: 4}` to `{name: slurm, nodes: 4}` if the field has a default component."""
    nameless = isinstance(value, Mapping) and "name" not in value
    if nameless and checker_of(annotation) is not None and not is_required(field):
        default = default_of(field)
        return value if default is None else {**to_mapping(default), **value}
    return value


def _convert(annotation: Any, value: Any, where: str, unfit: list[str] | None = None) -> Any:
    """The value as the annotated type; `unfit` as in `from_mapping`."""
    origin, args = get_origin(annotation), get_args(annotation)

    # Components, bounds, unions and sections.
    checker = checker_of(annotation)
    if checker is not None and (value is not None or not is_union(annotation)):
        return checker.check(value, where, unfit=unfit)
    if origin is Annotated:
        return _convert_in_range(annotation, value, where)
    if is_union(annotation):
        return _convert_union(annotation, value, where, unfit)
    if dataclasses.is_dataclass(annotation):
        return from_mapping(typing.cast(type, annotation), value, where, unfit=unfit)

    # Containers, whose items are converted one by one.
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
        return FLOAT.match(value) is not None
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _convert_items(
    annotations: Sequence[Any],
    values: Sequence[Any],
    where: str,
    unfit: list[str] | None,
    names: Sequence[Any] | None = None,
) -> list[Any]:
    """The values as the annotated types; messages use `names`, or else the indices."""
    converted: list[Any] = []
    mistakes: list[str] = []
    for index, (annotation, value) in enumerate(zip(annotations, values, strict=True)):
        try:
            path = _join(where, names[index] if names else index)
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
        return path_of(value, where)  # the shell does not expand the ~ of key=~/folder
    if value is None and annotation is types.NoneType:
        return None
    raise _not_allowed(where, value, type_text(annotation))


def _convert_in_range(annotation: Any, value: Any, where: str) -> Any:
    base, *metadata = get_args(annotation)
    bounds = [item for item in metadata if isinstance(item, Range)]
    try:
        number = _convert(base, value, where)
    except UserError:
        if bounds:  # the message names the bounds too
            finite = "" if base is int or not _is_number(value) else ", and finite"
            raise _not_allowed(where, value, type_text(annotation) + finite) from None
        raise
    if not all(item.holds(number) for item in bounds):
        raise _not_allowed(where, value, type_text(annotation))
    return number


def _finite(value: Any, where: str) -> float:
    """A number as a float. Raises UserError for infinity, NaN, and numbers that are too large, such
    as 1e400."""
    try:
        number = float(value)
    # An integer of hundreds of digits, or ".inf" and ".nan" as texts.
    except (OverflowError, ValueError):
        number = math.inf
    if not math.isfinite(number):
        raise _not_allowed(where, value, "a finite number")
    return number


def _convert_union(annotation: Any, value: Any, where: str, unfit: list[str] | None = None) -> Any:
    if value is None and types.NoneType in get_args(annotation):
        return None
    members = [arg for arg in get_args(annotation) if arg is not types.NoneType]
    if len(members) == 1 and (members[0] is Path or isinstance(value, (Mapping, list, tuple))):
        return _convert(members[0], value, where, unfit)  # its message is more exact

    for member in members:
        try:
            return _convert(member, value, where, unfit)
        except UserError:
            continue
    raise _not_allowed(where, value, type_text(annotation))


def _not_allowed(where: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{where or 'the config'} is {shown(value)}; it must be {allowed}")


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def settled(annotation: Any, value: Any, where: str = "") -> Any:
    """Plain data with every `Word` in it read as the annotated type asks for.

    A word is what was typed on the command line. For a text or a path it stays as it was typed,
    quotes and all; only `null` means None where that is allowed. A choice among texts may be in
    quotes. Anything else is read as YAML: a number, true, false, null, or a list or section in
    brackets, whose parts follow the same rule. A single value where a list is wanted becomes a list
    of one, and numbers with commas become a list where numbers are wanted; otherwise it stays as it
    was typed.

        field           word        value
        str             1e-4        "1e-4"
        float           1e-4        0.0001
        list of int     0,4         [0, 4]
        str or None     null        None

    Raises:
        UserError: for brackets that are not valid YAML.
    """
    if isinstance(value, Word):
        value = _read_word(annotation, value, where)
    if isinstance(value, Mapping):
        types_of = _member_types(annotation, value)
        section = {}
        for key, inner in value.items():
            plain = str(key) if isinstance(key, Word) else key
            section[plain] = settled(types_of(key), inner, _join(where, key))
        return section
    if isinstance(value, (list, tuple)):
        lists = [each for each in _members(annotation) if get_origin(each) in (list, tuple)]
        item = get_args(lists[0])[0] if lists else Any
        return [settled(item, inner, _join(where, index)) for index, inner in enumerate(value)]
    return value


def _read_word(annotation: Any, word: Word, where: str) -> Any:
    """A word as the annotated type, see `settled`."""
    members = _members(annotation)
    if word == "null" and types.NoneType in members:
        return None
    for each in members:
        numbers = _numbers_of(each, word, where)
        if numbers is not None:
            return numbers

    # Without texts among the types, the word is YAML; a single value may become a list.
    if not any(map(_takes_text, members)):
        value = parse_word(word, where)
        alone = value is not None and not isinstance(value, list)
        takes_list = any(get_origin(each) in (list, tuple) for each in members)
        if alone and takes_list and not any(map(_takes_numbers, members)):
            return [word]
        return value

    # A choice may be in quotes, as in YAML; a free text keeps the quotes that were typed.
    unquoted = word.strip().strip("\"'")
    if any(get_origin(each) is Literal and unquoted in get_args(each) for each in members):
        return unquoted

    # Besides a text, the field may take a list or a number.
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
    """The numbers in a word such as `0,0,4,4`, if the annotated type is a list that they fit;
    else None."""
    if not _takes_numbers(annotation) or word.strip().startswith(("[", "{", '"', "'")):
        return None
    numbers = settled(annotation, [Word(part.strip()) for part in word.split(",")], where)
    try:
        _convert(annotation, numbers, where)
    except UserError:  # reported when the value is checked as it was typed
        return None
    return typing.cast(list[Any], numbers)


def _takes_numbers(annotation: Any) -> bool:
    """Whether it is a list or a tuple of numbers."""
    if get_origin(annotation) not in (list, tuple):
        return False
    parts = [each for each in get_args(annotation) if each is not Ellipsis]
    return all(set(_members(each)) <= {int, float} for each in parts)


def _takes_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return all(isinstance(arg, str) for arg in get_args(annotation))
    return annotation in (str, Path)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types that a value may have, without their marks."""
    if get_origin(annotation) is Annotated and checker_of(annotation) is None:
        annotation = get_args(annotation)[0]
    if not is_union(annotation):
        return (annotation,)
    members: list[Any] = []
    for each in get_args(annotation):
        members += _members(each)
    return tuple(members)


def _member_types(annotation: Any, section: Mapping[str, Any]) -> Callable[[str], Any]:
    """A function from the keys of a section to the types of their values;
    Any if a type is not known."""
    checker = checker_of(annotation)
    if checker is not None:
        try:
            hints = hints_of(checker.config_class(str(section.get("name"))))
        except UserError:  # whoever checks the section says so
            hints = {}
        return lambda key: str if key == "name" else hints.get(key, Any)
    cls = nested_dataclass(annotation)
    if cls is not None:
        known = hints_of(cls)
        return lambda key: known.get(key, Any)
    values = [get_args(each)[1] for each in _members(annotation) if get_origin(each) is dict]
    return lambda key: values[0] if values else Any


def typed_value(cls: type, mapping: Mapping[str, Any], path: tuple[str, ...], word: Any) -> Any:
    """A word as the value at a path of a config class, given the sections around it."""
    if not isinstance(word, Word):
        return word
    at: Any = settled(cls, apply_overrides(mapping, [(path, word)], component_sections(cls)))
    for part in path:
        at = at[int(part)] if isinstance(at, list) else at[part]
    # The bare name of a component has become its section.
    if isinstance(at, Mapping) and not word.strip().startswith("{"):
        return str(word)
    return at
