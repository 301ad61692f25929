"""The whole path in small: `experiment=digits_smoke`, and a folder of images.

The first is killed at every stage and run again, shared by two ranks, and changed.
"""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest
from command_line import cm3leon
from corpora import digit_tars
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cm3leon.data.shards import open_shard, shard_path
from cm3leon.retrievers.neighbours import NeighbourShards
from cm3leon.run import main

ROOT = Path(__file__).resolve().parent.parent
STAGES = (
    "documents",
    "text_tokenizer",
    "image_tokenizer",
    "reconstruction",
    "retriever",
    "tokens",
    "vectors",
    "index",
    "neighbours",
    "pretraining",
    "evaluation",
)
KILLED = tuple(stage for stage in STAGES if stage not in ("text_tokenizer", "vectors", "index"))
"""Stages in which a run is killed; each of the others is like one beside it."""
TINY = (
    "evaluations.guidance.sweep={decoder.cfg: [1, 2]}",
    "evaluations.guidance.protocol.at_least=1",
    "evaluations.text_to_image.protocol.at_least=1",
    "evaluations.text_to_image.sweep={documents: [0, 1]}",
    "model.layers=1",
    "model.width=64",
)
TRAININGS = ("image_tokenizer", "retriever", "pretraining")
"""Stages that train."""
SECTIONS = ("image_tokenizer_training", "retriever_training", "training")
EACH = ("steps=4", "warmup_steps=1", "log_every=2", "checkpoint_every=2", "batch_size=4")
SHORT = tuple(f"{section}.{setting}" for section in SECTIONS for setting in EACH)


