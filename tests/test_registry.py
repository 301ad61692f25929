"""Registries register classes and presets, check sections, and name each mistake."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest

from cm3leon import registry as registry_module
from cm3leon.config import Component, FieldDoc, PositiveInt
from cm3leon.registry import REGISTRIES, Registry
from cm3leon.types import UserError


@dataclass(kw_only=True)
class Head:
    """A nested section."""

    count: PositiveInt = 1
    """Number of heads."""

    size: PositiveInt = 64
    """Size of one head."""


class Engine:
    """Does nothing."""

    @dataclass(kw_only=True)
    class Config:
        layers: PositiveInt = 2
        """Number of layers."""

        head: Head
        """The heads."""

    def __init__(self, config: Config, *, device: str) -> None:
        self.config = config
        self.device = device


@pytest.fixture
def engines() -> Registry[Engine]:
    registry: Registry[Engine] = Registry("engine", "engines")
    registry.register("plain")(Engine)
    registry.preset("large", of="plain", layers=9, head={"count": 8})
    return registry


def test_build_passes_checked_config_and_runtime_objects(engines: Registry[Engine]) -> None:
    built = engines.build({"name": "plain", "layers": 3, "head": {}}, device="cpu")
    assert built.config == Engine.Config(layers=3, head=Head())
    assert built.device == "cpu"
    assert engines.build(Component("plain", built.config), device="cpu").config is built.config


def test_preset_changes_defaults_only(engines: Registry[Engine]) -> None:
    assert engines.names() == ["large", "plain"]
    assert engines.check("large").config == Engine.Config(layers=9, head=Head(count=8))

    over = engines.check({"name": "large", "layers": 1, "head": {"size": 32}})
    assert over.config == Engine.Config(layers=1, head=Head(count=8, size=32))

    layers = FieldDoc("layers", "a whole number, at least 1", "9", "Number of layers.")
    assert engines.describe("large")[0] == layers
    assert engines.get("large") is Engine
    assert (engines.preset_of("large"), engines.preset_of("plain")) == ("plain", None)
    assert engines.config_class("large") is Engine.Config


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        (
            "plan",
            "engine.name is plan, which is not a known engine; did you mean plain? (known: large, "
            "plain)",
        ),
        ({"layers": 2}, "engine has no name; it must name one engine (known: large, plain)"),
        (7, "engine is not a section; it must name one engine"),
        ({"name": "plain"}, "engine.head is missing"),
        (
            {"name": "plain", "head": {"cont": 1}},
            "engine.head.cont is not a known key; did you mean count?",
        ),
    ],
)
def test_each_mistake_has_its_sentence(
    engines: Registry[Engine], section: Any, sentence: str
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        engines.check(section)


def test_unknown_name(engines: Registry[Engine]) -> None:
    with pytest.raises(UserError, match="plan is not a known engine; did you mean plain"):
        engines.get("plan")


def test_taken_name_names_both_origins(engines: Registry[Engine]) -> None:
    module = f"module {__name__}"
    origins = f"registered twice: the first is from {module}; the second is from {module}"
    with pytest.raises(TypeError, match=origins):
        engines.register("plain")(Engine)
    with pytest.raises(TypeError, match=origins):
        engines.preset("large", of="plain")


def test_unfit_classes_and_presets_are_refused(engines: Registry[Engine]) -> None:
    class Bare:
        pass

    class Named:
        @dataclass(kw_only=True)
        class Config:
            name: str
            """Taken by the component's name."""

    # Nothing of what is refused is left in the registry.
    with pytest.raises(TypeError, match="needs a nested dataclass Config"):
        engines.register("bare")(Bare)
    with pytest.raises(TypeError, match="that key holds the component's name"):
        engines.register("named")(Named)
    with pytest.raises(TypeError, match="layrs is not a field of plain; did you mean layers"):
        engines.preset("typo", of="plain", layrs=1)
    assert engines.names() == ["large", "plain"]


def test_kinds_differ() -> None:
    assert len({registry.kind for registry in REGISTRIES}) == len(REGISTRIES)


def test_a_class_without_the_base_of_its_kind_is_refused() -> None:
    held: Registry[Engine] = Registry("engine", "engines", f"{__name__}.Engine")

    class Loose:
        """Derives from nothing."""

        @dataclass(kw_only=True)
        class Config:
            """Nothing to choose."""

    with pytest.raises(TypeError) as refused:
        held.register("loose")(Loose)
    assert str(refused.value) == (
        f"{Loose.__qualname__} must derive from {__name__}.Engine to be registered as the engine "
        "loose"
    )

    # The class itself is taken.
    held.register("plain")(Engine)


def test_each_registry_says_its_base_to_the_type_checker_too() -> None:
    for name, annotation in registry_module.__annotations__.items():
        registry = getattr(registry_module, name)
        if isinstance(registry, Registry) and registry.base:
            assert annotation == f"Registry[{registry.base.rpartition('.')[2]}]"
