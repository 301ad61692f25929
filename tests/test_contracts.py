"""What every registered component promises; a new one is covered from the moment it is registered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from cm3leon import config
from cm3leon.registry import REGISTRIES, Registry, discover
from cm3leon.types import UserError

discover()


def every(*registries: Registry[Any]) -> pytest.MarkDecorator:
    """Parametrises a test over `(registry, name)` of every component in the registries."""
    pairs: Iterable[Any] = (
        pytest.param(registry, name, id=f"{registry.kind.replace(' ', '_')}-{name}")
        for registry in registries
        for name in registry.names()
    )
    return pytest.mark.parametrize(("registry", "name"), list(pairs))


@every(*REGISTRIES)
def test_says_what_it_is_and_documents_every_field(registry: Registry[Any], name: str) -> None:
    assert (registry.get(name).__doc__ or "").strip().partition("\n")[0].endswith((".", ":"))
    for doc in registry.describe(name):
        assert doc.sentence.endswith((".", "?", ")")), doc.name


@every(*REGISTRIES)
def test_defaults_are_valid_or_only_required_fields_are_missing(registry: Registry[Any], name: str) -> None:
    required = [doc.name for doc in registry.describe(name) if doc.default == "required"]
    if required:
        with pytest.raises(UserError, match="is missing; it must be"):
            registry.check(name)
    else:
        component = registry.check(name)
        assert registry.check(config.to_mapping(component)) == component


@every(*REGISTRIES)
def test_unknown_key_is_refused_by_its_path(registry: Registry[Any], name: str) -> None:
    with pytest.raises(UserError, match=r"^here\.no_such_key is not a known key"):
        registry.check({"name": name, "no_such_key": 1}, "here")
