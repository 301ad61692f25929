"""Loggers are given every figure once, also by a training that is stopped and resumed.

A logger that fails or hangs neither stops a training nor slows it, and no logger writes secrets.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import cm3leon
from PIL import Image

from cm3leon import registry
from cm3leon.config import Component
from cm3leon.loggers import process
from cm3leon.loggers.base import Logger, Loggers
from cm3leon.loggers.child import Record
from cm3leon.loggers.pictures import sheet
from cm3leon.registry import LOGGERS
from cm3leon.secrets import masked, without_secrets
from cm3leon.training.distributed import Ranks
from cm3leon.training.log import Tracking, TrainingLog
from cm3leon.types import UserError

IMAGES_BHWC = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
PLUGIN = '''
"""A logger that writes down what it is given, and fails where it is told to."""

import json, os, time
from dataclasses import dataclass
from pathlib import Path
from cm3leon.loggers.base import Logger
from cm3leon.registry import LOGGERS


@LOGGERS.register("odd")
class Odd(Logger):
    """Odd."""

    apart = True

    @dataclass(kw_only=True)
    class Config:
        file: Path
        """Where its lines go."""
        raises: str = ""
        """What raises an error."""
        dies: str = ""
        """What ends the process."""
        hangs: str = ""
        """What never comes back."""

    def _do(self, name, *what):
        with self.config.file.open("a") as lines:
            lines.write(json.dumps([name, *what]) + "\\n")
        print("chatter of a library")
        if name == self.config.raises:
            raise ConnectionError("no network\\nat all")
        if name == self.config.dies:
            os._exit(3)
        if name == self.config.hangs:
            time.sleep(1000)

    def start(self, training):
        self._do("start", training.id, training.run, training.stage, training.step)

    def figures(self, step, kind, figures):
        self._do("figures", step, kind, figures)

    def images(self, step, name, images_BHWC):
        self._do("images", step, name, images_BHWC.tolist())

    def table(self, step, name, columns, rows):
        self._do("table", step, name, columns, rows)

    def close(self, *, finished):
        self._do("close", finished)
'''


@pytest.fixture
def odd(registries: None, tmp_path: Path) -> Iterator[Callable[..., Component]]:
    """A function that makes sections of the plugin's logger."""
    (tmp_path / "odd.py").write_text(PLUGIN)
    registry._load_path(tmp_path / "odd.py")

    def section(**given: Any) -> Component:
        return LOGGERS.check({"name": "odd", "file": str(tmp_path / "lines.jsonl"), **given})

    yield section
    del sys.modules[registry._module_name(tmp_path / "odd.py")]


def open_log(folder: Path, *loggers: Component, step: int = 0, last: int = 4) -> TrainingLog:
    folder.mkdir(parents=True, exist_ok=True)
    tracking = Tracking(loggers, {"training": {"steps": last}, "seed": 0})
    ranks = Ranks(torch.device("cpu"))
    return TrainingLog(folder, ranks, tracking, title="tiny", step=step, first=0, last=last)


def train(folder: Path, *loggers: Component, step: int = 0, last: int = 4, upto: int = 4) -> None:
    """Log figures at each step, and at every second one images, a table and a validation."""
    log = open_log(folder, *loggers, step=step, last=last)
    for number in range(step + 1, upto + 1):
        log.advance()
        log.record({"step": number, "loss": 1 / number})
        if number % 2 == 0:
            assert log.images is not None
            log.images.images(number, "generated", IMAGES_BHWC)
            log.images.table(number, "prompts", ["prompt"], [["a dog"], ["a | cat"]])
            log.validation(number, {"loss": 2 / number})
    log.close()


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ----------------------------------------------------------------------------------------- pictures


