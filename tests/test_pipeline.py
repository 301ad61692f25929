"""Stages are skipped when they are up to date, made again when not, and resumed after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cm3leon.stages import pipeline
from cm3leon.stages.pipeline import run_part, run_stages
from cm3leon.stages.stage import Stage, read_record
from cm3leon.types import UserError


@dataclass
class Fake:
    """A run: its settings, what was made, what was said, and what may interrupt a stage."""

    a: Any = 1
    b: Any = 1
    c: Any = 1
    made: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    fail: Callable[[str, Path], None] = lambda name, folder: None


def make(name: str) -> Callable[[Fake, Path], None]:
    def write(run: Fake, folder: Path) -> None:
        """Write two files; an interruption comes between them."""
        run.made.append(name)
        if not (folder / "first.txt").exists():
            (folder / "first.txt").write_text(f"{name} first {getattr(run, name)}")
        run.fail(name, folder)
        (folder / "inner").mkdir(exist_ok=True)
        (folder / "inner" / "second.txt").write_text(f"{name} second {getattr(run, name)}")

    return write


def stages(version: int = 1) -> list[Stage[Fake]]:
    return [
        Stage("a", version, lambda run: run.a, make("a")),
        Stage("b", 1, lambda run: run.b, make("b")),
        Stage("c", 1, lambda run: {"c": run.c}, make("c")),
    ]


def go(folder: Path, version: int = 1, **fields: Any) -> Fake:
    run = Fake(**fields)
    run_stages(stages(version), run, folder, run.said.append)
    return run


def content(folder: Path) -> dict[str, str]:
    """The content of all results by their paths, without the records of the stages."""
    found = {}
    for file in sorted(folder.rglob("*.txt")):
        if file.is_file():
            found[file.relative_to(folder).as_posix()] = file.read_text()
    return found


def live(folder: Path) -> dict[str, str]:
    """The content of all results that are not superseded."""
    return {
        name: text for name, text in content(folder).items() if not name.startswith("superseded/")
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "here"


def test_stages_are_made_in_order_and_then_skipped(folder: Path) -> None:
    assert go(folder).made == ["a", "b", "c"]
    before = content(folder)
    assert before["c/inner/second.txt"] == "c second 1"

    again = go(folder)
    assert again.made == []
    assert again.said == ["[1/3] a: up to date", "[2/3] b: up to date", "[3/3] c: up to date"]
    assert content(folder) == before


def test_what_is_said_and_the_seconds_of_the_making(folder: Path) -> None:
    def slow(name: str, _: Path) -> None:
        if name == "b":
            time.sleep(0.05)

    run = Fake(fail=slow)
    seconds = run_stages(stages(), run, folder, run.said.append)

    # A line when each stage begins, and one when it is done.
    expected = []
    for number, name in enumerate("abc", 1):
        expected += [f"[{number}/3] {name}", f"[{number}/3] {name}:"]
    assert [line.partition("done in")[0].rstrip() for line in run.said] == expected

    # The seconds are those of the making, also when the stages are only skipped.
    assert list(seconds) == ["a", "b", "c"]
    assert seconds["b"] >= 0.05
    assert seconds["a"] != seconds["b"]
    assert run_stages(stages(), Fake(), folder, print) == seconds


@pytest.mark.parametrize(
    ("changed", "expected"), [("a", ["a", "b", "c"]), ("b", ["b", "c"]), ("c", ["c"])]
)
def test_a_change_makes_its_stage_and_those_after_it_again(
    folder: Path, changed: str, expected: list[str]
) -> None:
    go(folder)
    assert go(folder, **{changed: 2}).made == expected
    assert content(folder)[f"{changed}/first.txt"] == f"{changed} first 2"


def test_a_new_version_of_a_stage_makes_it_again(folder: Path) -> None:
    go(folder)
    assert go(folder, version=2).made == ["a", "b", "c"]
    assert go(folder, version=2).made == []
    # The results of version 1 are still there.
    assert go(folder).made == []


def test_inputs_are_told_apart_whatever_their_order(folder: Path) -> None:
    go(folder, a={"x": 1, "y": [1, 2]})
    assert go(folder, a={"y": [1, 2], "x": 1}).made == []
    assert go(folder, a={"y": [2, 1], "x": 1}).made == ["a", "b", "c"]
    assert go(folder, a={"x": "1", "y": [1, 2]}).made == ["a", "b", "c"]


def test_earlier_results_are_kept_and_come_back(folder: Path) -> None:
    go(folder)
    first = content(folder)
    go(folder, b=2)
    second = content(folder)

    # What was made first is now in superseded, whole.
    attic = {name: text for name, text in second.items() if name.startswith("superseded/")}
    assert sorted(attic.values()) == sorted(text for name, text in first.items() if name[0] in "bc")

    # The first settings bring it back, and so do the later ones with theirs.
    go(folder, b=3)
    assert go(folder).made == []
    assert live(folder) == first
    assert go(folder, b=2).made == []
    assert go(folder, b=3).made == []
    assert content(folder)["b/inner/second.txt"] == "b second 3"


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "emptied":
        path.write_text("")
    elif how == "same length":
        path.write_text(path.read_text()[:-1] + "9")


@pytest.mark.parametrize("how", ["missing", "emptied", "same length"])
@pytest.mark.parametrize("name", ["b/first.txt", "b/inner/second.txt"])
def test_a_damaged_file_is_noticed_and_made_again(folder: Path, name: str, how: str) -> None:
    go(folder)

    before = content(folder)
    damage(folder / name, how)

    run = go(folder)
    assert run.made == ["b"]
    assert run.said[1] == f"[2/3] b: {name[2:]} is missing or has changed, made again"
    assert content(folder) == before
    assert go(folder).made == []


def test_a_whole_folder_that_is_missing_is_made_again(folder: Path) -> None:
    import shutil

    go(folder)
    before = content(folder)
    shutil.rmtree(folder / "b")
    assert go(folder).made == ["b"]
    assert content(folder) == before


def test_a_missing_marker_means_unfinished(folder: Path) -> None:
    go(folder)
    (folder / "b" / "stage.json").unlink()
    run = go(folder)
    assert run.made == ["b"]
    assert run.said[1] == "[2/3] b: going on where it stopped"


@pytest.mark.parametrize("marker", ["stage.json", "started.json"])
@pytest.mark.parametrize("text", ["", '{"fingerprint": "abc', "{}"])
def test_a_damaged_marker_is_noticed_and_made_again(folder: Path, marker: str, text: str) -> None:
    go(folder)

    before = content(folder)
    (folder / "b" / marker).write_text(text)
    run = go(folder)
    assert run.made == (["b"] if marker == "stage.json" else [])
    assert live(folder) == before


def test_logs_and_checkpoints_are_no_results(folder: Path) -> None:
    """They serve only while a stage is made, so that losing them does not make it again."""

    def write(run: Fake, place: Path) -> None:
        run.made.append("a")
        for name in ("tensorboard/events", "step_00010/model.txt", ".hidden", "result.txt"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text("x")

    # Only the result is recorded, and only its loss would be noticed.
    only = [Stage("a", 1, lambda run: run.a, write)]
    run_stages(only, Fake(), folder, print)
    assert list(json.loads((folder / "a" / "stage.json").read_text())["files"]) == ["result.txt"]

    for name in ("tensorboard/events", "step_00010/model.txt", ".hidden"):
        (folder / "a" / name).unlink()
    again = Fake()
    run_stages(only, again, folder, print)
    assert again.made == []


class Stopped(Exception):
    """Ends a stage midway."""


def stop_at(name: str) -> Callable[[str, Path], None]:
    def fail(at: str, folder: Path) -> None:
        if at == name:
            raise Stopped

    return fail


def test_an_interrupted_stage_goes_on_with_what_it_has(folder: Path) -> None:
    with pytest.raises(Stopped):
        go(folder, fail=stop_at("b"))

    assert not (folder / "b" / "stage.json").exists()
    assert not (folder / "c").exists()
    (folder / "b" / "first.txt").write_text("half of the work")

    run = go(folder)
    assert run.made == ["b", "c"]
    assert run.said[:2] == ["[1/3] a: up to date", "[2/3] b: going on where it stopped"]
    assert content(folder)["b/first.txt"] == "half of the work"
    assert go(folder).made == []


def test_half_the_work_of_other_inputs_is_not_used_but_kept(folder: Path) -> None:
    with pytest.raises(Stopped):
        go(folder, b=1, fail=stop_at("b"))

    (folder / "b" / "first.txt").write_text("half of the work on 1")
    run = go(folder, b=2)
    assert run.made == ["b", "c"]
    assert content(folder)["b/first.txt"] == "b first 2"

    run = go(folder, b=1)
    assert run.made == ["b", "c"]
    assert run.said[1] == "[2/3] b: going on where it stopped"
    assert content(folder)["b/first.txt"] == "half of the work on 1"


def test_a_stage_that_is_made_again_and_stopped_is_unfinished(folder: Path) -> None:
    go(folder)
    (folder / "b" / "first.txt").unlink()
    with pytest.raises(Stopped):
        go(folder, fail=stop_at("b"))
    assert go(folder).made == ["b"]


PROGRAM = """
import sys, time
from pathlib import Path
from cm3leon.stages.stage import Stage
from cm3leon.stages.pipeline import run_stages

