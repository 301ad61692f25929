"""The JSON Schema for editors takes every shipped file and refuses what our own check refuses."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import cm3leon

from cm3leon.config import from_mapping, load_yaml, to_mapping
from cm3leon.experiment import Experiment, load_experiment, load_mapping
from cm3leon.registry import REGISTRIES, discover
from cm3leon.types import UserError

jsonschema = pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "experiments/schema.json"
YAML_FILES = [*(ROOT / "experiments").rglob("*.yaml"), *(ROOT / "plugins").rglob("*.yaml")]
FILES = sorted(file for file in YAML_FILES if "overrides" not in file.parts)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(SCHEMA.read_text())


@pytest.fixture(scope="module")
def validator(schema: dict[str, Any]) -> Any:
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def of_definition(schema: dict[str, Any], name: str) -> Any:
    return jsonschema.Draft7Validator(
        {"$ref": f"#/definitions/{name}", "definitions": schema["definitions"]}
    )


def mistakes(validator: Any, content: Any) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(content)]


def test_the_shipped_schema_is_todays() -> None:
    """The command python -m cm3leon.run --schema > experiments/schema.json makes it again."""
    assert cm3leon("--schema").stdout == SCHEMA.read_text()


def test_every_shipped_file_names_its_schema() -> None:
    # The files of docs/ are tables of its pages, and no experiments.
    words = ["git", "ls-files", "*.yaml", ":!docs"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = done.stdout.split()
    assert {Path(file) for file in tracked} >= {file.relative_to(ROOT) for file in FILES}

    for file in (ROOT / name for name in tracked):
        found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", file.read_text())
        assert found, file
        named = Path(os.path.normpath(file.parent / found[1]))
        assert named.parent == SCHEMA.parent, file

        # A schema of another kind of file refers into the same file of definitions.
        content = json.loads(named.read_text())
        if named != SCHEMA:
            place, _, name = content["$ref"].rpartition("/")
            assert place == "schema.json#/definitions"
            assert name in json.loads(SCHEMA.read_text())["definitions"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_shipped_file_is_taken(validator: Any, file: Path) -> None:
    assert not mistakes(validator, load_yaml(file))


def test_lists_and_overrides_are_taken(schema: dict[str, Any]) -> None:
    assert not mistakes(of_definition(schema, "list"), load_yaml(ROOT / "experiments.yaml"))
    for file in (ROOT / "experiments/overrides").glob("*.yaml"):
        assert not mistakes(of_definition(schema, "overrides"), load_yaml(file))


@pytest.mark.parametrize("name", ["digits", "pretrain_7b", "fill_in_the_middle"])
def test_what_is_filled_in_is_taken_too(validator: Any, name: str) -> None:
    """The experiment with every default, as `--show` prints it and a run's folder keeps it."""
    resolved = json.loads(json.dumps(to_mapping(load_experiment(name))))
    assert not mistakes(validator, resolved)


WRONG = [
    ("trainig", {"steps": 1}),
    ("training.stepz", 3),
    ("training.steps", 0),
    ("training.steps", "many"),
    ("training.steps", True),
    ("training.schedule", "zigzag"),
    ("training.final_rate", 1.5),
    ("split.held_out", -0.1),
    ("model", "cm3leon_70b"),
    ("model.name", "cm3leon_70b"),
    ("model.layerz", 2),
    ("model.layers", 0),
    ("decoder", {"name": "top_p", "top_p": 2.0}),
    ("decoder", {"name": "greedy", "top_p": 0.5}),
    ("retriever.encoder.width", "wide"),
    ("loggers", ["tensorbord"]),
    ("loggers", [{"name": "wandb", "mode": "sometimes"}]),
    ("evaluations.caption.titel", "x"),
    ("evaluations.caption.protocol", "corpuss"),
    ("aims", [{"label": "x"}]),
    ("seed", -1),
    ("sentinels", None),
    ("plugins", [1]),
    ("until", 3),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{key}={value}" for key, value in WRONG])
def test_what_is_wrong_is_refused_as_by_our_own_check(validator: Any, key: str, value: Any) -> None:
    mapping = load_mapping("digits")
    assert not mistakes(validator, mapping)

    from_mapping(Experiment, mapping)
    *parents, last = key.split(".")
    section: Any = mapping
    for parent in parents:
        section = section[parent]
    section[last] = value

    with pytest.raises(UserError):
        from_mapping(Experiment, copy.deepcopy(mapping))

    # What is missing may be given on the command line, so the schema requires nothing.
    if key != "aims":
        assert mistakes(validator, mapping)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("overrides", {"training.stepz": 3}),
        ("overrides", {"training.steps": 0}),
        ("overrides", {"model.name": "nothing"}),
        ("overrides", {"evaluations.caption.titel": "x"}),
        ("overrides", {"sweeps.training.steps": [1, 2]}),
        ("list", {"mine": {"file": "a.yaml", "cost": "c", "expect": "e", "owner": "me"}}),
        ("list", {"mine": {"file": "a.yaml", "overrides": {"modell.layers": 2}}}),
    ],
)
def test_dotted_keys_are_known(schema: dict[str, Any], name: str, content: Any) -> None:
    assert mistakes(of_definition(schema, name), content)


def test_studies_are_told_from_experiments(validator: Any) -> None:
    study: dict[str, Any] = {
        "title": "Two rates",
        "runs": {"a": {"experiment": "digits", "overrides": {"training.learning_rate": 1e-3}}},
    }
    assert not mistakes(validator, study)
    for wrong in (
        {**study, "seeds": 0},
        {**study, "training": {"steps": 3}},
        {**study, "runs": {"a": {"experiment": "digits", "overrides": {"training.rate": 1}}}},
        {**study, "runs": {"a": {"experiment": "digits", "sweep": {"training.rate": [1, 2]}}}},
        {"title": "x", "evaluations": {"a": {"protocol": "nothing", "models": {}}}},
    ):
        assert mistakes(validator, wrong), wrong


def sentences(schema: Any) -> Iterator[str]:
    for key, value in schema.items():
        if key == "properties":
            yield from (f"{name}: {each.get('description', '-')}" for name, each in value.items())


def test_an_editor_is_told_every_component_and_what_each_key_means(schema: dict[str, Any]) -> None:
    discover()
    for registry in REGISTRIES:
        definition = schema["definitions"].get(registry.kind)
        if definition is None:  # no section names one
            continue
        assert definition["anyOf"][0]["enum"] == registry.names()
        assert all(definition["anyOf"][0]["enumDescriptions"])
        for case in definition["anyOf"][1]["allOf"]:
            said = sentences(case["then"])
            assert all(len(each) > 8 for each in said if not each.startswith("name: "))
    assert all(len(each) > 8 for each in sentences(schema["definitions"]["experiment"]))