def test_pictures_lie_on_a_sheet_for_each_step_beside_their_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first file is announced once; a resumed training goes on in silence."""
    stage = tmp_path / "run/pretraining"
    train(stage, LOGGERS.check("pictures"), upto=2)
    train(stage, LOGGERS.check("pictures"), step=2)

    folder = stage / "pictures"
    sheets = [f"generated_{step:08d}.png" for step in (2, 4)]
    texts = [f"prompts_{step:08d}.txt" for step in (2, 4)]
    assert sorted(path.name for path in folder.iterdir()) == [*sheets, *texts]

    said = capsys.readouterr().out
    assert said.count(f"pictures, from step 2 on: {folder / sheets[0]}") == 1
    assert said.count("pictures, from step") == 1
    assert (folder / texts[0]).read_text() == "prompt\na dog\na | cat\n"

    with Image.open(folder / sheets[0]) as page:
        pixels_HWC = np.asarray(page)

    # One column of two images with two white rows between them.
    assert (pixels_HWC[:4] == IMAGES_BHWC[0]).all()
    assert (pixels_HWC[4:6] == 255).all()
    assert (pixels_HWC[6:] == IMAGES_BHWC[1]).all()


@pytest.mark.parametrize(
    ("count", "width", "rows", "columns"),
    [(1, 4, 1, 1), (16, 4, 4, 4), (5, 4, 3, 2), (9, 12, 5, 2)],
)
def test_a_sheet_is_about_as_high_as_it_is_wide(
    count: int, width: int, rows: int, columns: int
) -> None:
    images_BHWC = np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None]
    page_HWC = sheet(np.broadcast_to(images_BHWC, (count, 4, width, 3)))
    assert page_HWC.shape == (rows * 6 - 2, columns * (width + 2) - 2, 3)
    corners = page_HWC[::6, :: width + 2, 0].ravel().tolist()
    assert corners == [*range(1, count + 1), *[255] * (rows * columns - count)]


# -------------------------------------------------------------------------------------------- apart


def test_a_logger_apart_is_given_all_in_order(tmp_path: Path, odd: Any) -> None:
    train(tmp_path / "run/pretraining", odd(), upto=2, last=2)
    start, *rest = lines(tmp_path / "lines.jsonl")
    assert start[0] == "start"
    assert start[2:] == ["run", "pretraining", 0]
    assert rest == [
        ["figures", 1, "training", {"loss": 1.0}],
        ["figures", 2, "training", {"loss": 0.5}],
        ["images", 2, "generated", IMAGES_BHWC.tolist()],
        ["table", 2, "prompts", ["prompt"], [["a dog"], ["a | cat"]]],
        ["figures", 2, "validation", {"loss": 1.0}],
        ["close", True],
    ]


def test_a_resumed_training_goes_on_with_its_record_and_repeats_nothing(
    tmp_path: Path, odd: Any
) -> None:
    """Killed after step 4 and resumed from step 2, it does steps 3 and 4 again."""
    stage = tmp_path / "run/pretraining"
    train(stage, odd(), upto=4, last=6)
    train(stage, odd(), step=2, upto=6, last=6)

    said = lines(tmp_path / "lines.jsonl")
    starts = [line for line in said if line[0] == "start"]
    assert len(starts) == 2
    assert starts[0][1] == starts[1][1]

    # The logger saw each step once; the training's own log has each once too.
    training = [line[1] for line in said if line[0] == "figures" and line[2] == "training"]
    assert training == [1, 2, 3, 4, 5, 6]
    assert [line[1] for line in said if line[0] == "images"] == [2, 4, 6]
    assert [line[1] for line in said if line[0] == "close"] == [False, True]
    assert [record["step"] for record in lines(stage / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_other_ranks_log_nothing(tmp_path: Path, odd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "first", False)
    log = open_log(tmp_path / "run/pretraining", odd())
    log.record({"step": 1, "loss": 1.0})
    log.validation(1, {"loss": 1.0})
    assert log.images is None
    log.close()
    assert not (tmp_path / "lines.jsonl").exists()
    assert not any((tmp_path / "run/pretraining").iterdir())


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("raises", "odd: no network; it is left out from here on; the training goes on"),
        ("dies", "odd: its process has ended; it is left out from here on; the training goes on"),
        ("hangs", "odd: did not end within 1 seconds; some of it may be missing; the training"),
    ],
)
@pytest.mark.parametrize("where", ["start", "figures", "images", "close"])
def test_a_logger_that_fails_stops_nothing_and_is_said_once(
    tmp_path: Path,
    odd: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    how: str,
    sentence: str,
) -> None:
    monkeypatch.setattr(process, "SECONDS_TO_END", 1.0 if how == "hangs" else 60.0)
    stage = tmp_path / "run/pretraining"
    train(stage, odd(**{how: where}), LOGGERS.check("tensorboard"))
    assert [record["step"] for record in lines(stage / "log.jsonl")] == [1, 2, 3, 4]
    assert any((stage / "tensorboard").iterdir())
    said = capsys.readouterr().out
    assert said.count("odd: ") == 1
    assert sentence in said


class InProcess(Logger):
    """A logger in the process of the training, which raises an error where it is told to."""

    where, error = "", BaseException()

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._do("__init__")

    def _do(self, name: str, *_: object, **__: object) -> None:
        if name == self.where:
            raise self.error

    def start(self, training: process.Training) -> None:
        self._do("start")

    def figures(self, *given: object) -> None:
        self._do("figures")

    def close(self, *, finished: bool) -> None:
        self._do("close")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, BaseException], Component]:
    """A function that makes a section of a logger that raises an error somewhere."""
    monkeypatch.setattr(LOGGERS, "_entries", dict(LOGGERS._entries))
    LOGGERS.register("in_process")(InProcess)

    def section(where: str, error: BaseException) -> Component:
        monkeypatch.setattr(InProcess, "where", where)
        monkeypatch.setattr(InProcess, "error", error)
        return LOGGERS.check("in_process")

    return section


@pytest.mark.parametrize("where", ["__init__", "start", "figures", "close"])
@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConnectionError("no network"), "no network"),
        (SystemExit(3), "it tried to end the process (sys.exit)"),
    ],
)
def test_a_logger_in_this_process_that_fails_stops_nothing(
    tmp_path: Path,
    in_process: Any,
    capsys: pytest.CaptureFixture[str],
    where: str,
    error: BaseException,
    sentence: str,
) -> None:
    stage = tmp_path / "run/pretraining"
    train(stage, in_process(where, error), LOGGERS.check("tensorboard"))
    assert [record["step"] for record in lines(stage / "log.jsonl")] == [1, 2, 3, 4]
    assert any((stage / "tensorboard").iterdir())
    said = capsys.readouterr().out
    whole = f"in_process: {sentence}; it is left out from here on; the training goes on"
    assert said.count(whole) == said.count("in_process: ") == 1


@pytest.mark.parametrize("where", ["__init__", "start", "figures"])
def test_ctrl_c_inside_of_a_logger_stops_the_training(
    tmp_path: Path, in_process: Any, where: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run/pretraining", in_process(where, KeyboardInterrupt()))


def test_settings_that_a_logger_refuses_stop_the_training(tmp_path: Path, in_process: Any) -> None:
    with pytest.raises(UserError, match="wrong settings"):
        train(tmp_path / "run/pretraining", in_process("__init__", UserError("wrong settings")))


def test_a_full_queue_keeps_nobody_waiting(
    tmp_path: Path, odd: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a logger's process hangs, what does not fit into its queue is left out."""
    monkeypatch.setattr(process, "SECONDS_TO_END", 0.5)
    monkeypatch.setattr(process, "WAITING", 10)
    log = open_log(tmp_path / "run/pretraining", odd(hangs="start"), last=5000)
    for step in range(1, 5001):
        log.record({"step": step, "loss": 1.0})
    log.close()
    assert len(lines(tmp_path / "run/pretraining/log.jsonl")) == 5000
    assert capsys.readouterr().out.count("odd: did not end within") == 1


