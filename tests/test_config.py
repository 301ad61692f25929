"""Typed configuration: conversion there and back, and the sentence for every mistake."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3leon import config
from cm3leon.config import (
    Component,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Probability,
    Range,
)
from cm3leon.config.files import parse_yaml
from cm3leon.training.config import TrainingConfig
from cm3leon.types import UserError, UserErrors


class Shapes:
    """Stands in for a registry that has one component, `square`."""

    kind = "shape"

    @dataclass(kw_only=True)
    class Config:
        side: PositiveInt = 1
        """Length of a side."""

    def check(self, section: Any, where: str, *, unfit: list[str] | None = None) -> Component:
        section = {"name": section} if isinstance(section, str) else dict(section)
        name = section.pop("name")
        if name != "square":
            raise UserError(f"{where}.name is {name}")
        return Component(name, config.from_mapping(self.Config, section, where, unfit=unfit))

    def config_class(self, name: str) -> Any:
        if name != "square":
            raise UserError(f"{name} is no shape")
        return self.Config


SHAPES = Shapes()


@dataclass(kw_only=True)
class Two:
    first: TrainingConfig
    """A training."""
    second: TrainingConfig
    """Another one."""


@dataclass(kw_only=True)
class Inner:
    """A nested section."""

    rate: Annotated[float, Range(gt=0, lt=1)] = 0.5
    """Rate of something,
    over two lines."""

    note: str | None = None
    """A remark; None for no remark."""


@dataclass(kw_only=True)
class Outer:
    """One field of every type."""

    steps: PositiveInt
    """Number of steps."""

    weight: NonNegativeFloat = 0.0
    """Weight in the loss."""

    share: Probability = 1.0
    """Share of samples."""

    flag: bool = False
    """A switch."""

    mode: Literal["fast", "exact", 3] = "fast"
    """How it is computed."""

    root: Path = Path("data")
    """Folder of the data."""

    sizes: list[NonNegativeInt] = field(default_factory=list)
    """Sizes, one a stage."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates."""

    names: tuple[str, ...] = ()
    """Names."""

    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each set."""

    limit: int | Literal["all"] | None = None
    """A limit; None for no limit."""

    inner: Inner = field(default_factory=Inner)
    """A nested section."""

    inners: list[Inner] = field(default_factory=list)
    """Several of them."""

    shape: Annotated[Component, SHAPES] = field(default_factory=lambda: SHAPES.check("square", ""))
    """A component with a default."""

    extra: Annotated[Component, SHAPES] | None = None
    """A component that may be absent."""

    shapes: list[Annotated[Component, SHAPES]] = field(default_factory=list)
    """Several components."""

    def check(self) -> None:
        if self.steps == 13:
            raise ValueError("steps must not be 13")


floats = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
# PyYAML turns rare line breaks (U+0085, U+2028, U+2029) into spaces.
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")), max_size=5)
inners = st.builds(
    Inner, rate=st.floats(0, 1, exclude_min=True, exclude_max=True), note=st.none() | texts
)
squares = st.builds(
    lambda side: Component("square", Shapes.Config(side=side)),
    st.integers(min_value=1, max_value=10**20),
)
outers = st.builds(
    Outer,
    steps=st.integers(min_value=14),
    weight=floats,
    share=st.floats(0, 1),
    flag=st.booleans(),
    mode=st.sampled_from(["fast", "exact", 3]),
    root=texts.filter(lambda text: not text.startswith("~")).map(Path),  # a home folder is expanded
    sizes=st.lists(st.integers(min_value=0), max_size=2),
    betas=st.tuples(floats, floats),
    names=st.lists(texts | st.sampled_from(["1e4", "no", "07"]), max_size=2).map(tuple),
    weights=st.dictionaries(texts | st.sampled_from(["1e4", "on", "1:30"]), floats, max_size=2),
    limit=st.none() | st.integers() | st.just("all"),
    inner=inners,
    inners=st.lists(inners, max_size=2),
    shape=squares,
    extra=st.none() | squares,
    shapes=st.lists(squares, max_size=2),
)


@given(outers)
def test_mapping_and_dataclass_are_inverse_also_through_yaml(outer: Outer) -> None:
    mapping = config.to_mapping(outer)
    assert config.from_mapping(Outer, mapping) == outer
    assert config.from_mapping(Outer, parse_yaml(config.dump_yaml(mapping))) == outer


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({}, "run.steps is missing; it must be a whole number, at least 1"),
        ({"stps": 1}, "run.stps is not a known key; did you mean steps? (known: betas,"),
        ({"steps": 0}, "run.steps is 0; it must be a whole number, at least 1"),
        ({"steps": True}, "run.steps is true; it must be a whole number, at least 1"),
        ({"steps": 1.0}, "run.steps is 1.0; it must be a whole number, at least 1"),
        ({"steps": None}, "run.steps is null; it must be a whole number, at least 1"),
        ({"steps": 13}, "run: steps must not be 13"),
        ({"steps": 1, "weight": "heavy"}, 'run.weight is "heavy"; it must be a number, at least 0'),
        (
            {"steps": 1, "weight": float("nan")},
            "run.weight is NaN; it must be a number, at least 0",
        ),
        ({"steps": 1, "share": 1.1}, "run.share is 1.1; it must be a number from 0 to 1"),
        ({"steps": 1, "flag": 1}, "run.flag is 1; it must be true or false"),
        ({"steps": 1, "mode": "quick"}, 'run.mode is "quick"; it must be one of fast, exact, 3'),
        ({"steps": 1, "root": 7}, "run.root is 7; it must be a path"),
        (
            {"steps": 1, "sizes": 7},
            "run.sizes is 7; it must be a list, each a whole number, at least 0",
        ),
        (
            {"steps": 1, "sizes": [1, -1]},
            "run.sizes.1 is -1; it must be a whole number, at least 0",
        ),
        (
            {"steps": 1, "betas": [0.9]},
            "run.betas is [0.9]; it must be a list of 2: a number, a number",
        ),
        ({"steps": 1, "names": [1]}, "run.names.0 is 1; it must be a text"),
        ({"steps": 1, "weights": {"coco": "x"}}, 'run.weights.coco is "x"; it must be a number'),
        ({"steps": 1, "weights": {1: 1.0}}, "run.weights is 1; it must be a text"),
        (
            {"steps": 1, "limit": "some"},
            'run.limit is "some"; it must be a whole number or all, or null for none',
        ),
        ({"steps": 1, "inner": 3}, "run.inner is 3; it must be a section of key: value"),
        (
            {"steps": 1, "inner": {"rate": 1}},
            "run.inner.rate is 1; it must be a number, above 0 and below 1",
        ),
        (
            {"steps": 1, "inners": [{}, {"rat": 1}]},
            "run.inners.1.rat is not a known key; did you mean rate?",
        ),
        ({"steps": 1, "shape": "circle"}, "run.shape.name is circle"),
        (
            {"steps": 1, "shapes": [{"name": "square", "side": 0}]},
            "run.shapes.0.side is 0; it must be a whole number, at least 1",
        ),
        ([1], "run is [1]; it must be a section of key: value"),
    ],
)
def test_each_mistake_has_its_sentence(mapping: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        config.from_mapping(Outer, mapping, "run")


def test_numbers_are_read_generously_where_nothing_is_lost() -> None:
    outer = config.from_mapping(Outer, {"steps": 1, "weight": 1, "share": "1e-4"})
    assert outer.weight == 1.0
    assert isinstance(outer.weight, float)
    assert outer.share == 1e-4


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, ".inf", "1e400", 10**400])
def test_a_number_is_finite(value: Any) -> None:
    for mapping in ({"weight": value}, {"betas": [0.5, value]}, {"weights": {"coco": value}}):
        with pytest.raises(UserError, match=r"is .*; it must be .*finite"):
            config.from_mapping(Outer, {"steps": 1, **mapping})


def test_all_mistakes_are_given_in_one_answer() -> None:
    mapping = {
        "stps": 1,
        "weight": -1,
        "sizes": [1, -1, "x"],
        "inner": {"rate": 7},
        "shape": "circle",
        "shapes": [{"name": "square", "side": 0}, "circle"],
        "weights": {"coco": "x", "mine": "y"},
    }

    with pytest.raises(UserErrors) as refusal:
        config.from_mapping(Outer, mapping, "run")
    assert [sentence.partition(" ")[0] for sentence in refusal.value.sentences] == [
        "run.stps",
        "run.steps",
        "run.weight",
        "run.sizes.1",
        "run.sizes.2",
        "run.weights.coco",
        "run.weights.mine",
        "run.inner.rate",
        "run.shape.name",
        "run.shapes.0.side",
        "run.shapes.1.name",
    ]


def test_what_does_not_go_together_is_said_for_all_sections_at_once() -> None:
    """Together with values that are wrong by themselves.

    A caller that gives `unfit` gets the sections all the same, if the types are right.
    """
    training = {"steps": 10, "warmup_steps": 10, "keep_every": 300}
    sentences = [
        "{}: warmup_steps 10 must be below steps 10",
        "{}: checkpoint_every 200 must divide keep_every 300",
    ]
    mapping = {"first": training, "second": training}
    expected = [each.format(name) for name in mapping for each in sentences]

    with pytest.raises(UserErrors) as refusal:
        config.from_mapping(Two, mapping)
    assert list(refusal.value.sentences) == expected

    unfit: list[str] = []
    assert config.from_mapping(Two, mapping, unfit=unfit).first.steps == 10
    assert unfit == expected

    # The second section has a wrong value, and so is not checked any further.
    with pytest.raises(UserErrors) as refusal:
        config.from_mapping(Two, {"first": training, "second": {"steps": 0}})
    assert list(refusal.value.sentences) == [
        "second.steps is 0; it must be a whole number, at least 1",
        *expected[:2],
    ]


def test_component_by_bare_name_and_by_its_default_name() -> None:
    outer = config.from_mapping(Outer, {"steps": 1, "extra": "square", "shape": {"side": 4}})
    assert outer.extra == Component("square", Shapes.Config(side=1))
    assert outer.shape == Component("square", Shapes.Config(side=4))


def test_describe_reads_types_defaults_and_sentences() -> None:
    docs = {doc.name: doc for doc in config.describe(Outer)}
    assert docs["steps"] == config.FieldDoc(
        "steps", "a whole number, at least 1", "required", "Number of steps."
    )
    assert docs["root"].default == '"data"'
    assert docs["inner.rate"] == config.FieldDoc(
        "inner.rate", "a number, above 0 and below 1", "0.5", "Rate of something, over two lines."
    )

    assert docs["shapes"].type == "a list, each a shape by its name, or as a section"
    defaults = config.describe(Outer, {"steps": 7, "inner": {"rate": 0.1}})
    preset = {doc.name: doc.default for doc in defaults}
    assert (preset["steps"], preset["inner.rate"]) == ("7", "0.1")


def test_unfit_config_classes_are_refused() -> None:
    class Plain:
        pass

    @dataclass
    class Positional:
        x: int
        """A number."""

    @dataclass(kw_only=True)
    class Silent:
        x: int

    @dataclass(kw_only=True)
    class Strange:
        x: set[int]
        """A set."""

    for cls, reason in [
        (Plain, "must be a dataclass"),
        (Positional, "x must be keyword-only"),
        (Silent, "x needs one sentence"),
        (Strange, "cannot hold the type set"),
    ]:
        with pytest.raises(TypeError, match=reason):
            config.check_config_class(cls)


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ("a=1", (("a",), 1)),
        ("a.b=1e-4", (("a", "b"), 1e-4)),
        ("a=true", (("a",), True)),
        ("a=", (("a",), None)),
        ("a=null", (("a",), None)),
        ("a=[yes, '7', {b: 7}]", (("a",), [True, "7", {"b": 7}])),
        ("a=[1, {b: x}]", (("a",), [1, {"b": "x"}])),
        ("a='1'", (("a",), "1")),
        ("a=16:9", (("a",), "16:9")),
        ("a=2024-01-31", (("a",), "2024-01-31")),
        ("a=a dog: red #1", (("a",), "a dog: red #1")),
        ("a=b=c", (("a",), "b=c")),
    ],
)
def test_override_values(text: str, override: config.Override) -> None:
    """Where any value is allowed, a word is read as YAML."""
    path, word = config.parse_override(text)
    assert (path, config.settled(Any, word)) == override


TYPED = [
    "7",
    "yes",
    '"OPEN" sign',
    "'quoted'",
    "1e3",
    "2024",
    "[draft] a dog: red #1",
    "{",
    " two  spaces ",
    "",
    "~",
]


@pytest.mark.parametrize("text", TYPED)
def test_a_text_takes_what_was_typed(text: str) -> None:
    words = [f"inner.note={text}", f"root={text or '.'}", "steps=7", "flag=yes", "limit=7"]
    outer = config.from_mapping(
        Outer, config.apply_overrides({}, map(config.parse_override, words))
    )
    assert outer.inner.note == text
    assert outer.root == Path(text).expanduser()
    assert (outer.steps, outer.flag, outer.limit) == (7, True, 7)


@dataclass(kw_only=True)
class Boxed:
    """Lists of numbers, and one that may be a text."""

    box: tuple[NonNegativeInt, NonNegativeInt, int, int] | None = None
    words: tuple[int, int] | Literal["all"] = "all"
    names: list[str] = field(default_factory=list)
    switches: list[bool] = field(default_factory=list)


def test_numbers_with_commas_are_a_list_of_numbers() -> None:

    def read(cls: type, *words: str) -> Any:
        return config.from_mapping(
            cls, config.apply_overrides({}, map(config.parse_override, words))
        )

    boxed = read(Boxed, "box=0, 0,4,4", "words=2,5", "names=1,2")
    assert (boxed.box, boxed.words, boxed.names) == ((0, 0, 4, 4), (2, 5), ["1,2"])
    assert read(Boxed, "box=[0,0,4,4]").box == boxed.box
    outer = read(Outer, "steps=1", "sizes=3,2,1", "betas=0.5,1e-3")
    assert (outer.sizes, outer.betas) == ([3, 2, 1], (0.5, 0.001))

    # What is no such list is shown to the user as it was typed.
    for typed, shown in (
        ("box=1,2", 'box is "1,2"; it must be a list of 4: '),
        ("box=0,0,4,x", 'box is "0,0,4,x"; it must be a list of 4: '),
        ("box=-1,0,4,4", 'box is "-1,0,4,4"; it must be a list of 4: '),
        ("box=x", 'box is "x"; it must be a list of 4: '),
        ("box=[1,2]", "box is [1, 2]; it must be a list of 4: "),
        ("box=[0,0,4,4", "box is [0,0,4,4, which is not valid YAML"),
        ("words=2,5,7", 'words is "2,5,7"; it must be a list of 2: '),
        ("switches=true,false", 'switches.0 is "true,false"; it must be true or false'),
    ):
        with pytest.raises(UserError, match=re.escape(shown)):
            read(Boxed, typed)


def test_words_in_lists_and_sections_are_read_by_their_fields() -> None:
    words = [
        "steps=1",
        "names=[7, yes, 1e3, 'two words']",
        "sizes=[1, 2]",
        "inner={rate: 1e-1, note: 2024}",
        "weights={on: 1}",
        "shape={name: square, side: 3}",
        "extra=null",
        "shapes=[square, {name: square, side: 2}]",
        "mode=exact",
        "limit=all",
        "betas=[0, 1]",
    ]

    # Each word is read by the type of its field: a name stays a text, "on" is no truth value here.
    outer = config.from_mapping(
        Outer, config.apply_overrides({}, map(config.parse_override, words))
    )
    assert outer.names == ("7", "yes", "1e3", "two words")
    assert outer.inner == Inner(rate=0.1, note="2024")
    assert (outer.sizes, outer.weights) == ([1, 2], {"on": 1.0})
    assert (outer.limit, outer.mode) == ("all", "exact")
    assert [outer.shape, *outer.shapes] == [
        Component("square", Shapes.Config(side=side)) for side in (3, 1, 2)
    ]

    # A single word becomes a list of one.
    one = {"names": config.Word("7"), "sizes": config.Word("7"), "shapes": config.Word("square")}
    alone = config.from_mapping(Outer, {"steps": 1, **one})
    assert (alone.names, alone.sizes, len(alone.shapes)) == (("7",), [7], 1)

    # In a text that may be absent, null is no word but its absence.
    none = config.apply_overrides({}, [config.parse_override("inner.note=null")])
    assert config.from_mapping(Outer, {"steps": 1, **none}).inner.note is None


@dataclass(kw_only=True)
class Sources:
    """A field that takes a text or a list of them."""

    path: str | list[str]
    """One path, or several."""


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        ("a.tar", "a.tar"),
        ("2024", "2024"),
        ("[a.tar, 2024]", ["a.tar", "2024"]),
        ("[old] a.tar", "[old] a.tar"),
    ],
)
def test_a_text_or_a_list_takes_either(typed: str, path: str | list[str]) -> None:
    assert config.from_mapping(Sources, {"path": config.Word(typed)}).path == path


@pytest.mark.parametrize("typed", ["exact", '"exact"', "'exact'"])
def test_a_choice_may_stand_in_quotes(typed: str) -> None:
    word = config.Word(typed)
    outer = config.from_mapping(Outer, {"steps": 1, "mode": word, "inner": {"note": word}})
    assert (outer.mode, outer.inner.note) == ("exact", typed)


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(UserError, match='root is ""; it must be a path'):
        config.from_mapping(Outer, {"steps": 1, "root": config.Word("")})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps", "steps has no value; write steps=VALUE"),
        ("a..b=1", 'the key "a..b" has an empty part'),
        ("sizes=[1", "sizes is [1, which is not valid YAML, line 1: "),
        ("inner.rate='1", "inner.rate is '1, which is not valid YAML, line 1: "),
        ("steps=seven", 'steps is "seven"; it must be a whole number, at least 1'),
    ],
)
def test_bad_overrides(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        config.from_mapping(Outer, config.apply_overrides({}, [config.parse_override(text)]))


SECTIONS = frozenset({"model", "tasks.*"})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["seed=1"], {"seed": 1}),
        (["model.layers=3"], {"model": {"name": "small", "layers": 3}}),
        (["model=small"], {}),
        (["model=large"], {"model": {"name": "large"}}),
        (["model=large", "model.width=8"], {"model": {"name": "large", "width": 8}}),
        (["new.deep.key=1"], {"new": {"deep": {"key": 1}}}),
        (["tasks.0.share=1"], {"tasks": [{"name": "vqa", "share": 1}]}),
        (["tasks.0=caption"], {"tasks": [{"name": "caption"}]}),
        (["tasks=[]"], {"tasks": []}),
    ],
)
def test_overrides(overrides: list[str], expected: dict[str, Any]) -> None:
    mapping = {"seed": 0, "model": {"name": "small", "layers": 2}, "tasks": ["vqa"]}
    result = config.apply_overrides(mapping, map(config.parse_override, overrides), SECTIONS)
    assert config.settled(Any, result) == {**mapping, **expected}
    assert mapping == {"seed": 0, "model": {"name": "small", "layers": 2}, "tasks": ["vqa"]}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed.x=1", "seed is 0; it has no keys to set"),
        ("tasks.2.x=1", "tasks.2 does not exist; tasks is a list of 1, from 0"),
        ("tasks.first=1", "tasks.first does not exist"),
    ],
)
def test_overrides_that_lead_nowhere(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        config.apply_overrides(
            {"seed": 0, "tasks": ["vqa"]}, [config.parse_override(override)], SECTIONS
        )


def test_component_sections_of_a_class() -> None:
    assert config.component_sections(Outer) == {"shape", "extra", "shapes.*"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: 1\nb: 2\na: 3\n", ", line 3: the key a is given twice"),
        (b"a: 1\nb: [2\n", ", line 3: "),
        (b"- a\n", 'holds ["a"]; it must hold a section'),
        (b"", "holds null; it must hold a section"),
        (b"a: \xff", "is not UTF-8 text"),
        (b"a: \x00", ": "),
    ],
)
def test_bad_yaml_files_name_file_and_line(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + re.escape(sentence)):
        config.load_yaml(path)


def test_missing_yaml_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yaml is not a file"):
        config.load_yaml(tmp_path / "no.yaml")


def test_yaml_keeps_the_order_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(config.dump_yaml({"b": 1, "a": {"d": 1e-5, "c": "ä"}}))
    assert path.read_text().startswith("b: 1\na:\n  d: ")
    assert config.load_yaml(path) == {"b": 1, "a": {"d": 1e-5, "c": "ä"}}


def test_nearest_name() -> None:
    assert config.nearest("Layrs", ["layers", "width"]) == "layers"
    assert config.nearest("xyz", ["layers", "width"]) is None


def test_configuration_loads_nothing_heavy() -> None:
    code = "import sys, cm3leon.config; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
