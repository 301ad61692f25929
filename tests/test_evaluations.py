"""A run's own evaluations: aims, rows and the best of them, documents of other prompts.

Also what becomes of sections, runs and figures of earlier versions.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from records import finish

from cm3leon.config import dump_yaml, to_mapping
from cm3leon.evaluate.asking import ItemAsker, check_others
from cm3leon.evaluation.config import Aim, AskConfig, EvaluationConfig, with_values
from cm3leon.evaluation.protocols.base import Item, Protocol
from cm3leon.evaluation.report.answers import aim_fact, evaluation_section
from cm3leon.experiment import load_experiment
from cm3leon.registry import PROTOCOLS, discover
from cm3leon.run import main
from cm3leon.stages.evaluation import best_row, evaluation_inputs
from cm3leon.stages.opening import open_run
from cm3leon.stages.run_folder import RunFolder
from cm3leon.studies.results import read_figures
from cm3leon.types import Document, Notice, TextSegment, TokenDocument, UserError

discover()

ASKED = (
    "evaluations={a: {title: A, protocol: {name: corpus, task: caption}, "
    "sweep: {documents: [0, 1]}}}"
)


# -------------------------------------------------------------------------------------------- aims


def row(name: str, value: float, low: float, high: float) -> dict[str, Any]:
    """A row of results with one figure, its interval, and a ceiling."""
    figure = {"value": value, "low": low, "high": high, "n": 100}
    levels = {"ceiling": {"accuracy": {"value": 0.98}}, "chance": {}}
    return {"row": name, "metrics": {"accuracy": figure}, **levels}


FOUND = {"images": [row("cfg 1", 0.8, 0.75, 0.85), row("cfg 2", 0.9, 0.85, 0.95)]}


@pytest.mark.parametrize(
    ("bounds", "status", "said"),
    [
        ({"at_least": 0.9}, "good", "aim at least 0.900: met"),
        ({"at_least": 0.95}, "plain", "aim at least 0.950: missed, but within the interval"),
        ({"at_least": 0.951}, "bad", "aim at least 0.951: missed"),
        ({"at_most": 0.9}, "good", "aim at most 0.900: met"),
        ({"at_most": 0.85}, "plain", "aim at most 0.850: missed, but within the interval"),
        ({"at_most": 0.84}, "bad", "aim at most 0.840: missed"),
        ({"at_least": 0.92, "at_most": 0.99}, "plain", "at least 0.920 and at most 0.990: missed,"),
        ({"at_least": 0.8, "at_most": 0.95}, "good", "at least 0.800 and at most 0.950: met"),
        ({}, "plain", "[0.850, 0.950]; ceiling 0.980"),
    ],
)
def test_an_aim_is_met_missed_within_the_interval_or_missed(
    bounds: dict[str, float], status: str, said: str
) -> None:
    aim = Aim(label="right", evaluation="images", row="cfg 2", metric="accuracy", **bounds)
    fact = aim_fact(aim, FOUND)
    assert (fact.value, fact.status) == ("0.900", status)
    assert said in fact.note
    assert fact.note.startswith("[0.850, 0.950]")
    assert fact.note.endswith("ceiling 0.980")
    assert ("missed" in fact.note) == (status == "bad" or "missed" in said)


def test_an_aim_of_a_figure_that_is_not_there_names_the_nearest() -> None:
    aim = Aim(label="right", evaluation="images", row="cfg 1", metric="acuracy", at_least=0.5)
    fact = aim_fact(aim, FOUND)
    assert (fact.value, fact.status) == ("–", "plain")
    assert fact.note == ("cfg 1 has no figure acuracy; did you mean accuracy? (known: accuracy)")


@pytest.mark.parametrize(
    ("aim", "sentence"),
    [
        ({"evaluation": "b"}, "aims: mine: evaluation is b, which is not known; known: a"),
        (
            {"row": "documents 2"},
            "aims: mine: row is documents 2, which a does not have; did you mean",
        ),
    ],
)
def test_an_aim_of_a_row_that_is_not_there_is_refused(
    aim: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {"label": "mine", "evaluation": "a", "row": "documents 1", "metric": "accuracy", **aim}
    words = [ASKED, f"aims={json.dumps([whole])}"]
    assert main(["experiment=digits_smoke", *words, "--show"]) == 2
    assert f"cm3leon: {sentence}" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- rows


def test_the_best_row_has_the_highest_first_figure_and_is_the_first_of_equals() -> None:
    rows = [row("a", 0.8, 0, 1), row("b", 0.9, 0, 1), row("c", 0.9, 0, 1)]
    assert best_row(rows)["row"] == "b"
    for each in rows:
        each["metrics"] = {"copies": {"value": 0.5}, **each["metrics"]}
    assert best_row(rows)["row"] == "a"
    assert best_row([{"row": "a", "metrics": {}}])["row"] == "a"


def test_of_distances_the_lowest_is_the_best() -> None:
    rows = [{"row": str(value), "metrics": {"FID": {"value": value}}} for value in (9.0, 7.5, 8.0)]
    assert best_row(rows, PROTOCOLS.get("captioned_images").lowest_is_best)["row"] == "7.5"
    assert best_row(rows)["row"] == "9.0"


def test_what_copies_least_is_the_best_where_nothing_can_be_read() -> None:
    rows = [{"row": str(value), "metrics": {"copies": {"value": value}}} for value in (0.5, 0.1)]
    assert best_row(rows, PROTOCOLS.get("corpus").lowest_is_best)["row"] == "0.1"


def test_a_metric_that_cannot_be_drawn_is_not() -> None:
    evaluation = EvaluationConfig(
        title="A",
        protocol=PROTOCOLS.check({"name": "corpus", "task": "caption"}),
        sweep={"documents": [0, 1]},
        plot="accuracy",
    )

    def blocks(metric: str, values: tuple[Any, Any]) -> int:
        rows = []
        for value in values:
            more = {"ceiling": {}, "point": {"documents": value}, "model": "", "items": 3}
            rows.append({**row(str(value), 0.5, 0.4, 0.6), **more})
        asked = dataclasses.replace(evaluation, plot=metric)
        return len(evaluation_section(asked, rows, [[], []]).blocks)

    # Neither an unknown metric nor a value that is no number has a place on an axis.
    with_curves = blocks("accuracy", (0, 1))
    assert blocks("acuracy", (0, 1)) == blocks("accuracy", (0, "many")) == with_curves - 1


def test_a_bank_of_a_setting_is_recorded_wherever_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluation = "{title: A, protocol: {name: corpus, task: caption}, setting: {bank: b}}"
    words = [f"evaluations={{a: {evaluation}}}", "aims=[]"]
    experiment = load_experiment("digits_smoke", words)
    assert experiment.evaluations["a"].setting["bank"] == str(tmp_path / "b")


def test_an_evaluation_is_made_anew_where_its_memory_bank_has_grown(tmp_path: Path) -> None:
    """An evaluation depends on what a bank holds, wherever it lies.

    The bank is the run's own with the documents added to it, or the one that a setting names.
    """
    banks = [tmp_path / name for name in ("one", "copy")]
    for bank in banks:
        (bank / "index").mkdir(parents=True)
        (bank / "index" / "index.json").write_text("{}")
        finish(bank / "index")
    (tmp_path / "run" / "index").mkdir(parents=True)

    def inputs(bank: Path) -> dict[str, Any]:
        setting = f"setting: {{documents: 1, bank: {bank}}}"
        evaluation = f"{{title: A, protocol: {{name: corpus, task: caption}}, {setting}}}"
        words = [f"evaluations={{a: {evaluation}}}", "aims=[]"]
        experiment = load_experiment("digits_smoke", words)
        run = RunFolder(experiment, tmp_path / "run", torch.device("cpu"))
        return evaluation_inputs(run)

    # Another folder with the same content changes nothing, documents added to either bank do.
    before = inputs(banks[0])
    assert inputs(banks[1]) == before

    (banks[0] / "index" / "added.arrow").write_bytes(b"more")
    grown = inputs(banks[0])
    assert grown != before
    (tmp_path / "run" / "index" / "added_tokens.arrow").write_bytes(b"more")
    assert inputs(banks[0]) != grown


def test_values_that_are_none_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    words = [ASKED.replace("[0, 1]", "'uniform(0,1)'"), "aims=[]"]
    assert main(["experiment=digits_smoke", *words, "--show"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "sweep.documents is uniform(0,1), a range to draw from" in said[0]


def test_values_of_a_point_take_the_place_of_a_setting_s() -> None:
    setting = {"decoder": {"name": "top_p", "cfg": 3}, "documents": 1}
    expected = {"decoder": {"name": "top_p", "cfg": 2}, "documents": 1, "seed": 5}
    assert with_values(setting, {"decoder.cfg": 2, "seed": 5}) == expected
    assert setting["decoder"] == {"name": "top_p", "cfg": 3}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evaluations.text_to_image.best_of=guidence"], "did you mean guidance?"),
        (["evaluations.text_to_image.best_of=caption"], "not an evaluation before it"),
        (["evaluations.guidance.best_of=guidance"], "none is known"),
        (["evaluations.guidance.sweep={decoder.cgf: [1]}"], "did you mean cfg?"),
        (["evaluations.text_to_image.setting.decoder=greedy"], "text_to_image.setting.decoder"),
        (["evaluations.caption.setting.dokuments=1"], "did you mean documents?"),
        (["evaluations.caption.protocol.task=captoin"], "did you mean caption?"),
        (
            ["evaluations.caption.plot=accuracy", "evaluations.caption.sweep={}"],
            "is drawn against the first key of sweep",
        ),
        (
            ["evaluations.caption.best_of=guidance", "text_decoder=greedy"],
            "caption.best_of is guidance, whose best row sets decoder.cfg, "
            "which the decoder greedy does not have",
        ),
    ],
)
def test_evaluations_that_do_not_go_together_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        load_experiment("digits", [*words, "aims=[]"])
    assert sentence in str(refused.value)
    assert "evaluations." in str(refused.value)


def test_a_key_of_the_decoder_is_set_in_the_run_s_own() -> None:
    words = [
        "decoder.top_p=0.8",
        "evaluations.caption.best_of=guidance",
        "text_decoder={name: top_p, top_p: 0.7}",
    ]
    experiment = load_experiment("digits", words)

    for name, best in (("guidance", {}), ("text_to_image", {"decoder.cfg": 3})):
        ((_, first), *_) = experiment.points_of(name, best)
        assert (first.decoder.name, first.decoder.config.top_p) == ("top_p", 0.8)
        assert first.decoder.config.cfg == (3 if best else 1)

    # A text's decoder is its own, and takes only the swept key from the best row.
    ((_, first), *_) = experiment.points_of("caption", {"decoder.cfg": 3})
    assert (first.decoder.name, first.decoder.config.cfg) == ("top_p", 3)
    assert first.decoder.config.top_p == 0.7

    ((_, first), *_) = experiment.points_of("text_to_image", {})
    assert first.decoder is None


def test_a_decoder_without_the_swept_key_is_asked_once() -> None:
    with pytest.warns(Notice, match="guidance.sweep: decoder.cfg is left out"):
        experiment = load_experiment("digits", ["decoder=greedy"])
    ((point, setting),) = experiment.points_of("guidance", {})
    assert (point, setting.decoder.name) == ({}, "greedy")


def test_a_shuffled_prompt_has_the_documents_of_the_next_one() -> None:
    """The model's stand-in retrieves for a text the document whose number the text is."""
    model = SimpleNamespace(
        retrieved=lambda texts, images_BHWC, by, count: [[int(text)] * count for text in texts],
        fitting=lambda task, documents, found, **_: found,
    )

    items = [Item(n, "text_to_image", Document(n, (TextSegment(n),))) for n in "012"]
    documents = [TokenDocument(n, ()) for n in "012"]
    setting = AskConfig(documents=2, shuffled=True)
    asker = ItemAsker(model, _Images({}), setting, None)  # type: ignore[arg-type]

    assert asker._retrieved(items, documents) == [[1, 1], [2, 2], [0, 0]]
    plain = dataclasses.replace(asker, setting=AskConfig(documents=2))
    assert plain._retrieved(items, documents) == [[0, 0], [1, 1], [2, 2]]
    none = dataclasses.replace(asker, setting=AskConfig(shuffled=True))
    assert none._retrieved(items, documents) == [[], [], []]


