"""Config classes as a JSON Schema (draft 7), with which editors complete and check YAML.

schema = Schemas()
schema.section(Experiment)    # {"$ref": "#/definitions/Experiment"}
schema.definitions            # what is referred to

No key is required, except the name of a component: what a file leaves out may be given on the
command line. What only a config's own `check` knows, such as two fields that exclude each other, is
left to it.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from cm3leon.config.describe import sentences_of_fields, summary_of
from cm3leon.config.plain import to_mapping
from cm3leon.config.schema import (
    ComponentChecker,
    Range,
    Settings,
    checker_of,
    default_of,
    hints_of,
    is_required,
    is_union,
    key_of,
)

Schema = dict[str, Any]

SCALARS: Mapping[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    Path: {"type": "string", "minLength": 1},
    types.NoneType: {"type": "null"},
    Any: {},
}
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


class Schemas:
    """Schemas of config classes, which share their definitions."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def section(self, cls: type) -> Schema:
        """The schema of a section that holds the fields of a config class."""
        name = f"{cls.__module__.removeprefix('cm3leon.')}.{cls.__qualname__}"
        if name not in self.definitions:
            self.definitions[name] = {}  # a class may contain itself
            self.definitions[name] = {
                "description": summary_of(cls),
                "type": "object",
                "properties": self.properties(cls),
                "additionalProperties": False,
            }
        return _reference(name)

    def definition(self, reference: Schema) -> Schema:
        """The schema that a reference refers to."""
        return self.definitions[reference["$ref"].rpartition("/")[2].replace("%20", " ")]

    def properties(self, cls: type) -> dict[str, Schema]:
        """The schemas of a config class's fields by key, with their sentences and defaults."""
        hints, sentences = hints_of(cls), sentences_of_fields(cls)
        found = {}
        for field in dataclasses.fields(cls):
            schema = self.value(hints[field.name])
            # Draft 7 ignores whatever stands beside a reference.
            schema = {"allOf": [schema]} if "$ref" in schema else dict(schema)
            schema["description"] = sentences.get(field.name, "")
            if not is_required(field):
                schema["default"] = to_mapping(default_of(field))
            found[key_of(field)] = schema
        return found

    def value(self, annotation: Any) -> Schema:
        """The schema of a value of an annotated type, by the rules of `check`."""
        origin, args = get_origin(annotation), get_args(annotation)

        # Components, bounds, unions and sections.
        checker = checker_of(annotation)
        if checker is not None:
            one = self.component(checker)
            return {"anyOf": [one, SCALARS[types.NoneType]]} if is_union(annotation) else one
        if origin is Annotated:
            return self._marked(args[0], args[1:])
        if is_union(annotation):
            return {"anyOf": [self.value(each) for each in args]}
        if dataclasses.is_dataclass(annotation):
            return self.section(cast(type, annotation))
        if origin is Literal:
            return {"enum": list(args)}

        # Containers. A single text may stand for a list of texts.
        if origin is list or (origin is tuple and args[1:] == (Ellipsis,)):
            items = {"type": "array", "items": self.value(args[0])}
            return {"anyOf": [items, SCALARS[str]]} if args[0] is str else items
        if origin is tuple:
            size = {"minItems": len(args), "maxItems": len(args)}
            return {"type": "array", "items": list(map(self.value, args)), **size}
        if origin is dict:
            return {"type": "object", "additionalProperties": self.value(args[1])}
        return dict(SCALARS[annotation])

    def _marked(self, base: Any, marks: tuple[Any, ...]) -> Schema:
        schema = dict(self.value(base))
        for mark in marks:
            if isinstance(mark, Range):
                bounds = dataclasses.asdict(mark).items()
                schema |= {BOUNDS[name]: bound for name, bound in bounds if bound is not None}
            elif isinstance(mark, Settings):
                schema = self.settings(mark.cls, swept=mark.swept)
        return schema

    def component(self, registry: ComponentChecker) -> Schema:
        """The schema of a component: its bare name,
        or a section with the fields of the named one."""
        name = registry.kind
        if name in self.definitions:
            return _reference(name)
        self.definitions[name] = {}
        names = registry.names()
        name_schema = {"enum": names, "enumDescriptions": list(map(registry.summary, names))}

        # Names that share a config class, such as presets, share a case.
        classes: dict[type, list[str]] = {}
        for each in names:
            classes.setdefault(registry.config_class(each), []).append(each)
        cases, every_key = [], {"name": name_schema}
        for cls, of_class in classes.items():
            fields = self.properties(cls)
            every_key |= {key: {} for key in fields if key not in every_key}
            of_name = {"enum": of_class}
            allowed = {"properties": {"name": of_name, **fields}, "additionalProperties": False}
            chosen = {"properties": {"name": of_name}, "required": ["name"]}
            cases.append({"if": chosen, "then": allowed})

        # Without a name it is the default component's section, or the command line names it.
        section = {
            "type": "object",
            "properties": every_key,
            "additionalProperties": False,
            "allOf": cases,
        }
        self.definitions[name] = {"anyOf": [name_schema, section]}
        return _reference(name)

    # ---------------------------------------------------------------------------------- dotted keys

    def settings(self, cls: type, *, swept: bool = False) -> Schema:
        """The schema of a mapping from keys of a config class, dotted or whole sections, to values.

        Args:
            swept: whether each key has several values, as a list or in words.
        """
        name = f"{'swept' if swept else 'dotted'} keys of {cls.__qualname__}"
        if name in self.definitions:
            return _reference(name)
        self.definitions[name] = {}
        properties: dict[str, Schema] = {}
        patterns: dict[str, Schema] = {}

        for path, schema in self._paths(cls, "", ()):
            # A swept key may have anything: a list of its values, or words such as range(3).
            taken = {} if swept else schema
            if "[" in path:
                _add(patterns, f"^{path}$", taken)
            else:
                _add(properties, path.replace("\\.", "."), taken)

        self.definitions[name] = {
            "type": "object",
            "properties": properties,
            "patternProperties": patterns,
            "additionalProperties": False,
        }
        return _reference(name)

    def _paths(
        self, annotation: Any, prefix: str, within: tuple[Any, ...]
    ) -> Iterator[tuple[str, Schema]]:
        """Regular expressions of the keys below a value, with their schemas;
        without the value itself."""
        for key, inner in _inside(annotation):
            path = f"{prefix}{key}"
            yield path, self.value(inner)
            # A component may contain one of its kind, to any depth; three levels are enough.
            marker = checker_of(inner)
            if within.count(marker) < 2 or marker is None:
                yield from self._paths(inner, f"{path}\\.", (*within, marker))