def make(run, folder):
    steps = sorted(folder.glob("step *.txt"))
    for number in range(len(steps), 5):
        (folder / f"step {number}.txt").write_text("made by " + run)
        if run == "first" and number == 2:
            print("midway", flush=True)
            time.sleep(60)

def before(run, folder):
    (folder / "result.txt").write_text("made by " + run)

stages = [Stage("before", 1, lambda run: 0, before), Stage("long", 1, lambda run: 0, make)]
run_stages(stages, sys.argv[2], Path(sys.argv[1]), lambda line: print(line, flush=True))
"""


def start(folder: Path, run: str) -> subprocess.Popen[str]:
    repository = Path(pipeline.__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), run],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )


def test_a_second_process_is_refused_and_a_kill_loses_nothing(folder: Path) -> None:
    first = start(folder, "first")
    try:
        # Wait until three of five steps are made.
        assert first.stdout is not None
        while first.stdout.readline().strip() != "midway":
            assert first.poll() is None, first.stderr and first.stderr.read()

        with pytest.raises(UserError) as refusal:
            run_stages([], Fake(), folder, print)
        assert str(refusal.value) == (
            f"run: another process is working in {folder}; wait for it, or choose another "
            "folder with run=DIR"
        )

        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()

    assert first.returncode == -signal.SIGKILL

    # The second process makes the two steps that are missing.
    second = start(folder, "second")
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert output.splitlines()[:2] == [
        "[1/2] before: up to date",
        "[2/2] long: going on where it stopped",
    ]
    made_by = [(folder / "long" / f"step {number}.txt").read_text() for number in range(5)]
    assert made_by == ["made by first"] * 3 + ["made by second"] * 2


def test_the_folder_is_free_again_after_an_error(folder: Path) -> None:
    with pytest.raises(Stopped):
        go(folder, fail=stop_at("a"))
    assert go(folder).made == ["a", "b", "c"]


def test_files_that_no_stage_made_are_not_deleted(folder: Path) -> None:
    """The folder may be somebody's own and have a folder named like a stage: ~ and ~/documents."""
    (folder / "b" / "inner").mkdir(parents=True)
    (folder / "b" / "letter.txt").write_text("dear")
    (folder / "b" / "inner" / "photo.txt").write_text("a face")

    # Refusing the folder is as good as keeping its files.
    try:
        go(folder)
    except UserError as refusal:
        assert str(folder / "b") in str(refusal)  # noqa: PT017
    kept = [file.read_text() for file in folder.rglob("*.txt")]
    assert {"dear", "a face"} <= set(kept)


