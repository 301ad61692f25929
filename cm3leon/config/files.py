"""Where settings come from: YAML files, and the words of a command line that override them."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from cm3leon.config.describe import shown
from cm3leon.types import UserError

_package = Path(__file__).resolve().parent.parent
SHIPPED = _package if (_package / "experiments.yaml").is_file() else _package.parent
"""The folder that holds experiments.yaml and experiments/: the package in a wheel,
the repository in a clone."""

Override = tuple[tuple[str, ...], Any]

FLOAT = re.compile(
    r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)
_INT = re.compile(r"^[-+]?(0|[1-9]\d*)$")


class Word(str):
    """A value of the command line, or a part of one, as it was typed:
    its field decides how it is read."""


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, and reads numbers as YAML 1.2 does: 1e-4 is one;
    16:9 and 2024-01-31 are strings."""

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
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file whose top is a mapping.

    Raises:
        UserError: with file and line, for a missing file, bad syntax, a duplicate key,
            or another top.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; it must be a YAML file")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it in that encoding") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {shown(content)}; it must hold a section of key: value")
    return content


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """The mapping as YAML, keys in their order."""
    return yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_yaml(text: str) -> Any:
    """Parse a text as YAML; a command reads the same files several times, and parses them once."""
    return copy.deepcopy(_read(text))


@lru_cache(maxsize=64)
def _read(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f": {error}"
    line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
    return f"{line}: {error.problem or error}"


def parse_override(text: str) -> Override:
    """`"model.layers=2"` -> `(("model", "layers"), Word("2"))`;
    `settled` reads the word by the type of its field.

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
        raise UserError(f"the key {shown(key)} has an empty part; write section.key=VALUE")
    return parts


def parse_word(word: Word, where: str) -> Any:
    """The word as YAML; the plain scalars within brackets are words again.

    Raises:
        UserError: for brackets or quotes that are not valid YAML.
    """
    text = word.strip()
    if text.startswith(("[", "{", '"', "'")):
        in_brackets = text.startswith(("[", "{"))
        try:
            return yaml.load(text, Loader=_WordLoader if in_brackets else _Loader)
        except yaml.YAMLError as error:
            problem = f"which is not valid YAML{_reason(error)}"
            raise UserError(f"{where} is {text}, {problem}") from error
    # A plain scalar taken whole: inside it neither ": " nor " #" means anything.
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]  # PyYAML's
    return loader.construct_object(yaml.ScalarNode(tag, text))


class _WordLoader(_Loader):
    """Leaves plain scalars as words."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            return Word(node.value)
        return super().construct_object(node, deep=deep)


def apply_overrides(
    mapping: Mapping[str, Any],
    overrides: Iterable[Override],
    component_sections: Collection[str] = (),
) -> dict[str, Any]:
    """A copy of the mapping with the overrides applied in order.

    A path in `component_sections` (see the function of that name) accepts a bare name. A name that
    differs from the current one replaces the whole section, so that no key of the old component
    leaks into the new one.

    Raises:
        UserError: for a path through something that is not a section, or past the end of a list.
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
            if isinstance(current, str):
                current = {"name": current}
            # The same name keeps the section with its keys.
            name = current.get("name") if current else None
            value = current if name == value else {"name": value}
        parent[key] = copy.deepcopy(value)
    return result


def _section(parent: Any, path: tuple[str, ...], component_sections: Collection[str]) -> Any:
    """The mapping or list at the path, created if there is none."""
    key = _key(parent, path)
    current = _parsed(parent.get(key) if isinstance(parent, dict) else parent[key], path)
    if current is None:
        current = {}
    elif isinstance(current, str) and _pattern(path) in component_sections:
        current = {"name": current}
    parent[key] = current
    if not isinstance(current, (dict, list)):
        raise UserError(f"{'.'.join(path)} is {shown(current)}; it has no keys to set")
    return current


def _parsed(value: Any, path: tuple[str, ...]) -> Any:
    """The value; a word is read as YAML, since here it can only be a name, a section or a list."""
    return parse_word(value, ".".join(path)) if isinstance(value, Word) else value


def _key(parent: Any, path: tuple[str, ...]) -> Any:
    key = path[-1]
    if isinstance(parent, dict):
        return key
    if not key.isdecimal() or int(key) >= len(parent):
        raise UserError(
            f"{'.'.join(path)} does not exist; {'.'.join(path[:-1])} is a list of {len(parent)}, "
            "from 0"
        )
    return int(key)


def _pattern(path: tuple[str, ...]) -> str:
    return ".".join("*" if part.isdecimal() else part for part in path)