def test_all_loggers_are_told_to_end_before_one_is_waited_for(
    tmp_path: Path, odd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share the time to end in, which is short where a training stops early."""
    monkeypatch.setattr(process, "SECONDS_TO_STOP", 1.0)
    said: list[str] = []
    apart = {name: process.Process(odd(hangs="close"), said.append) for name in ("one", "two")}
    (tmp_path / "run/pretraining").mkdir(parents=True)
    together = Loggers(apart, said.append)
    together.start(process.Training("run", "pretraining", tmp_path / "run/pretraining"))

    # When the first one is waited for, both have been told.
    wait, told = process.Process.wait, []

    def noted(logger: process.Process) -> None:
        told.append([hasattr(each, "_end") for each in apart.values()])
        wait(logger)

    monkeypatch.setattr(process.Process, "wait", noted)
    together.close(finished=False)
    assert told == [[True, True]] * 2
    assert said == ["odd: did not end within 1 seconds; some of it may be missing"] * 2
    assert all(each._process.returncode is not None for each in apart.values())


def test_what_json_cannot_write_is_left_out_alone(
    tmp_path: Path, odd: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    log = open_log(tmp_path / "run/pretraining", odd(), last=0)
    figures: list[dict[str, Any]] = [
        {"loss": np.float32(0.5), "norm": torch.tensor(2.0)},
        {"loss": object()},
        {"loss": 1},
    ]

    assert log.images is not None
    for step, each in enumerate(figures, 1):
        log.images.figures(step, "training", each)
    log.close()

    # The second figures are left out, those before and after them arrive.
    assert lines(tmp_path / "lines.jsonl")[1:] == [
        ["figures", 1, "training", {"loss": 0.5, "norm": 2.0}],
        ["figures", 3, "training", {"loss": 1.0}],
        ["close", True],
    ]
    assert capsys.readouterr().out.count("odd: what cannot be sent is left out: float()") == 1


def test_images_and_a_table_of_one_name_are_both_logged(tmp_path: Path, odd: Any) -> None:
    log = open_log(tmp_path / "run/pretraining", odd(), last=0)
    assert log.images is not None
    log.images.figures(1, "training", {})
    log.images.table(1, "training", ["a"], [["b"]])
    log.images.images(1, "training", IMAGES_BHWC)
    log.close()
    done = [line[0] for line in lines(tmp_path / "lines.jsonl")]
    assert done == ["start", "figures", "table", "images", "close"]


def test_a_copy_gets_a_record_of_its_own_and_a_moved_run_keeps_its(tmp_path: Path) -> None:
    said: list[str] = []

    def record(run: str) -> Record:
        return Record(tmp_path / run / "loggers/odd.json", said.append)

    first = record("first")
    first.add("figures training", 2)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    assert record("copy").id != first.id
    assert record("copy").is_new("figures training", 1)
    assert record("first").id == first.id
    assert len(said) == 1
    assert "is a copy of" in said[0]

    # Where the first folder is no longer there, it was moved and not copied.
    shutil.move(tmp_path / "first", tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    for run in ("moved", "link"):
        assert record(run).id == first.id
        assert not record(run).is_new("figures training", 2)
    assert len(said) == 1


def test_a_damaged_record_is_said_and_an_older_one_read(tmp_path: Path, odd: Any) -> None:
    said: list[str] = []
    file = tmp_path / "odd.json"
    file.write_text('{"id": "a", "steps": {"training": 3}}')
    older = Record(file, said.append)
    assert older.id == "a"
    assert not older.is_new("figures training", 3)
    assert said == []

    file.write_text("")
    assert Record(file, said.append).id == Record(file, said.append).id != "a"
    assert len(said) == 1
    assert "is damaged" in said[0]
    assert "a new record is begun" in said[0]


def test_a_warning_ends_nothing(
    tmp_path: Path, odd: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run/pretraining/loggers/odd.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    train(tmp_path / "run/pretraining", odd())
    said = capsys.readouterr().out
    assert said.count("odd: ") == 1
    assert "a new record is begun; the training goes on" in said
    assert lines(tmp_path / "lines.jsonl")[-1] == ["close", True]


def test_a_process_whose_training_was_killed_ends_by_itself(tmp_path: Path, odd: Any) -> None:
    """It ends when its pipe does, as signals of the terminal and of SLURM are for the training."""
    logger = process.Process(odd(), print)
    (tmp_path / "run/pretraining").mkdir(parents=True)
    logger.start(process.Training("run", "pretraining", tmp_path / "run/pretraining"))
    logger.figures(1, "training", {"loss": 1.0})
    while not (tmp_path / "lines.jsonl").exists() or len(lines(tmp_path / "lines.jsonl")) < 2:
        time.sleep(0.01)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(logger._process.pid, number)
    logger._put(None)  # as the pipe is closed where the training's process is gone
    logger._process.wait(30)
    assert lines(tmp_path / "lines.jsonl")[-1] == ["close", False]


def test_what_is_not_installed_and_what_is_named_twice_is_said_before_the_first_stage(
    tmp_path: Path, odd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOGGERS.get("odd"), "package", "no_such_package")
    loggers = f'loggers=[tensorboard, {{"name": "odd", "file": "{tmp_path}/lines"}}]'
    words = ("experiment=digits_smoke", f"run={tmp_path / 'run'}")
    refused = cm3leon(*words, loggers, check=False)
    assert refused.returncode == 2
    assert "loggers.1 is odd, which needs the package no_such_package" in refused.stderr

    refused = cm3leon(*words, "loggers=[tensorboard, tensorboard]", check=False)
    sentence = "cm3leon: loggers named twice: tensorboard; name each logger once\n"
    assert refused.stderr == sentence
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------- services


def installed(package: str) -> None:
    """Skip the test where a package is missing."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")


