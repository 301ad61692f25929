"""Configs in words: help texts, and parts of messages
that say what is allowed and what was meant."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import linecache
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from cm3leon.config.plain import to_mapping
from cm3leon.config.schema import (
    Component,
    Range,
    checker_of,
    default_of,
    hints_of,
    is_required,
    is_union,
    key_of,
    nested_dataclass,
)


@dataclass(frozen=True)
class FieldDoc:
    """A field of a config class, as text for people."""

    name: str
    type: str
    default: str
    sentence: str


def describe(cls: type, defaults: Mapping[str, Any] | None = None) -> list[FieldDoc]:
    """The fields of a config class in order; fields of nested dataclasses have dotted names.

    Args:
        defaults: plain values that replace the defaults of the class.
    """
    return list(_describe(cls, defaults or {}, ""))


def _describe(cls: type, defaults: Mapping[str, Any], prefix: str) -> Iterator[FieldDoc]:
    hints, sentences = hints_of(cls), sentences_of_fields(cls)
    for field in dataclasses.fields(cls):
        annotation, name = hints[field.name], prefix + key_of(field)
        nested = nested_dataclass(annotation)
        if field.name in defaults and not nested:
            default = shown(to_mapping(defaults[field.name]))
        elif is_required(field):
            default = "required"
        else:
            # A nested section has no default of its own; its fields have theirs.
            value = default_of(field)
            default = "" if nested and value is not None else shown(to_mapping(value))
        yield FieldDoc(name, type_text(annotation), default, sentences.get(field.name, ""))
        if nested:
            yield from _describe(nested, defaults.get(field.name, {}), f"{name}.")


def check_config_class(cls: type) -> None:
    """Check that a class can serve as a config.

    Raises:
        TypeError: for a class that is not a keyword-only dataclass, a field without a sentence, or
            a type that a config cannot hold.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__qualname__} must be a dataclass")
    hints, sentences = hints_of(cls), sentences_of_fields(cls)
    for field in dataclasses.fields(cls):
        if not field.kw_only:
            raise TypeError(
                f"{cls.__qualname__}.{field.name} must be keyword-only: use "
                "@dataclass(kw_only=True)"
            )
        if not sentences.get(field.name):
            raise TypeError(
                f"{cls.__qualname__}.{field.name} needs one sentence (a string) under it"
            )
        type_text(hints[field.name])
        nested = nested_dataclass(hints[field.name])
        if nested:
            check_config_class(nested)


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    Any: "any value",
}


def type_text(annotation: Any) -> str:
    """An annotation in words: `a whole number, at least 1`, `a list, each a text`,
    `a path, or null for none`.

    Raises:
        TypeError: for a type that a config cannot hold.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    checker = checker_of(annotation)
    if checker is not None:
        text = f"a {checker.kind} by its name, or as a section"
        return f"{text}, or null for none" if is_union(annotation) else text
    if origin is Annotated:
        text = type_text(args[0])
        for bounds in annotation.__metadata__:
            text = bounds_text(bounds, text) if isinstance(bounds, Range) else text
        return text
    if is_union(annotation):
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


def bounds_text(bounds: Range, base: str) -> str:
    """A type with its bounds: `a whole number, at least 1`, `a number from 0 to 1`."""
    if bounds.ge is not None and bounds.le is not None:
        return f"{base} from {bounds.ge} to {bounds.le}"
    limits = {
        "at least": bounds.ge,
        "above": bounds.gt,
        "at most": bounds.le,
        "below": bounds.lt,
    }
    named = [f"{words} {limit}" for words, limit in limits.items() if limit is not None]
    return ", ".join(filter(None, [base, " and ".join(named)]))


def choices(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known name, if one is near,
    and all names."""
    known = sorted(names)
    best = nearest(name, known)
    listed = f"known: {', '.join(known)}" if known else "none is known"
    return f"did you mean {best}? ({listed})" if best else listed


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like the given one; None if none is alike."""
    by_lower = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else None


def shown(value: Any) -> str:
    """A value as YAML would write it, shortened if it is long."""
    return textwrap.shorten(
        json.dumps(value, default=str, ensure_ascii=False), 100, placeholder=" ..."
    )


def summary_of(cls: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    paragraph, _, _ = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    return " ".join(paragraph.split())


@functools.cache
def sentences_of_fields(cls: type) -> dict[str, str]:
    """The string under each field, inherited fields included; {} for a class without source."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        # Python keeps no docstrings of fields, so they are read from the source.
        for statement, below in itertools.pairwise(_body_of(base)):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[statement.target.id] = " ".join(below.value.value.split())
    return found


def _body_of(cls: type) -> Sequence[ast.stmt]:
    """The statements in a class's source; () if there is none."""
    try:
        file = inspect.getsourcefile(cls)
    except (OSError, TypeError):
        return ()
    if file is None:
        return ()

    linecache.checkcache(file)
    lines = linecache.getlines(file, vars(sys.modules[cls.__module__]))
    return _bodies("".join(lines)).get(cls.__qualname__, ())


@functools.lru_cache(maxsize=8)
def _bodies(source: str) -> dict[str, Sequence[ast.stmt]]:
    """The statements of each class in a file, by its qualified name.

    `inspect.getsource` would parse the whole file again for every class in it.
    """
    found: dict[str, Sequence[ast.stmt]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = prefix
            if isinstance(child, ast.ClassDef):
                found.setdefault(prefix + child.name, child.body)
                inside = f"{prefix}{child.name}."
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inside = f"{prefix}{child.name}.<locals>."
            if not isinstance(child, ast.expr):
                visit(child, inside)

    visit(ast.parse(source), "")
    return found
