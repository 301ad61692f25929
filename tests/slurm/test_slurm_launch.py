"""Launch jobs on a real SLURM: trainings on two nodes, arrays, dependencies, and what goes wrong.

The trainings are interrupted in every way that a cluster has: a signal, a requeue, preemption, a
cancelled job, a time limit, a killed process. The cluster has no accounting, so nothing asks sacct.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import call

from cm3leon.config import Component
from cm3leon.launch import Job, follow, submit
from cm3leon.launch.jobs import Launch, newest_launch
from cm3leon.launch.journal import read_events
from cm3leon.registry import LAUNCHERS, discover
from cm3leon.run import main

pytestmark = pytest.mark.slurm
discover()

SLOW = Path(__file__).parent / "slow.py"
SETTINGS = (
    "experiment=digits_smoke",
    "augment.versions=1",
    f"plugins=[{SLOW}]",
    "objective=slow_cm3",
    "training.batch_size=2",
    "training.callback_every=10000",
    "until=pretraining",
)
FIGURES = ("step", "learning_rate", "loss", "loss_text", "loss_image", "gradient_norm")


def run(folder: Path, *words: str) -> Launch:
    """Launch a training by `python -m cm3leon.run`, and return its newest launch."""
    assert main([*SETTINGS, f"run={folder}", "launcher=slurm", *words]) == 0
    return newest_launch(folder)


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    """Wait for a condition, for so long at most."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.2)


def states(launch: Launch) -> list[tuple[str, str]]:
    """State of each command of a launch, and what is said about it."""
    return [(state.word, state.more) for _, state in follow.states(launch)]


def wait_until(launch: Launch, word: str, seconds: float = 600) -> None:
    """Wait until all commands of a launch have this state; no other final state may turn up."""

    def reached() -> bool:
        found = states(launch)
        assert all(each == word or each in follow.WAITING for each, _ in found), found
        return {each for each, _ in found} == {word}

    wait_for(reached, seconds)


def records(folder: Path) -> list[list[float]]:
    """The figures of each line of the training's log so far."""
    file = folder / "pretraining" / "log.jsonl"
    if not file.is_file():
        return []

    figures = []
    for line in file.read_text().splitlines():
        record = json.loads(line)
        figures.append([record[name] for name in FIGURES])
    return figures