def test_wandb_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed training writes two runs of one id, which `wandb sync` puts together."""
    installed("wandb")
    stage, section = tmp_path / "run/pretraining", {"name": "wandb", "mode": "offline"}
    train(stage, LOGGERS.check(section), upto=2)
    train(stage, LOGGERS.check(section), step=2)
    assert "wandb" not in capsys.readouterr().out

    runs = sorted((stage / "loggers/wandb").glob("offline-run-*"))
    own = json.loads((stage / "loggers/wandb.json").read_text())
    assert {run.name.rpartition("-")[2] for run in runs} == {own["id"]}
    names = ("figures training", "figures validation", "images generated", "table prompts")
    assert own["steps"] == dict.fromkeys(names, 4)

    # wandb's own format has the names as plain bytes.
    content = b""
    for run in runs:
        content += b"".join(file.read_bytes() for file in run.glob("run-*.wandb"))
    for each in (b"validation/loss", b"generated", b"prompts", b"run/pretraining"):
        assert each in content
    assert list((stage / "loggers/wandb").rglob("generated_4_*.png"))


def test_mlflow_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installed("mlflow")
    stage = tmp_path / "run/pretraining"
    train(stage, LOGGERS.check("mlflow"), upto=2)
    train(stage, LOGGERS.check("mlflow"), step=1)
    assert "mlflow" not in capsys.readouterr().out

    (run,) = (tmp_path / "run/mlruns").glob("*/*/tags/../")
    meta = yaml.safe_load((run / "meta.yaml").read_text())
    assert (meta["status"], meta["run_name"]) == (3, "run/pretraining")  # 3 is FINISHED
    params = {file.name: file.read_text() for file in (run / "params").iterdir()}
    assert params == {"training.steps": "4", "seed": "0"}

    # A line of a metric's file is its time, its value and its step.
    for name, expected in (
        ("loss", [[1.0, 1], [0.5, 2], [1 / 3, 3], [0.25, 4]]),
        ("validation/loss", [[1.0, 2], [0.5, 4]]),
    ):
        history = [line.split()[1:] for line in (run / "metrics" / name).read_text().splitlines()]
        assert [[float(value), int(step)] for value, step in history] == expected

    # Two images at each of two steps.
    names = [file.name for file in (run / "artifacts/images").iterdir()]
    steps = [re.search(r"step\D+(\d+)", name) for name in names if name.endswith(".png")]
    assert sorted(found[1] for found in steps if found) == ["2", "2", "4", "4"]

    table = json.loads((run / "artifacts/tables/prompts/00000004.json").read_text())
    assert table == {"columns": ["prompt"], "data": [["a dog"], ["a | cat"]]}


def test_mlflow_settings_that_are_missing_are_logged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill may come between the run and its settings.

    A resumed training whose experiment was deleted in MLflow is refused in a sentence.
    """
    installed("mlflow")
    for variable in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(variable, "true")
    stage = tmp_path / "run/pretraining"
    training = process.Training("run", "pretraining", stage, settings={"seed": 0}, id="one")

    def start() -> Any:

        # The next start finds its run, and adds what is missing.
        logger = LOGGERS.build(LOGGERS.check("mlflow"))
        logger.start(training)
        return logger

    start()
    (params,) = (tmp_path / "run/mlruns").glob("*/*/params")
    (params / "seed").unlink()
    logger = start()
    assert (params / "seed").read_text() == "0"

    logger._client.delete_experiment(params.parent.parent.name)
    with pytest.raises(UserError, match="the experiment cm3leon was deleted in MLflow"):
        start()