# ------------------------------------------------------------------------------------ shared stages


def shared_stages(*, needs: tuple[str, ...] | None = None) -> list[Stage[Fake]]:
    """Stage b has six shards; c depends on b, or on what `needs` names."""

    def make_part(run: Fake, place: Path, part: tuple[int, int]) -> None:
        # Worker k of n makes every n-th shard from k on, unless the shard is there.
        for number in range(part[0], 6, part[1]):
            file = place / f"{number}.txt"
            if not file.exists():
                file.write_text(f"b {run.b}")
                run.made.append(f"b{number}")

    return [
        Stage("a", 1, lambda run: run.a, make("a")),
        Stage(
            "b", 1, lambda run: run.b, lambda run, place: make_part(run, place, (0, 1)), make_part
        ),
        Stage("c", 1, lambda run: run.c, make("c"), needs=needs),
    ]


def test_until_stops_after_that_stage(folder: Path) -> None:
    run = Fake()
    assert list(run_stages(shared_stages(), run, folder, run.said.append, until="a")) == ["a"]
    assert run.made == ["a"]
    assert run.said[0] == "[1/1] a"

    with pytest.raises(UserError, match=r"^until is d, which is not a stage of this experiment; "):
        run_stages(shared_stages(), run, folder, print, until="d")