def events(launch: Launch, job: str = "run") -> list[str]:
    """Events that a job of a launch has written to its journal."""
    return [event["event"] for event in read_events(launch.journal(job, 0))]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its neighbours, made in this process, so that each job begins with the training:
    on cores that others need, the stages before it would take longer than the shortest job."""
    folder = tmp_path_factory.mktemp("prepared") / "run"
    assert main([*SETTINGS[:-1], "until=neighbours", f"run={folder}"]) == 0
    return folder


def test_a_training_interrupted_in_four_ways_has_the_losses_of_a_whole_one(
    prepared: Path, tmp_path: Path
) -> None:
    """Two nodes, and four interruptions: the signal that submitit sends before a time limit, a
    requeue by an administrator, preemption by another job, and a cancelled job."""
    whole, cut = (Path(shutil.copytree(prepared, tmp_path / name)) for name in ("whole", "cut"))
    training = (
        "launcher.nodes=2",
        "training.steps=80",
        "training.log_every=5",
        "training.checkpoint_every=1000",
    )
    one = run(whole, *training)
    two = run(cut, *training, "launcher.partition=low", "launcher.sbatch.comment=x")
    number = two.read()["submitted"][0].id

    def interrupt_at(count: int, *command: str) -> None:
        wait_for(lambda: len(records(cut)) >= count)
        call(*command)

    # After each of the first three interruptions SLURM starts the job again by itself.
    interrupt_at(2, "scancel", "--signal=USR2", number)
    wait_for(lambda: events(two).count("started") == 2)
    interrupt_at(5, "scontrol", "requeue", number)
    wait_for(lambda: events(two).count("started") == 3)
    interrupt_at(8, "srun", "--partition=high", "--nodes=2", "--exclusive", "true")
    wait_for(lambda: events(two).count("started") == 4)
    wait_for(lambda: len(records(cut)) >= 11)

    # A cancelled job is started again by hand, and takes up the same training.
    assert main(["cancel", f"run={cut}"]) == 0
    wait_until(two, "cancelled")
    assert "pretraining, step" in states(two)[0][1]
    three = run(cut, *training)
    wait_until(three, "done")
    wait_until(one, "done")

    assert len(records(whole)) == 16
    assert records(cut) == records(whole)
    assert events(one) == ["started", "done"]


@pytest.mark.slow
def test_a_time_limit_reached_too_often_ends_the_job_after_a_checkpoint(
    prepared: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "run"))
    # SLURM checks the limits now and then, and sends the signal half a minute early rather than
    # late. The limit is two minutes, as others may need the cores while a job begins.
    limits = ("launcher.timeout_min=2", "launcher.signal_delay_s=10", "launcher.max_timeouts=1")
    launch = run(folder, *limits, "training.steps=100000")

    wait_until(launch, "stopped", seconds=600)
    assert "it reached its time limit too many times" in states(launch)[0][1]
    assert events(launch) == ["started", "again", "started", "again", "stopped"]

    steps = []
    for event in read_events(launch.journal("run", 0)):
        if event["event"] == "again":
            steps.append(event["at"])
    first, second = (int(at.removeprefix("pretraining, step ")) for at in steps)
    assert 0 < first <= second


def test_a_job_killed_twice_at_the_same_step_stops_and_says_so(
    prepared: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "run"))
    launch = run(folder, "launcher.max_deaths=2", "training.steps=100000", "training.log_every=1")
    number = launch.read()["submitted"][0].id

    def starts() -> int:
        return events(launch).count("started")

    for start in (1, 2):
        wait_for(lambda start=start: starts() == start and len(records(folder)) >= 2)
        call("scancel", "--signal=KILL", f"{number}.0")
        wait_for(lambda start=start: starts() > start or events(launch)[-1] == "stopped")

        # Without its log the next start has to train again before it can be killed.
        (folder / "pretraining" / "log.jsonl").unlink()

    wait_until(launch, "stopped")
    assert "it died 2 times at pretraining, exit code" in states(launch)[0][1]


def test_shards_are_made_by_an_array_before_what_needs_them(tmp_path: Path) -> None:
    words = (
        "experiment=pretrain_350m",
        "overrides=smoke",
        "until=tokens",
        f"run={tmp_path / 'run'}",
    )
    # Two shards' jobs, and one that finishes the stage after both of them.
    parts = (
        "launcher.parts=1",
        "launcher.stages.tokens.parts=2",
        "launcher.stages.tokens.cpus_per_task=2",
    )
    assert main([*words, "launcher=slurm", *parts]) == 0
    launch = newest_launch(tmp_path / "run")
    names = [each.job for each in launch.read()["submitted"]]
    waiting = dict(zip(names, states(launch), strict=False))
    assert waiting["tokens_end"] == ("queued", "after tokens")

    wait_until(launch, "done")
    assert (tmp_path / "run/tokens/stage.json").is_file()
    assert json.loads((tmp_path / "run/environment.json").read_text())["variables"]["SLURM_JOB_ID"]


def slurm(**fields: Any) -> Component:
    """Checked settings of the SLURM launcher."""
    return LAUNCHERS.check({"name": "slurm", **fields})


def test_what_fails_takes_what_needs_it_along(tmp_path: Path) -> None:
    """A mistake ends its job at once; nodes that do not see the run folder are named."""
    bad = ("search", f"run={tmp_path}", "text=x")
    jobs = [Job("a", (bad,)), Job("b", (bad,), after=("a",))]

    submit(jobs, tmp_path / "one", slurm())
    submit([Job("a", (bad,))], tmp_path / "two", slurm(nodes=2, sbatch={"hold": True}))
    one, two = newest_launch(tmp_path / "one"), newest_launch(tmp_path / "two")

    # The second job is held until its code is gone, as if its nodes lacked the shared folder.
    shutil.move(two.code, tmp_path / "elsewhere")
    call("scontrol", "release", two.read()["submitted"][0].id)

    wait_until(two, "failed")
    assert "the run folder is not visible on all of node[1-2]" in states(two)[0][1]
    wait_until(one, "failed")
    assert states(one)[0][1] == "a mistake in its settings, which its log names"
    assert states(one)[1][1].startswith("not started, as a did not succeed")


def test_the_cluster_is_asked_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SETTINGS, f"run={tmp_path / 'run'}", "launcher=slurm"]
    for word, sentence in (
        ("launcher.partition=hihg", "which the cluster does not have; did you mean high?"),
        ("launcher.nodes=3", "launcher.nodes is 3; partition main has only 2 nodes"),
        ("launcher.gpus_per_node=3", "nodes of partition main have 2 GPUs"),
        ("launcher.cpus_per_task=100", "sbatch refused the job run, and nothing is queued"),
    ):
        assert main([*words, word]) == 2
        assert sentence in capsys.readouterr().err

    # Nothing of all this may be left in the queue.
    queue = subprocess.run(
        ["squeue", "-h", "-n", "run.run"], capture_output=True, text=True, check=True
    )
    assert queue.stdout == ""
