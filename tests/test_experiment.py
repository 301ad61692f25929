"""How experiments are found, overridden and extended by plugins."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import torch

from cm3leon import experiment
from cm3leon.config import Component, dump_yaml, from_mapping, to_mapping
from cm3leon.registry import PROTOCOLS
from cm3leon.stages.run_folder import RunFolder
from cm3leon.types import UserError

METRIC = '''
from dataclasses import dataclass

from cm3leon.evaluation.protocols.base import Protocol
from cm3leon.registry import PROTOCOLS


@PROTOCOLS.register("{name}")
class {name}(Protocol):
    """A protocol of a plugin."""

    @dataclass(kw_only=True)
    class Config:
        scale: float = 1.0
        """Factor."""

        {name}_only: int = 0
        """A field that the other protocol lacks."""
'''


@dataclass(kw_only=True)
class Small:
    """Stands in for `Experiment`: what is tested here does not depend on its sections."""

    seed: int = 0
    """Seed."""

    plugins: list[str] = field(default_factory=list)
    """Plugins."""

    metric: Annotated[Component, PROTOCOLS]
    """A component."""


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None) -> Path:
    """A folder with experiments.yaml, an experiment, and a plugin with two protocols."""
    monkeypatch.setattr("cm3leon.experiment.files.Experiment", Small)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/plugin.py").write_text(
        METRIC.format(name="alpha") + METRIC.format(name="beta")
    )
    (tmp_path / "experiments/base.yaml").write_text(
        "seed: 1\nplugins: [plugin.py]\nmetric: {name: alpha, scale: 2, alpha_only: 5}\n"
    )

    # Two entries of one file, of which the second overrides the seed and the protocol.
    entries = {
        "plain": {
            "file": "experiments/base.yaml",
            "cost": "1 CPU core, 1 s",
            "expect": "nothing",
        },
        "other": {
            "file": "experiments/base.yaml",
            "cost": "1 CPU core, 1 s",
            "expect": "nothing",
            "overrides": {"seed": 2, "metric": "beta"},
        },
    }
    (tmp_path / "experiments.yaml").write_text(dump_yaml(entries))
    return tmp_path


def load(name: str, overrides: list[str], shipped: Path) -> Small:
    loaded = experiment.load_experiment(name, overrides, shipped)
    assert isinstance(loaded, Small)
    return loaded


def test_command_line_wins_over_entry_wins_over_file(shipped: Path) -> None:
    assert load("plain", [], shipped).seed == 1
    assert load("other", [], shipped).seed == 2
    assert load("other", ["seed=3"], shipped).seed == 3


def test_another_component_takes_no_keys_of_the_old_one(shipped: Path) -> None:
    assert to_mapping(load("plain", [], shipped).metric) == {
        "name": "alpha",
        "scale": 2.0,
        "alpha_only": 5,
    }
    assert to_mapping(load("other", ["metric.scale=3"], shipped).metric) == {
        "name": "beta",
        "scale": 3.0,
        "beta_only": 0,
    }


def test_resolved_copy_loads_from_anywhere(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load("plain", ["seed=9"], shipped)

    copy = shipped / "runs/digits/resolved.yaml"
    copy.parent.mkdir(parents=True)
    copy.write_text(dump_yaml(to_mapping(loaded)))

    # Relative paths, such as the plugin's, are absolute in the copy.
    monkeypatch.chdir("/")
    assert load(str(copy), [], shipped) == loaded
    assert loaded.plugins == [str(shipped / "experiments/plugin.py")]


def test_plugins_of_the_command_line_are_relative_to_the_working_folder(
    shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shipped / "experiments")
    bare = shipped / "bare.yaml"
    bare.write_text("metric: alpha\n")
    assert load(str(bare), ["plugins=[plugin.py]"], shipped).plugins == [
        str(shipped / "experiments/plugin.py")
    ]


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        (
            "plane",
            [],
            "experiment is plane, which is not known; did you mean plain? (known: other, plain)",
        ),
        ("no/such.yaml", [], "no/such.yaml is not a file"),
        ("plain", ["sed=1"], "sed is not a known key; did you mean seed?"),
        ("plain", ["metric.scale=big"], 'metric.scale is "big"; it must be a number'),
        (
            "plain",
            ["metric=alhpa"],
            "metric.name is alhpa, which is not a known protocol; did you mean alpha?",
        ),
        ("plain", ["plugins=[[3]]"], "plugins.0 is [3]; it must be a text"),
        ("plain", ["plugins=[gone.py]"], "gone.py does not exist"),
    ],
)
def test_each_mistake_has_its_sentence(
    shipped: Path, name: str, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        load(name, overrides, shipped)


def test_entries_are_checked(shipped: Path) -> None:
    (shipped / "experiments.yaml").write_text("plain: {file: a.yaml, cost: none}\n")
    with pytest.raises(UserError, match=r"experiments\.yaml: plain\.expect is missing"):
        experiment.list_experiments(shipped)


def test_experiment_name() -> None:
    assert experiment.experiment_name("digits") == "digits"
    assert experiment.experiment_name("mine/digits.yaml") == "digits"


SINGLE = [
    name
    for name in experiment.list_experiments()
    if not (experiment.is_study(name) or experiment.is_sweep(name))
]


@pytest.mark.parametrize("name", SINGLE)
def test_shipped_experiments_resolve(name: str) -> None:
    try:
        loaded = experiment.load_experiment(name)
    except UserError as error:
        # An experiment may leave to the user what only the user has, such as a folder.
        if not re.match(r"data\.\w+ is missing", str(error)):
            raise
        return

    assert from_mapping(experiment.Experiment, to_mapping(loaded)) == loaded


def test_the_first_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    """What a run built before its model, such as an image tokenizer, does not matter."""
    digits = experiment.load_experiment("digits_smoke")
    fresh, asked = (RunFolder(digits, tmp_path, torch.device("cpu")) for _ in range(2))
    assert asked.vocab.size == 512
    asked.new_image_tokenizer()

    first, *others = [run.new_model().state_dict() for run in (fresh, asked, asked)]
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in other)