def test_workers_share_a_stage_and_the_run_finishes_it(folder: Path) -> None:
    run_stages(shared_stages(), Fake(), folder, print, until="a")

    # Shards are split by their number modulo three; worker 1 of 3 never comes.
    first, second = Fake(), Fake()
    run_part(shared_stages(), "b", first, folder, (0, 3))
    run_part(shared_stages(), "b", second, folder, (2, 3))
    assert first.made == ["b0", "b3"]
    assert second.made == ["b2", "b5"]
    assert not (folder / "b" / "stage.json").exists()

    # The run makes what is missing, and finishes the stage.
    run = Fake()
    run_stages(shared_stages(), run, folder, run.said.append)
    assert run.made == ["b1", "b4", "c"]
    assert run.said[1] == "[2/3] b: going on where it stopped"

    again = Fake()
    run_part(shared_stages(), "b", again, folder, (0, 3))
    run_stages(shared_stages(), again, folder, print)
    assert again.made == []


def test_workers_of_other_settings_begin_anew(folder: Path) -> None:
    run_stages(shared_stages(), Fake(), folder, print)
    run = Fake(b=2)
    run_part(shared_stages(), "b", run, folder, (0, 1))
    assert run.made == [f"b{number}" for number in range(6)]
    assert {file.read_text() for file in (folder / "b").glob("*.txt")} == {"b 2"}

    back = Fake()
    run_stages(shared_stages(), back, folder, print)
    assert back.made == []


@pytest.mark.parametrize("a", [None, 2])
def test_a_worker_needs_the_stages_before_its_own(folder: Path, a: int | None) -> None:
    folder.mkdir(parents=True)
    if a:
        run_stages(shared_stages(), Fake(a=a), folder, print, until="a")
    with pytest.raises(UserError) as refusal:
        run_part(shared_stages(), "b", Fake(), folder, (0, 2))
    assert str(refusal.value) == (
        f"stage b needs a, which is not finished in {folder} with these settings; make it first, "
        "with until=a"
    )


def test_workers_exclude_a_run_but_not_each_other(folder: Path) -> None:
    run_stages(shared_stages(), Fake(), folder, print, until="a")

    def inside(name: str, place: Path) -> None:
        run_part(shared_stages(), "b", Fake(), folder, (1, 2))
        with pytest.raises(UserError, match="another process is working"):
            run_stages(shared_stages(), Fake(), folder, print)

    # While worker 0 is at work, worker 1 does its part, and a run is refused.
    plain = shared_stages()
    stage = Stage(
        "b", 1, lambda run: run.b, plain[1].make, lambda run, place, part: inside("b", place)
    )
    run_part([plain[0], stage], "b", Fake(), folder, (0, 2))
    assert sorted(file.name for file in (folder / "b").glob("*.txt")) == ["1.txt", "3.txt", "5.txt"]


