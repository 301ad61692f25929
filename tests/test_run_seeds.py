"""`seeds=2` with the experiment of a single run makes a study of it.

What such a study says of the runs' own evaluations is in test_study.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cm3leon.commands.run import Options
from cm3leon.config import dump_yaml
from cm3leon.run import main
from cm3leon.studies import load_study
from cm3leon.types import UserError


def test_a_run_becomes_a_study_of_that_run_with_each_seed(capsys):
    assert main(["experiment=digits", "seeds=2", "training.steps=300", "--show"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seeds"] == 2
    assert shown["runs"]["digits"]["experiment"] == "digits"
    assert shown["runs"]["digits"]["overrides"] == {"training.steps": 300}


def test_the_file_in_its_folder_is_the_same_study(tmp_path):
    study = load_study("digits", ["seeds=2", "overrides=smoke"], tmp_path)
    (tmp_path / "study.yaml").write_text(dump_yaml(study.written))
    again = load_study(str(tmp_path / "study.yaml"), (), tmp_path)
    assert list(again.runs) == ["digits", "digits-seed_1"]
    for name in study.runs:
        assert again.experiment(name) == study.experiment(name)
    assert study.experiment("digits-seed_1") == replace(study.experiment("digits"), seed=1)


def test_settings_are_those_of_the_run_and_the_launcher_is_the_studys(tmp_path):
    file = tmp_path / "mine.yaml"
    digits = yaml.safe_load(Path("experiments/digits.yaml").read_text())
    file.write_text(yaml.safe_dump({**digits, "seed": 5, "launcher": {"name": "local"}}))
    words = ["seeds=3", "training.steps=170", "sweep.training.learning_rate=1e-3,3e-3"]
    study = load_study(str(file), words, tmp_path / "run")

    assert study.config.launcher.name == "local"
    assert [name.partition("-seed_")[2] for name in study.runs] == ["", "", "1", "1", "2", "2"]
    rates, seeds = set(), set()
    for name in study.runs:
        experiment = study.experiment(name)
        assert experiment.training.steps == 170
        rates.add(experiment.training.learning_rate)
        seeds.add(experiment.seed)
    assert (rates, seeds) == ({1e-3, 3e-3}, {5, 6, 7})
    here = load_study(str(file), ["seeds=2", "launcher=here"], tmp_path / "run")
    assert here.config.launcher.name == "here"


def test_it_has_a_folder_of_its_own():
    assert Options(experiment="digits").folder == Path("runs/digits")
    several = Options(experiment="digits")
    several.overrides = ("seeds=2",)
    assert several.folder == Path("runs/digits-seeds")
    several.experiment = "entities"
    assert several.folder == Path("runs/entities")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["seeds=0"], r"^seeds is 0; it must be .* 1 to 30"),
        (["seeds=two"], r'^seeds is "two"; it must be a whole number'),
        (["seeds=2", "training.step=5"], r"^runs.digits: .*training.step is not a known key"),
        (["seeds=2", "overrides=smok"], r"^overrides is smok, which is not known"),
        (["seeds=2", "runs.other.seed=1"], r"^runs.other is not a run of this study"),
    ],
)
def test_mistakes_are_told(words, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        load_study("digits", words, tmp_path)


def test_a_sweep_says_where_its_seeds_come_from(tmp_path):
    with pytest.raises(UserError, match=r"^seeds: sweep_digits is a sweep, .*sweep.seed=0,1,2$"):
        load_study("sweep_digits", ["seeds=2"], tmp_path)