def _inside(annotation: Any) -> Iterator[tuple[str, Any]]:
    """The keys that may follow a value's own key after a dot, as regular expressions,
    with their types."""
    origin, args = get_origin(annotation), get_args(annotation)
    checker = checker_of(annotation)
    if checker is not None:
        # The fields of all components of this kind.
        names = checker.names()
        yield "name", cast(Any, Literal)[tuple(names)]
        found: dict[str, list[Any]] = {}
        for name in names:
            for key, hint in _fields(checker.config_class(name)):
                if hint not in found.setdefault(key, []):
                    found[key].append(hint)
        for key, hints in found.items():
            for hint in hints:
                yield key, hint
    elif origin is Annotated:
        yield from _inside(args[0])
        for mark in args[1:]:
            if isinstance(mark, Settings) and not mark.swept:
                yield from _fields(mark.cls)
            elif isinstance(mark, Settings):
                yield "[a-z_.0-9]+", Any
    elif is_union(annotation):
        for each in args:
            yield from _inside(each)
    elif dataclasses.is_dataclass(annotation):
        yield from _fields(cast(type, annotation))
    elif origin is list:
        yield "[0-9]+", args[0]
    elif origin is dict:
        yield "[^.]+", args[1]


def _fields(cls: type) -> Iterator[tuple[str, Any]]:
    hints = hints_of(cls)
    for field in dataclasses.fields(cls):
        yield re.escape(key_of(field)), hints[field.name]


def _add(schemas: dict[str, Schema], key: str, schema: Schema) -> None:
    """Add a schema that the values of a key may have;
    components may share a key with different types."""
    if key not in schemas:
        schemas[key] = schema
    elif schema != schemas[key] and schema not in schemas[key].get("anyOf", []):
        schemas[key] = {"anyOf": [*schemas[key].get("anyOf", [schemas[key]]), schema]}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name.replace(' ', '%20')}"}