def test_a_stage_depends_on_those_it_needs_only(folder: Path) -> None:
    run_stages(shared_stages(needs=("a",)), Fake(), folder, print)

    run = Fake(b=2)
    run_stages(shared_stages(needs=("a",)), run, folder, print)
    assert "c" not in run.made

    run = Fake(a=2, b=2)
    run_stages(shared_stages(needs=("a",)), run, folder, print)
    assert run.made[0] == "a"
    assert run.made[-1] == "c"


def test_a_shard_is_told_by_its_size_alone(folder: Path) -> None:
    """Its content has its own checksum, which is compared when the shard is read."""

    def write(run: Fake, place: Path) -> None:
        run.made.append("a")
        (place / "shard.arrow").write_text("content")

    only = [Stage("a", 1, lambda run: run.a, write)]

    for text, made in (("content", ["a"]), ("changed", []), ("longer content", ["a"])):
        if made == [] or text != "content":
            (folder / "a" / "shard.arrow").write_text(text)
        run = Fake()
        run_stages(only, run, folder, print)
        assert run.made == made


# ----------------------------------------------------------------------------------- expensive work


@dataclass
class Costly(Fake):
    """A run of three stages: `b` trains, `c` depends on it and is expensive too, `d` is not."""

    d: Any = 1
    weights: str = "trained"
    keeps_checkpoints: bool = False
    stops: bool = False


def costly_stages() -> list[Stage[Costly]]:
    def train(run: Costly, place: Path) -> None:
        run.made.append("b")

        # What a training leaves: checkpoints, then its result, a log and a page.
        for name in ("step_00000012", "step_best") if run.keeps_checkpoints else ():
            (place / name).mkdir(exist_ok=True)
            (place / name / "manifest.json").touch()
        if run.stops:
            raise Stopped
        (place / "weights").write_text(run.weights)
        (place / "log.jsonl").write_text("{}")
        (place / "page.html").write_text("a page")

    return [
        Stage("a", 1, lambda run: run.a, make("a")),
        Stage(
            "b",
            1,
            lambda run: {"training": {"rate": run.b}},
            train,
            results=("weights",),
            expensive=True,
            trains=lambda run: True,
        ),
        Stage("c", 1, lambda run: run.c, make("c"), needs=("b",), expensive=True),
        Stage("d", 1, lambda run: run.d, make("d"), needs=("a",), files=("b/weights",)),
    ]


def go_costly(
    folder: Path, redo: tuple[str, ...] = (), until: str | None = None, **fields: Any
) -> Costly:
    run = Costly(**fields)
    run_stages(costly_stages(), run, folder, run.said.append, redo=redo, until=until)
    return run


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_an_expensive_stage_is_made_anew_only_where_that_is_asked_for(folder: Path) -> None:
    go_costly(folder)
    before = everything(folder)

    with pytest.raises(UserError) as refusal:
        go_costly(folder, b=2)
    assert str(refusal.value) == (
        f"run: b in {folder} is finished, and these settings would make it anew (training.rate was "
        "1, is 2); c would follow; say redo=b to do so, which keeps what is there in superseded, "
        "or put the settings back, or choose another run folder"
    )
    assert everything(folder) == before

    # Asked for, it is made, and so are those that depend on it: d has the weights as its input.
    asked = go_costly(folder, b=2, redo=("b",), weights="trained otherwise")
    assert asked.made == ["b", "c", "d"]
    made_anew = "made anew (training.rate was 1, is 2); the earlier result is kept in superseded"
    assert f"[2/4] b: {made_anew}" in asked.said

    # Asked for again, as after a kill, what is up to date is not made anew.
    assert go_costly(folder, b=2, redo=("b",)).made == []

    # What was set aside comes back without being asked for, both ways.
    back = go_costly(folder)
    assert back.made == []
    assert "[2/4] b: up to date, fetched back from superseded" in back.said
    assert {name: text for name, text in everything(folder).items() if name in before} == before
    assert go_costly(folder, b=2).made == []


