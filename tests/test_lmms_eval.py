"""The plugin for lmms-eval: a local task is measured with a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from cm3leon.api import CM3Leon
from cm3leon.plugins.lmms_eval import CM3LeonModel, _file_name, _until
from cm3leon.types import UserError


def test_an_answer_ends_before_the_first_stop() -> None:
    assert _until("two. Three\nFour", ["\n", "."]) == "two"
    assert _until(" two ", "") == "two"


class Request:
    """As lmms-eval's Instance, as far as the plugin reads it."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def run(tuned_model: CM3Leon) -> Path:
    return tuned_model.run.folder


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (40, 32), (40 * number, 100, 200 - 30 * number))


def plugin_of(run: Path, items: list[dict[str, Any]], images: Path | None = None) -> CM3LeonModel:
    """The model without lmms-eval, which its constructor needs and which may not be installed."""
    model = CM3LeonModel.__new__(CM3LeonModel)
    model._model, model._rank = CM3Leon.load(run, precision="float32"), 0
    if not hasattr(CM3LeonModel, "rank"):
        model.rank = 0
    model.task_dict = {"colours": {"test": items}}
    model._images, model._drawing, model._retrieve = images, {"n": 1, "seed": 3}, 0
    return model


def test_requests_are_answered_and_scored_as_the_model_does(run: Path) -> None:
    model = plugin_of(run, [{"image": picture(n)} for n in range(3)])

    def visual(doc: Any) -> list[Any]:
        return [doc["image"]]

    asked = [
        Request("What is it?", {"max_new_tokens": 4}, visual, n, "colours", "test")
        for n in range(3)
    ]
    assert model.generate_until(asked) == [
        _until(model._model.answer(picture(n), "What is it?", max_tokens=4), ()) for n in range(3)
    ]
    scored = [
        Request("What is it?", lambda doc: " red", visual, n, "colours", "test") for n in range(2)
    ]
    found = model.loglikelihood(scored)
    for number, (score, greedy) in enumerate(found):
        (expected,) = model._model.score(
            texts=["red"], image=picture(number), question="What is it?"
        )
        assert score == pytest.approx(expected)
        assert isinstance(greedy, bool)
    for images, sentence in (
        (lambda doc: [], "has 0 images"),
        (lambda doc: [picture(0)] * 2, "has 2 images"),
    ):
        with pytest.raises(UserError, match=sentence):
            model.generate_until([Request("What?", {}, images, 0, "colours", "test")])
    with pytest.raises(UserError, match="several rounds"):
        model.generate_until_multi_round([])


def test_texts_are_drawn_and_images_edited_into_files(run: Path, tmp_path: Path) -> None:
    model = plugin_of(run, [{"image": picture(n)} for n in range(3)], tmp_path / "drawn")
    given: list[list[Any]] = [[], [picture(1)], [picture(0)] * 2]
    asked = [
        Request("a red ring ", {}, lambda doc, n=n: given[n], n, "colours", "test")
        for n in range(3)
    ]
    answers = [json.loads(each) for each in model.generate_until(asked[:2])]
    expected = [
        model._model.generate("a red ring", seed=3)[0].image,
        model._model.edit(picture(1), "a red ring", seed=3)[0].image,
    ]
    for number, (answer, image) in enumerate(zip(answers, expected, strict=True)):
        file = tmp_path / "drawn" / f"colours_{number}.png"
        assert answer == {"text": "", "images": [str(file)]}
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(image))
    with pytest.raises(UserError, match="has 2 images or videos; no image or one is taken"):
        model.generate_until(asked[2:])
    assert _file_name("../a/b", 1) == ".._a_b_1.png"


def test_lmms_eval_measures_a_local_task(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lmms_eval", reason="the extra lmms is not installed")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import list_available_models
    from lmms_eval.tasks import TaskManager

    assert "cm3leon" in list_available_models()
    lines = []
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
        lines.append(
            {"image": str(tmp_path / f"{number}.png"), "question": "What is it?", "answer": "red"}
        )
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(
        "from PIL import Image\n\n\ndef visual(doc):\n    return [Image.open(doc['image']).convert('RGB')]\n\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n"
    )
    task = {
        "task": "colours_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": "FUNCTION utils.visual",
        "doc_to_text": "FUNCTION utils.text",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    written = yaml.safe_dump(task, sort_keys=False).replace("FUNCTION", "!function")
    written = written.replace("'!function utils.visual'", "!function utils.visual")
    (tasks / "colours_local.yaml").write_text(written)
    found = simple_evaluate(
        model="cm3leon",
        model_args=f"pretrained={run}",
        tasks=["colours_local"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=1,
        log_samples=True,
    )
    samples = found["samples"]["colours_local"]
    model = CM3Leon.load(run)
    answers = [_until(model.answer(picture(n), "What is it?", max_tokens=4), ()) for n in range(4)]
    assert [sample["filtered_resps"][0] for sample in samples] == answers
    assert (
        found["results"]["colours_local"]["exact_match,none"]
        == sum(a == "red" for a in answers) / 4
    )
