"""Configs as plain data: whole, without what changes no result, or with absolute paths."""

from __future__ import annotations

import dataclasses
import functools
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from cm3leon.config.schema import Component, Later, Location, NoEffect, hints_of, key_of

M = TypeVar("M")

_LEFT_OUT = object()


def to_mapping(config: Any) -> Any:
    """Plain data that YAML can hold; `from_mapping` is its inverse.

    Components become `{name: ..., **fields}`.
    """
    if isinstance(config, Component):
        return {"name": config.name, **to_mapping(config.config)}
    if dataclasses.is_dataclass(config):
        return {
            key_of(field): to_mapping(getattr(config, field.name))
            for field in dataclasses.fields(config)
        }
    if isinstance(config, Mapping):
        return {key: to_mapping(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_mapping(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def result_settings(config: Any, held: Callable[[str], Any] | None = None) -> Any:
    """The settings that a result depends on, as plain data.

    This is `to_mapping` without fields marked `NoEffect`, and without those marked `Later` that have
    their default. Locations are left out too, or replaced by what lies there:

        result_settings(config)                    # {"layout": "auto"}
        result_settings(config, held=path_digest)  # {"path": "sha256:9f86...", "layout": "auto"}

    Args:
        held: maps a location to what stands for its files, for example a digest; None if the
            caller records in another way what the files hold.
    """

    def at(mark: Location, value: Any) -> Any:
        if held is None:
            return _LEFT_OUT
        if isinstance(value, Mapping):  # a list, as the order of folders may matter
            return [[held(str(key)), to_mapping(item)] for key, item in value.items()]
        return _each(value, held)

    return _plain(config, at, results_only=True)


def recorded_settings(config: Any) -> Any:
    """`to_mapping` with every local location absolute, so that it means the same in another working
    directory."""

    def at(mark: Location, value: Any) -> Any:
        def moved(place: str) -> str:
            return place if mark.or_name and not Path(place).exists() else absolute_location(place)

        if isinstance(value, Mapping):
            return {moved(str(key)): to_mapping(item) for key, item in value.items()}
        return _each(value, moved)

    return _plain(config, at, results_only=False)


def absolute_location(location: str) -> str:
    """Make a local path, or a glob of paths, absolute; URLs and "" stay as they are."""
    # Several paths, or a path through another one, as fsspec writes them.
    if "::" in location and not Path(location).exists():
        parts = location.split("::")
        return "::".join(os.path.abspath(each) if Path(each).exists() else each for each in parts)
    if not location or "://" in location or location.startswith("{/"):
        return location
    if location.startswith("~/"):
        location = str(Path(location).expanduser())
    return os.path.abspath(location)


def _plain(config: Any, at: Callable[[Location, Any], Any], *, results_only: bool) -> Any:
    """`to_mapping` with locations replaced by `at`,
    and for results without fields that change none."""
    again = functools.partial(_plain, at=at, results_only=results_only)
    if isinstance(config, Component):
        return {"name": config.name, **again(config.config)}
    if isinstance(config, Mapping):
        return {key: again(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [again(value) for value in config]
    if not dataclasses.is_dataclass(config):
        return to_mapping(config)

    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    result = {}
    for name, annotation in hints_of(typing.cast(type, type(config))).items():
        value = getattr(config, name)
        if results_only and _marked(annotation, NoEffect) is not None:
            continue
        later = _marked(annotation, Later) is not None
        if results_only and later and value == defaults[name]:
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
    marks = annotation.__metadata__ if get_origin(annotation) is Annotated else ()
    for mark in marks:
        if isinstance(mark, kind):
            return mark
    inner = get_args(annotation)
    if get_origin(annotation) is dict:
        inner = inner[:1]
    return next(filter(None, (_marked(each, kind) for each in inner)), None)


def _each(value: Any, change: Callable[[str], Any]) -> Any:
    """Change one location, or each of a list."""
    if isinstance(value, (list, tuple)):
        return [change(str(item)) for item in value]
    return change(str(value))