def test_whoever_redoes_a_cheap_stage_is_told_of_the_expensive_ones_behind_it(folder: Path) -> None:
    go_costly(folder)
    before = everything(folder)
    refusal = r"b in .* \(its input was 1, is 2\); c would follow; say redo=b to"
    with pytest.raises(UserError, match=refusal):
        go_costly(folder, a=2)
    assert everything(folder) == before

    # Up to the cheap stage nothing expensive is made, and nothing is lost.
    assert go_costly(folder, a=2, until="a").made == ["a"]
    with pytest.raises(UserError, match=r"b in .* \(a is another\); c would follow; say redo=b to"):
        go_costly(folder, a=2)
    assert go_costly(folder, a=2, redo=("a",)).made == ["b", "c", "d"]


def test_several_expensive_stages_are_named_with_what_to_ask_for(folder: Path) -> None:
    go_costly(folder)
    refusal = r"^run: c in .* \(its input was 1, is 2\); say redo=c to do so"
    with pytest.raises(UserError, match=refusal):
        go_costly(folder, c=2)
    with pytest.raises(UserError, match=r"redo is e, which is not a stage"):
        go_costly(folder, redo=("e",))
    assert go_costly(folder, c=2, redo=("c",)).made == ["c"]


def test_unfinished_work_with_checkpoints_is_not_set_aside_for_other_settings(folder: Path) -> None:
    with pytest.raises(Stopped):
        go_costly(folder, keeps_checkpoints=True, stops=True)

    with pytest.raises(UserError) as refusal:
        go_costly(folder, b=2)
    assert str(refusal.value) == (
        f"run: {folder / 'b'} has come to step 12 with other settings (training.rate was 1, is 2); "
        "put them back, choose another run folder, or say redo=b to begin anew"
    )
    assert (folder / "b" / "step_00000012").is_dir()

    # Once it was asked for, the unfinished work is kept and goes on with its own settings.
    assert go_costly(folder, b=2, redo=("b",)).made == ["b", "c", "d"]
    assert go_costly(folder, until="b").said[1] == "[2/2] b: going on where it stopped"


@pytest.mark.parametrize("name", ["log.jsonl", "page.html"])
def test_logs_and_pages_are_never_a_reason_to_make_anything_again(folder: Path, name: str) -> None:
    go_costly(folder)
    with (folder / "b" / name).open("a") as file:
        file.write("\n")
    assert go_costly(folder).made == []
    assert (folder / "b" / name).read_text().endswith("\n")
    (folder / "b" / name).unlink()
    assert go_costly(folder).made == []


@pytest.mark.parametrize("how", ["weights", "record", "no files"])
def test_damaged_weights_without_a_checkpoint_are_not_trained_again_unasked(
    folder: Path, how: str
) -> None:
    go_costly(folder)

    marker = folder / "b" / "stage.json"

    # Spoil the weights, or the record that would show whether they are intact.
    if how == "weights":
        (folder / "b" / "weights").write_text("damaged")
    elif how == "record":
        marker.write_text("{")
    else:
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "files": {}}))

    before = everything(folder)
    with pytest.raises(UserError) as refusal:
        go_costly(folder)
    assert "has no checkpoint to make it of" in str(refusal.value)
    assert str(refusal.value).endswith("put a copy of the file back, or say redo=b to make it anew")
    named = "weights" if how == "weights" else "stage.json"
    assert str(folder / "b" / named) in str(refusal.value)
    assert everything(folder) == before

    assert go_costly(folder, redo=("b",)).made == ["b"]
    assert (folder / "b" / "weights").read_text() == "trained"


def test_damaged_weights_with_a_checkpoint_are_made_of_it(folder: Path) -> None:
    go_costly(folder, keeps_checkpoints=True)
    (folder / "b" / "weights").unlink()
    assert go_costly(folder, keeps_checkpoints=True).made == ["b"]