def test_trackio_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    stage = tmp_path / "run/pretraining"
    train(stage, LOGGERS.check("trackio"), upto=2)
    train(stage, LOGGERS.check("trackio"), step=1)
    assert "trackio" not in capsys.readouterr().out

    database = sqlite3.connect(tmp_path / "trackio/cm3leon.db")
    rows = database.execute(
        "select run_name, step, metrics from metrics order by step, id"
    ).fetchall()
    own = json.loads((stage / "loggers/trackio.json").read_text())["id"]
    assert {name for name, _, _ in rows} == {f"run-pretraining-{own}"}

    # Each step was logged once, though step 2 was done twice.
    said = [(step, json.loads(metrics)) for _, step, metrics in rows]
    losses = [(step, metrics["loss"]) for step, metrics in said if "loss" in metrics]
    assert losses == [(step, 1 / step) for step in (1, 2, 3, 4)]
    for name in ("generated/1", "prompts", "validation/loss"):
        assert [step for step, metrics in said if name in metrics] == [2, 4]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_service_that_cannot_be_reached_stops_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """The real packages, given a server that is not there and no key."""
    installed(name)
    monkeypatch.setattr(process, "SECONDS_TO_END", 3.0)
    nobody = "http://127.0.0.1:9"
    for variable in ("WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "TRACKIO_SERVER_URL"):
        monkeypatch.setenv(variable, nobody)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "planted-secret")
    monkeypatch.setenv("HOME", str(tmp_path))

    train(tmp_path / "run/pretraining", LOGGERS.check(name))
    assert len(lines(tmp_path / "run/pretraining/log.jsonl")) == 4
    said = capsys.readouterr().out

    # Trackio may keep on this machine what it could not send, and is satisfied with that.
    assert said.count(f"{name}: ") in ((0, 1) if name == "trackio" else (1,))
    assert "planted-secret" not in said