def test_an_item_that_has_no_other_is_given_no_documents_of_another() -> None:
    items = [Item(n, "text_to_image", Document(n, (TextSegment(n),))) for n in "012"]
    check_others(items, "file 0 of cfg 2")
    for few in (items[:1], [*items, dataclasses.replace(items[0], task="caption")]):
        with pytest.raises(UserError, match=r"file 0 of cfg 2 has only one item of the task"):
            check_others(few, "file 0 of cfg 2")


class _Images(Protocol):
    answers_in = "image"

    def items(self) -> list[Item]:
        return []

    def score(self, items: Any, answers: Any) -> dict[str, Any]:
        return {}


# -------------------------------------------------------------------------------- earlier versions


OLD = {
    "tasks": ["text_to_image", {"name": "caption", "max_tokens": 16}],
    "task_decoders": {"infill_top": "greedy"},
    "generation": {"samples": 8},
    "metrics": ["accuracy"],
}


@pytest.mark.parametrize("section", OLD)
@pytest.mark.parametrize("command", [[], ["plan"]])
def test_sections_of_earlier_versions_are_refused_with_what_to_write(
    section: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word = f"{section}={json.dumps(OLD[section])}"
    assert main([*command, "experiment=digits_smoke", word, f"run={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"cm3leon: digits_smoke has sections of earlier versions: {section}; " in said
    assert "write what the model is asked as evaluations, for example evaluations={caption:" in said
    assert not (tmp_path / "run").exists()


def test_a_file_with_all_of_them_is_refused_in_one_sentence_whose_example_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "old.yaml"
    mapping = {**to_mapping(load_experiment("digits_smoke")), **OLD}
    file.write_text(dump_yaml(mapping))

    assert main([f"experiment={file}", "--show"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ", ".join(sorted(OLD, key=said.index)) in said
    assert "tasks, task_decoders, generation, metrics" in said

    # The example in the message, copied as it stands, replaces what the file had.
    example = said[said.index("evaluations={") : said.rindex("}") + 1]
    file.write_text(dump_yaml({name: mapping[name] for name in mapping if name not in OLD}))
    experiment = load_experiment(str(file), [example, "aims=[]"])
    assert list(experiment.evaluations) == ["caption"]


@pytest.mark.parametrize("key", ["generation.cfg", "metrics", "tasks"])
def test_a_swept_key_of_an_earlier_version_is_refused(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment=digits_smoke", f"sweep.{key}=1,2", f"run={tmp_path / 'run'}"]) == 2
    assert f"{key.partition('.')[0]} is not a known key" in capsys.readouterr().err


def old_run(folder: Path) -> Path:
    """The folder of a run that an earlier version began."""
    folder.mkdir()
    mapping = {**to_mapping(load_experiment("digits_smoke")), **OLD}
    kept = {name: mapping[name] for name in mapping if name not in ("evaluations", "aims")}
    (folder / "config.yaml").write_text(dump_yaml(kept))
    return folder


def test_a_run_of_an_earlier_version_opens(tmp_path: Path) -> None:
    experiment = open_run(old_run(tmp_path / "old")).experiment
    assert experiment.evaluations == {}
    assert experiment.seed == load_experiment("digits_smoke").seed


def test_a_run_opens_with_the_evaluations_that_are_finished_whatever_its_aims_are(
    tmp_path: Path,
) -> None:
    folder = old_run(tmp_path / "run")
    (folder / "config.yaml").write_text(dump_yaml(to_mapping(load_experiment("digits_smoke"))))
    (folder / "evaluation").mkdir()

    asked = yaml.safe_load(ASKED.partition("=")[2])
    record = {
        "fingerprint": "0" * 64,
        "seconds": 1.0,
        "files": {},
        "settings": {"evaluations": asked},
    }
    (folder / "evaluation" / "stage.json").write_text(json.dumps(record))
    assert list(open_run(folder).experiment.evaluations) == ["a"]


def test_figures_of_an_earlier_version_are_refused_in_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"t2i_accuracy": [], "chosen_cfg": 1}))
    with pytest.raises(UserError, match=r"metrics\.json is of an earlier version; run the point"):
        read_figures(tmp_path)
