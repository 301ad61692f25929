"""`seeds=2` with the experiment of a single run makes a study of it.

What such a study says of the runs' own evaluations is in test_study.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from cm3leon.commands.run import Options
from cm3leon.config import dump_yaml
from cm3leon.evaluation.metrics import Measured, average, proportion
from cm3leon.experiment import load_experiment
from cm3leon.run import main
from cm3leon.studies import load_study
from cm3leon.studies.seeds import over_seeds
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


@pytest.mark.parametrize(
    "words",
    [
        ["model.layers=3"],
        ["overrides=smoke"],
        ["overrides=smoke", "model=cm3leon_350m"],
        ["model.layers=3", "overrides=smoke", "model=cm3leon", "model.width=128"],
        ["decoder.cfg=2.5", "decoder=cd_k"],
        ["decoder=cd_k", "decoder.k=3", "text_decoder={name: beam, beams: 2}"],
        ["evaluations.guidance.sweep.decoder.cfg=1,3", "evaluations.caption.sweep.documents=0,2"],
        ["evaluations={}", "aims=[]", "seed=7", "retriever=lexical"],
    ],
)
def test_words_mean_what_they_mean_to_a_single_run(words, tmp_path):
    study = load_study("digits", ["seeds=2", *words], tmp_path)
    alone = load_experiment("digits", words)
    assert study.experiment("digits") == alone
    assert study.experiment("digits-seed_1") == replace(alone, seed=alone.seed + 1)

    # The same holds of the study as its folder keeps it.
    (tmp_path / "study.yaml").write_text(dump_yaml(study.written))
    again = load_study(str(tmp_path / "study.yaml"), (), tmp_path)
    assert again.experiment("digits-seed_1") == study.experiment("digits-seed_1")


@pytest.mark.usefixtures("registries")
def test_a_plugin_may_bring_the_launcher_and_is_found_from_anywhere(tmp_path, monkeypatch):
    plugin = tmp_path / "elsewhere.py"
    plugin.write_text(
        "from cm3leon.launch.launchers import Local\n"
        "from cm3leon.registry import LAUNCHERS\n\n"
        "@LAUNCHERS.register('elsewhere')\n"
        "class Elsewhere(Local):\n"
        '    """Jobs on this machine, by another name."""\n'
    )
    monkeypatch.chdir(tmp_path)
    words = ["seeds=2", "plugins=[elsewhere.py]", "launcher=elsewhere"]
    study = load_study("digits", words, tmp_path / "run")
    assert study.config.launcher.name == "elsewhere"
    assert study.config.plugins == [str(plugin)]
    assert study.experiment("digits-seed_1").plugins == [str(plugin)]


def test_a_stage_to_stop_at_is_that_of_the_runs(tmp_path, capsys):
    words = ["experiment=digits_smoke", "seeds=2", f"run={tmp_path / 'run'}"]
    assert main([*words, "until=text_tokenizer"]) == 0
    for name in ("digits_smoke", "digits_smoke-seed_1"):
        assert (tmp_path / "run" / name / "text_tokenizer" / "stage.json").is_file()
        assert not (tmp_path / "run" / name / "image_tokenizer").exists()
    assert main([*words, "until=text_tokeniser"]) == 2
    assert "did you mean text_tokenizer?" in capsys.readouterr().err


def test_other_commands_say_that_they_take_one_seed(tmp_path, capsys):
    assert main(["plan", "experiment=pretrain_350m", "seeds=2"]) == 2
    assert "seeds: pretrain_350m is a single run" in capsys.readouterr().err
    words = ["stage=tokens", "part=0/2", "experiment=digits", f"run={tmp_path / 'run'}"]
    assert main(["part", *words, "seeds=2"]) == 2
    assert "asks its models nothing, so there is nothing to share" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_interval_over_seeds_of_a_share_is_one_of_shares():
    hits = [[True] * 19 + [False], [True] * 8 + [False] * 12]
    shares = [asdict(proportion(np.array(each))) for each in hits]
    means = [asdict(average(np.array(each, float))) for each in hits]
    results = []
    for share, mean in zip(shares, means, strict=True):
        metrics = json.loads(json.dumps({"right": share, "score": mean}))
        results.append({"metrics": metrics, "seconds": 1.0})
    found = over_seeds(results)["metrics"]

    # 0.95 and 0.4: mean 0.675, deviation 0.389, and t = 12.706 for one degree of freedom.
    half = 12.7062047 * 0.3889087 / 2**0.5
    assert found["right"]["runs"]["low"] == 0.0
    assert found["right"]["runs"]["high"] == 1.0
    assert found["score"]["runs"]["low"] == pytest.approx(0.675 - half, rel=1e-4)
    assert found["score"]["runs"]["high"] == pytest.approx(0.675 + half, rel=1e-4)
    assert found["right"]["value"] == found["score"]["value"] == pytest.approx(0.675)


@pytest.mark.parametrize("values", [(6267.0, 4811.0, 9002.0), (-0.2, 0.1, -0.4), (1.5, 0.5, 0.2)])
def test_figures_that_are_no_shares_have_a_mean_and_a_spread(values):
    """A distance, a correlation, a score that may be above 1."""
    results = []
    for value in values:
        figure = asdict(Measured(value, value - 1, value + 1, 112))
        results.append({"metrics": {"figure": figure}, "seconds": 1.0})
    found = over_seeds(results)["metrics"]["figure"]
    assert found["value"] == pytest.approx(np.mean(values))
    assert found["runs"]["values"] == list(values)
    assert found["runs"]["deviation"] == pytest.approx(np.std(values, ddof=1))

    # 4.303 is Student's t for two degrees of freedom.
    half = 4.30265 * np.std(values, ddof=1) / 3**0.5
    assert found["runs"]["low"] == pytest.approx(np.mean(values) - half, rel=1e-3)
    assert found["runs"]["high"] == pytest.approx(np.mean(values) + half, rel=1e-3)


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
        (["seeds=2", "sweep.seed=0,1"], r"^seeds is 2, and runs.digits.sweep has seeds too"),
    ],
)
def test_mistakes_are_told(words, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        load_study("digits", words, tmp_path)


def test_a_sweep_says_where_its_seeds_come_from(tmp_path):
    with pytest.raises(UserError, match=r"^seeds: sweep_digits is a sweep, .*sweep.seed=0,1,2$"):
        load_study("sweep_digits", ["seeds=2"], tmp_path)