# ------------------------------------------------------------------------------------------ secrets

# In two halves, as a run keeps changes of the source, which must not hold the secret itself.
PLANTED = "".join(("planted0", "secret1value2"))


def test_what_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = (
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "PGPASSWORD",
        "DB_PASS",
        "MYSQL_PWD",
    )

    # Variables whose names sound like secrets, and others that only look so.
    for name in secrets:
        monkeypatch.setenv(name, PLANTED)
        assert masked(f"key {PLANTED}.") == "key ***.", name
        monkeypatch.delenv(name)
    for name in ("GIT_AUTHOR_NAME", "TOKENIZERS_PARALLELISM", "MAX_TOKENS", "COMPASS"):
        monkeypatch.setenv(name, PLANTED)
        assert masked(f"key {PLANTED}.") == f"key {PLANTED}.", name
        monkeypatch.delenv(name)

    monkeypatch.setenv("FSSPEC_S3", json.dumps({"secret": PLANTED, "anon": False}))
    assert masked(f"key {PLANTED}.") == "key ***."
    monkeypatch.setenv("FSSPEC_S3", "{")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    monkeypatch.setenv("A_TOKEN", "short")

    # Paths, short values, settings and URLs that hold no secret stay as they are.
    for same in (
        "/home/me/key.json is short",
        "training.batch_tokens=2048 text_tokenizer.vocab_size=320",
        "s3://bucket/a@b/{000..999}.tar",
        "hf://datasets/user/name@main/x.parquet",
        "https://host/a.tar?part=3&size=2#x",
        "https://host:8080/photo@2x.png",
    ):
        assert masked(same) == same

    # Names and passwords in URLs, and their parameters that sound like secrets.
    two = masked("https://me:pw@host/x and ftp://key@h/y")
    assert two == "https://***@host/x and ftp://***@h/y"
    assert masked("https://me:p@ss@host/a@2x.png") == "https://***@host/a@2x.png"
    assert masked("https://me:p/ss@host/a") == "https://***@host/a"
    assert masked("https://h/a?pass=abc&pwd=1&n=2") == "https://h/a?pass=***&pwd=***&n=2"
    signed = "https://h/a.tar?part=1&X-Amz-Signature=ab12&X-Amz-Credential=c&sv=2"
    assert masked(signed) == "https://h/a.tar?part=1&X-Amz-Signature=***&X-Amz-Credential=***&sv=2"
    assert without_secrets({"https://a:b@c": [("ftp://d@e", 1, None)]}) == {
        "https://***@c": [["ftp://***@e", 1, None]]
    }