def test_what_depends_on_a_file_asks_for_what_it_holds(folder: Path) -> None:
    """Stage d has the content of b's weights among its inputs, and not how they were made."""
    go_costly(folder)
    # With other settings, b gives the same weights here.
    assert go_costly(folder, b=2, redo=("b",)).made == ["b", "c"]

    record = json.loads((folder / "d" / "stage.json").read_text())
    assert list(record["made_with"]) == ["b/weights"]
    assert list(record["needs"]) == ["a"]
    assert record["version"] == 1


# ---------------------------------------------------------------------------------- hostile records


@pytest.mark.parametrize("name", ["../../victim.txt", "/tmp/victim.txt", "linked/victim.txt", ".."])
def test_a_record_that_names_files_outside_deletes_nothing(
    folder: Path, tmp_path: Path, name: str
) -> None:
    go(folder)

    victim = tmp_path / "runs" / "victim.txt"
    victim.write_text("precious")
    (folder / "b" / "linked").symlink_to(victim.parent)

    # A record with a file outside the stage's folder, beside one of its own.
    marker = folder / "b" / "stage.json"
    record = json.loads(marker.read_text())
    marker.write_text(json.dumps({**record, "files": {name: "0" * 64, "first.txt": ""}}))
    go(folder)
    assert victim.read_text() == "precious"

    marker.write_text(json.dumps({"fingerprint": "0" * 64, "files": {name: ""}}))
    with pytest.raises(UserError, match=r"stage\.json names .*, which is not a file in the stage"):
        read_record(marker)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"fingerprint": "../../.."},
        {"fingerprint": 3},
        {"fingerprint": "0" * 64, "files": []},
        {"fingerprint": "0" * 64, "files": {"a": 1}},
        {"fingerprint": "0" * 64, "seconds": "long"},
        {"fingerprint": "0" * 64, "needs": {"a": None}},
    ],
)
def test_a_record_that_is_none_is_named_and_made_anew(folder: Path, content: Any) -> None:
    go(folder)
    marker = folder / "b" / "stage.json"
    marker.write_text(json.dumps(content))
    with pytest.raises(UserError) as refusal:
        read_record(marker)
    assert str(refusal.value).startswith(str(marker))
    assert go(folder).made == ["b"]


def test_folders_that_are_no_runs_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))

    project = tmp_path / "project"
    project.mkdir()
    (project / "config.yaml").write_text("data: mine\n")

    for folder in (Path("/"), home, project):
        with pytest.raises(UserError, match=r"^run: "):
            run_stages(stages(), Fake(), folder, print)
    assert list(everything(tmp_path)) == ["project/config.yaml"]

    # A folder in which only a launcher or the recorder has written is a run's.
    (tmp_path / "run" / "launch").mkdir(parents=True)
    assert go(tmp_path / "run").made == ["a", "b", "c"]


def test_nothing_is_accepted_that_is_refused(folder: Path) -> None:
    accepted: list[str] = []

    def begin() -> None:
        accepted.append("once")
        assert not (folder / "b" / "stage.json").exists() or len(accepted) > 1

    run_stages(costly_stages(), Costly(), folder, print, accepted=begin)
    assert accepted == ["once"]
    with pytest.raises(UserError):
        run_stages(costly_stages(), Costly(b=2), folder, print, accepted=begin)
    assert accepted == ["once"]


def test_a_link_to_a_shared_stage_gives_way_unasked(folder: Path, tmp_path: Path) -> None:
    """A point of a sweep links to the stages that points share; what the links lead to stays."""

    shared = tmp_path / "runs" / "shared"
    go_costly(shared)
    before = everything(shared)
    folder.mkdir(parents=True)
    (folder / "launch").mkdir()
    for name in "abc":
        (folder / name).symlink_to(shared / name)

    assert go_costly(folder, b=2).made == ["b", "c", "d"]
    assert everything(shared) == before
    assert not (folder / "b").is_symlink()
    assert (folder / "a").is_symlink()