def run(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process."""
    done = processes.run("cm3leon.run", arguments)
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


def results(folder: Path) -> dict[str, object]:
    """All that has to be the same in two runs: losses, answers, weights and figures.

    Times are left out, and how to run it again, which names the folder.
    """
    # Times and paths differ between runs.
    metrics = json.loads((folder / "metrics.json").read_text())
    for key in ("wall_seconds", "to_run_again"):
        del metrics[key]
    for rows in metrics["evaluations"].values():
        for row in rows:
            del row["seconds"]

    losses = {}
    for stage in TRAININGS:
        records = []
        for line in (folder / stage / "log.jsonl").read_text().splitlines():
            record = json.loads(line)
            records.append({k: v for k, v in record.items() if not k.endswith("per_second")})
        losses[stage] = records

    files = {}
    for pattern in ("*/model.safetensors", "*/codes.npy", "*/*.arrow"):
        for file in sorted(folder.glob(pattern)):
            files[str(file.relative_to(folder))] = file.read_bytes()

    answers = {}
    for file in sorted(folder.glob("answers/*/*.npz")):
        with np.load(file) as held:
            arrays = {name: held[name].tolist() for name in held if name != "seconds"}
        answers[str(file.relative_to(folder))] = arrays
    assert answers
    return {"metrics": metrics, "losses": losses, "files": files, "answers": answers}


def answers(folder: Path) -> list[dict[str, np.ndarray]]:
    """The content of each of a run's files of answers."""
    found = []
    for file in sorted(folder.glob("answers/*/*.npz")):
        with np.load(file) as held:
            found.append(dict(held))
    assert found
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made as a user makes it, by a new interpreter.

    It shares no state with the processes that are compared with it.
    """
    folder = tmp_path_factory.mktemp("finished") / "digits_smoke"
    words = ["-m", "cm3leon.run", "experiment=digits_smoke", f"run={folder}"]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_commands_that_pages_print_find_everything_done(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    page = (finished / "report.html").read_text()
    printed = html.unescape(re.search(r"python -m cm3leon\.run [^<\n]+", page)[0])  # type: ignore[index]
    for command in {metrics["to_run_again"]["command"], printed}:
        assert cm3leon(*shlex.split(command)[3:]).stdout.count("up to date") == len(STAGES)


@pytest.mark.stack
def test_metrics_and_report_are_complete(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["judge_accuracy_real"] > 0.97
    names = {name: [row["row"] for row in rows] for name, rows in metrics["evaluations"].items()}
    asked = ("text_to_image", "caption", "infill_top", "infill_bottom")
    assert names["guidance"] == ["cfg 1", "cfg 2"]
    assert [names[name] for name in asked] == [["documents 0", "documents 1"]] * 4
    assert {*names} == {"guidance", *asked, "text_to_image_unrelated", "caption_unrelated"}

    held_out = metrics["documents"]["held_out"]
    assert sum(metrics["documents"].values()) == 1797
    rows = [row for name in asked for row in metrics["evaluations"][name]]
    for row in rows:
        assert row["items"] == held_out
        accuracy = row["metrics"]["accuracy"]
        assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
        assert row["metrics"]["given_kept"]["value"] == 1
        assert {"ceiling", "chance"} <= row.keys()

    assert set(metrics["wall_seconds"]) == {*STAGES, "total"}
    assert metrics["to_run_again"]["config"]["training"]["steps"] == 20

    # A report is one file: whatever it shows is part of it.
    page = (finished / "report.html").read_text()
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page), (
        "the report must not fetch anything"
    )
    assert page.count("<img") > 50


def test_generated_images_have_exactly_their_number_of_codes(finished: Path) -> None:
    drawn = [held["codes"] for held in answers(finished) if "codes" in held]
    assert drawn
    for codes_IsN in drawn:
        assert codes_IsN.shape[-1] == 16
        assert (codes_IsN >= 0).all()
        assert (codes_IsN < 128).all()


def test_held_out_documents_are_never_in_the_bank_nor_retrieved(finished: Path) -> None:
    documents = [
        json.loads(line)
        for line in (finished / "documents" / "documents.jsonl").read_text().splitlines()
    ]
    training = {document["id"] for document in documents if document["split"] == "train"}

    ids = open_shard(shard_path(finished / "vectors", 0, 1)).strings("id")
    assert set(ids) == training
    rows_BN = NeighbourShards(finished / "neighbours").shard(0)
    assert not (rows_BN == np.arange(len(ids))[:, None]).any(), "a query never retrieves itself"
    for held in answers(finished):
        # The rows are the bank's, so of training documents alone; -1 stands for no document.
        assert (held["rows"] < len(ids)).all()


def test_a_second_run_makes_nothing_again(finished: Path) -> None:
    before, page = results(finished), finished / "report.html"
    written = page.stat().st_mtime_ns
    done = run("experiment=digits_smoke", f"run={finished}")
    lines = done.stdout.splitlines()
    expected = [f"{stage}: up to date" for stage in STAGES]
    assert [line.partition("] ")[2] for line in lines[: len(STAGES)]] == expected
    assert not any(line.startswith("[") for line in lines[len(STAGES) :])  # the figures alone
    assert results(finished) == before
    assert page.stat().st_mtime_ns == written

    # A page that is gone is written again, with answers that are gone.
    page.unlink()
    sorted(finished.glob("answers/*/00000.npz"))[0].unlink()
    run("experiment=digits_smoke", f"run={finished}")
    assert page.is_file()
    assert results(finished) == before


@pytest.mark.slow
def test_killed_at_every_stage_equals_uninterrupted(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits_smoke"
    for stage in KILLED:
        _kill_in(folder, stage)
    run("experiment=digits_smoke", f"run={folder}")
    assert results(folder) == results(finished)


def _kill_in(folder: Path, stage: str) -> None:
    """Start the run and kill it (SIGKILL) once the stage has begun; one that trains, once it has a
    checkpoint."""
    process = processes.Forked("cm3leon.run", ["experiment=digits_smoke", f"run={folder}"])
    trains = stage in TRAININGS
    try:
        while process.poll() is None:
            begun = folder / stage / "started.json"
            if begun.is_file() and (not trains or list((folder / stage).glob("step_*"))):
                break
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_changed_setting_makes_only_what_depends_on_it(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", finished, folder], check=True)
    asked = set(folder.glob("answers/*"))

    done = run(
        "experiment=digits_smoke", f"run={folder}", "evaluations.caption.setting.max_tokens=8"
    )

    # Captions are asked anew without a document and with one, and nothing else is.
    assert len(set(folder.glob("answers/*")) - asked) == 2
    up_to_date = [line for line in done.stdout.splitlines() if line.endswith("up to date")]
    assert len(up_to_date) == len(STAGES) - 1
    assert (folder / "superseded").is_dir()


@pytest.mark.slow
@pytest.mark.stack
@pytest.mark.once
def test_two_ranks_take_up_a_run_at_its_pretraining(finished: Path, tmp_path: Path) -> None:
    """Its losses are those of one process up to bf16's rounding; the stages after it are made by
    the first rank."""
    folder = tmp_path / "digits_smoke"
    shutil.copytree(finished, folder)
    for stage in ("pretraining", "evaluation", "answers"):
        shutil.rmtree(folder / stage)
    (folder / "report.html").unlink()

    ranks = processes.group("cm3leon.run", ["experiment=digits_smoke", f"run={folder}"], 2)
    assert processes.finish(ranks) == [0, 0]

    *figures, report, following = ranks[0].said(0).splitlines()[-7:]
    assert report == f"report: file://{folder / 'report.html'}"
    assert [line.split("  ")[1] for line in figures] == [
        "text to image, no documents",
        "image to text, no documents",
        "top half infilled",
        "bottom half infilled",
        "images from their codes",
    ]

    found = json.loads((folder / "metrics.json").read_text())["evaluations"]["infill_top"][0]
    assert f"{found['metrics']['accuracy']['value']:.3f}" in figures[2]
    assert "aim at least 0.900: missed; ceiling" in figures[2]

    # The command that is suggested next works as it stands.
    words = shlex.split(following.removeprefix("next, for example: "))[3:]
    words = [f"out={folder / 'drawn'}" if word.startswith("out=") else word for word in words]
    cm3leon(*words)
    assert len(list((folder / "drawn").glob("*.png"))) == 4

    one, two = (results(each)["losses"]["pretraining"] for each in (finished, folder))  # type: ignore[index]
    assert [record["step"] for record in one] == [record["step"] for record in two]
    assert [record["loss"] for record in two] == pytest.approx(
        [record["loss"] for record in one], rel=2e-3
    )

    # The images were drawn by both ranks, from weights that both gathered.
    for each in (finished, folder):
        events = EventAccumulator(str(each / "pretraining" / "tensorboard")).Reload()
        assert [image.step for image in events.Images("generated")] == [10, 20]


def test_documents_in_shards_are_prepared_before_several_ranks_train(tmp_path: Path) -> None:
    """Ranks that find them missing refuse to begin, and say so once."""
    (tmp_path / "tars").mkdir()
    digit_tars(tmp_path / "tars", 4, 10)
    source = f'data={{"name": "webdataset", "path": "{tmp_path}/tars/*.tar"}}'
    words = ["experiment=digits_smoke", source, *SHORT, f"run={tmp_path / 'shards'}"]
    refused = processes.group("cm3leon.run", words, 2)
    assert 0 not in processes.finish(refused)
    said = "".join(rank.said(1) for rank in refused)
    assert said.count("cm3leon: stage tokens is not finished in") == 1


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 24 good images and five bad items.

    The bad ones: a line that is no JSON, a line of a missing image, a cut image, a file that is no
    image, and an image without a caption.
    """
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []

    for number in range(24):
        pixels = rng.integers(0, 256, (40, 50 + number, 3), dtype=np.uint8)
        name = f"sub/{number}" if number % 2 else str(number)
        suffix = ("jpg", "png", "webp")[number % 3]
        Image.fromarray(pixels).save(folder / f"{name}.{suffix}")
        # Half of the captions stand beside the images, half in captions.jsonl.
        if number < 12:
            (folder / f"{name}.txt").write_text(f"noise number {number}")
        else:
            record = {"file": f"{name}.{suffix}", "caption": f"nöise {number} <break> <mask:0>"}
            lines.append(json.dumps(record))

    missing = json.dumps({"file": "no.png", "caption": "x"})
    (folder / "captions.jsonl").write_text("\n".join([*lines, "{broken", missing]))

    # The bad items, in the order of the docstring after the two lines.
    whole = (folder / "0.jpg").read_bytes()
    for name, content in (("cut.jpg", whole[: len(whole) // 2]), ("text.png", b"no image")):
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("bad")
    Image.new("RGB", (9, 9)).save(folder / "alone.png")
    return folder


def test_a_folder_of_images(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run("experiment=folder", f"data.path={images}", f"run={folder}", *TINY, *SHORT)

    lines = (folder / "documents" / "skipped.jsonl").read_text().splitlines()
    skipped = [json.loads(line) for line in lines]
    assert {item["file"] for item in skipped} == {
        "cut.jpg",
        "text.png",
        "alone.png",
        "captions.jsonl:13",
        "no.png",
    }

    assert "5 of 29 items were skipped" in done.stdout

    # Nothing can be judged without classes of images, so there is no accuracy.
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["judge_accuracy_real"] is None
    for row in metrics["evaluations"]["text_to_image"]:
        assert "accuracy" not in row["metrics"]
        assert "clip_score" in row["metrics"]
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("experiment=folder",), "data.path"),
        (("experiment=folder", "data.path=/no/such/folder"), "/no/such/folder is not a folder"),
        (("experiment=digit",), "digits"),
        (
            ("experiment=digits", "training.step=5"),
            "training.step is not a known key; did you mean steps?",
        ),
        (("experiment=digits", "training.steps=many"), "training.steps"),
        (("experiment=digits", "retriever.query_dropout=1.5"), "retriever.query_dropout"),
        (("experiment=digits", "decoder=topp"), "top_p"),
        (
            ("experiment=digits", "training.warmup_steps=5000"),
            "warmup_steps 5000 must be below steps",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, f"run={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert "Traceback" not in said


def test_a_folder_without_images_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(
        "experiment=folder",
        f"data.path={tmp_path / 'empty'}",
        f"run={tmp_path / 'run'}",
        check=False,
    )
    assert done.returncode == 2
    assert "no usable documents" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" not in done.stderr