def test_no_secret_is_written_to_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is planted in the environment, in URLs of settings and in the command.

    All loggers take part whose packages are installed.
    """
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"{PLANTED}-{name.lower()}")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "run/trackio"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))

    named = ['{"name": "tensorboard"}']
    for name, section in (
        ("wandb", '{"name": "wandb", "mode": "offline"}'),
        ("mlflow", '{"name": "mlflow"}'),
        ("trackio", '{"name": "trackio"}'),
    ):
        if importlib.util.find_spec(name):
            named.append(section)

    words = [
        "experiment=digits_smoke",
        "overrides=smoke",
        "until=image_tokenizer",
        f"run={tmp_path / 'run'}",
        f"loggers=[{', '.join(named)}]",
        f"evaluations.caption.title=see https://me:{PLANTED}@host/a?token={PLANTED}",
        "evaluations.caption.protocol={name: corpus, task: caption}",
        f"image_tokenizer_training.undecayed=[{PLANTED}-hf_token]",
    ]
    monkeypatch.setattr(sys, "argv", ["cm3leon", *words])
    cm3leon(*words)

    # The files that would hold it are there.
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {"config.yaml", "environment.json", "stage.json"} <= {file.name for file in files}
    holding = [str(file) for file in files if PLANTED.encode() in file.read_bytes()]
    assert not holding
    assert "https://***@host/a?token=***" in (tmp_path / "run/config.yaml").read_text()


def test_jobs_are_not_given_settings_with_secrets(tmp_path: Path) -> None:
    """Jobs read their settings from the run folder, where secrets are masked."""
    refused = cm3leon(
        "experiment=digits_smoke",
        f"run={tmp_path / 'run'}",
        "launcher=local",
        "evaluations.caption.title=https://me:password@host/",
        check=False,
    )
    assert refused.returncode == 2
    assert "evaluations holds a password or a token" in refused.stderr


def test_a_logger_is_a_component_of_its_kind(registries: None) -> None:
    with pytest.raises(UserError, match="is not a known logger"):
        LOGGERS.check("wandbb")
    known = {"jsonl", "tensorboard", "pictures", "wandb", "mlflow", "trackio"}
    assert known <= set(LOGGERS.names())
