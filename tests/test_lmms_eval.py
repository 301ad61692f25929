"""The plugin for lmms-eval measures a finished run, by a local task and two of lmms-eval's own."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    """As much of lmms-eval's Instance as the plugin reads."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def run(tuned_model: CM3Leon) -> Path:
    return tuned_model.run.folder


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (40, 32), (40 * number, 100, 200 - 30 * number))


def plugin_of(run: Path, items: list[dict[str, Any]], images: Path | None = None) -> CM3LeonModel:
    """The plugin's model, made without its constructor, which needs lmms-eval itself."""
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

    def request(number: int, rest: Any) -> Request:
        return Request("What is it?", rest, visual, number, "colours", "test")

    asked = [request(number, {"max_new_tokens": 4}) for number in range(3)]
    expected = []
    for number in range(3):
        answer = model._model.answer(picture(number), "What is it?", max_tokens=4)
        expected.append(_until(answer, ()))
    assert model.generate_until(asked) == expected

    scored = [request(number, lambda doc: " red") for number in range(2)]
    found = model.loglikelihood(scored)
    for number, (score, greedy) in enumerate(found):
        (likelihood,) = model._model.score(
            texts=["red"], image=picture(number), question="What is it?"
        )
        assert score == pytest.approx(likelihood)
        assert isinstance(greedy, bool)

    # Requests that the model has no answer to.
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

    # Without an image one is drawn, with an image it is edited, and two are refused.
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
        file = tmp_path / f"{number}.png"
        picture(number).save(file)
        lines.append({"image": str(file), "question": "What is it?", "answer": "red"})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    # A task as lmms-eval's documentation has it: a YAML file and functions beside it.
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(
        "from PIL import Image\n\n\n"
        "def visual(doc):\n    return [Image.open(doc['image']).convert('RGB')]\n\n\n"
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
    matched = sum(answer == "red" for answer in answers) / 4
    assert found["results"]["colours_local"]["exact_match,none"] == matched


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible judge, which scores the last image that it is sent with 1 or 2."""

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        asked = json.loads(self.rfile.read(length))

        # The image is a data URL among the parts of the last message.
        parts = [each for each in asked["messages"][-1]["content"] if each["type"] == "image_url"]
        content = base64.b64decode(parts[-1]["image_url"]["url"].partition(",")[2])
        score = score_of(Image.open(io.BytesIO(content)))

        text = f"Consistency: {score}\nRealism: {score}\nAesthetic Quality: {score}"
        choice = {"index": 0, "finish_reason": "stop"}
        choice["message"] = {"role": "assistant", "content": text}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge"}
        body = json.dumps({**answer, "choices": [choice]}).encode()

        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


def score_of(image: Image.Image) -> int:
    """1 or 2, by the image's pixels; lmms-eval has 0 for what could not be judged."""
    return 1 + int(np.asarray(image.convert("L"), np.int64).sum() % 2)


@pytest.fixture
def judge() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_tasks_of_generation_and_editing_score_what_the_model_draws(
    run: Path, tmp_path: Path, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WISE and ImgEdit as lmms-eval has them, on local items and with a local judge."""
    lmms_eval = pytest.importorskip("lmms_eval", reason="the extra lmms is not installed")
    datasets = pytest.importorskip("datasets", reason="the extra lmms is not installed")

    # datasets has read the environment when it was imported, maybe by another test.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    for task in ("WISE", "IMGEDIT"):
        monkeypatch.setenv(f"{task}_API_KEY", "none")
        monkeypatch.setenv(f"{task}_BASE_URL", judge)
    monkeypatch.setenv("WISE_CALL_DELAY", "0")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    prompts = ["a red square", "a blue circle", "two rings"]
    rest = {"Category": "x", "Subcategory": "y", "Explanation": ""}
    wise = [{"Prompt": text, "prompt_id": n, **rest} for n, text in enumerate(prompts, 1)]
    edits = [
        {"image": picture(n), "prompt": f"make it {n}", "key": str(n), "edit_type": "adjust"}
        for n in range(3)
    ]

    # Each task is lmms-eval's own file, except for where its items lie.
    (tmp_path / "tasks").mkdir()
    published = Path(lmms_eval.__file__).parent / "tasks"
    for task, rows in (("WISE/WISE", wise), ("imgedit/imgedit", edits)):
        file = tmp_path / f"{Path(task).name}.parquet"
        datasets.Dataset.from_list(rows).to_parquet(str(file))
        local = {
            "include": str(published / f"{task}.yaml"),
            "task": f"{Path(task).name}_local",
            "dataset_path": "parquet",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
        }
        settings = tmp_path / "tasks" / f"{Path(task).name}_local.yaml"
        settings.write_text(yaml.safe_dump(local, sort_keys=False))

    found = simple_evaluate(
        model="cm3leon",
        model_args=f"pretrained={run},precision=float32,images={tmp_path / 'drawn'},samples=2",
        tasks=["WISE_local", "imgedit_local"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=1,
    )

    # The judge gives all three scores alike, so an image's WiScore is half of one of them.
    model = CM3Leon.load(run, precision="float32")
    drawn = [model.generate(text, n=2)[0].image for text in prompts]
    for number, image in enumerate(drawn):
        written = Image.open(tmp_path / "drawn" / f"WISE_local_{number}.png")
        assert np.array_equal(np.asarray(written), np.asarray(image))
    expected = np.mean([score_of(image) for image in drawn]) / 2
    assert found["results"]["WISE_local"]["WISE_overall_wiscore,none"] == pytest.approx(expected)

    edited = [model.edit(picture(n), f"make it {n}", n=2)[0].image for n in range(3)]
    score = found["results"]["imgedit_local"]["imgedit_avg_score,none"]
    assert score == pytest.approx(np.mean([score_of(image) for image in edited]))
