"""A sweep as an array of a real SLURM without accounting: failures are retried, and run again."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cluster import call
from PIL import Image

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 900
"""Seconds that a busy machine may take for a few jobs, each of which loads torch."""
TRAININGS = ("image_tokenizer_training", "retriever_training", "training")
EACH = ("steps=3", "warmup_steps=1", "log_every=1", "checkpoint_every=1", "batch_size=4")
"""Settings of each training."""
SMALL = (
    "until=pretraining",
    "image_tokenizer.image_size=16",
    "image_tokenizer.channels=8",
    "retriever.encoder.image_size=16",
    "model.layers=1",
    "model.width=32",
    "model.head_size=16",
    "training.bad_steps=1",
    "training.weight_decay=0",  # with a decay, a rate of 1e30 would be refused before anything runs
    *(f"{section}.{setting}" for section in TRAININGS for setting in EACH),
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Sixteen images of noise with a text beside each."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()

    for number in range(16):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
        (folder / f"{number}.txt").write_text(f"noise number {number}")
    return folder


def wait_for(file: Path) -> None:
    """Wait for a file, for `PATIENCE` seconds at most."""
    end = time.monotonic() + PATIENCE
    while not file.is_file():
        assert time.monotonic() < end, call("squeue", "--states=all")
        time.sleep(1)


def journal(folder: Path, launch: int, number: int) -> list[dict]:
    """The journal of an element of the array of points."""
    file = folder / "launch" / str(launch) / "journal" / f"points-{number}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_sweep_is_an_array_whose_failures_are_retried_listed_and_run_again_alone(
    images: Path, tmp_path: Path
) -> None:
    folder, asked = tmp_path / "sweep", tmp_path / "asked"

    # A command sacct that only notes that it was called: nothing may ask for accounting.
    sacct = tmp_path / "bin" / "sacct"
    sacct.parent.mkdir()
    sacct.write_text(f"#!/bin/sh\ntouch {asked}\nexit 127\n")
    sacct.chmod(0o755)

    environment = {
        **os.environ,
        "PATH": f"{sacct.parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }

    words = [
        sys.executable,
        "-m",
        "cm3leon.run",
        "experiment=folder",
        f"data.path={images}",
        f"run={folder}",
        *SMALL,
    ]
    words += ["launcher=slurm", "launcher.array_parallelism=1", "launcher.timeout_min=30"]

    # A job that takes all nodes keeps the array waiting, so that it is seen whole in the queue.
    # At a rate of 1e30 the weights are infinite after a step.
    blocker = call(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"
    ).strip()
    said = call(*words, "sweep.training.learning_rate=1e-3,1e30,2e-3", cwd=ROOT, env=environment)
    assert f"3 points in {folder}, 3 to run" in said
    queued = call("squeue", "--noheader", "--name=sweep.points", "--format=%T")
    assert set(queued.split()) == {"PENDING"}
    call("scancel", blocker)

    wait_for(folder / "sweep.csv")
    lines = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [line["state"] for line in lines] == ["finished", "failed", "finished"]
    assert [bool(line["loss"]) for line in lines] == [True, False, True]
    assert sorted(line["best"] for line in lines) == ["", "", "best"]
    page = (folder / "report.html").read_text()
    assert "learning_rate=1e+30" in page
    assert "steps in a row were skipped" in page

    # The points share the image tokenizer of one run. The array is one job, and one of its elements
    # runs at a time.
    assert len({(folder / line["point"] / "image_tokenizer").resolve() for line in lines}) == 1
    submitted = json.loads((folder / "launch" / "1" / "jobs.json").read_text())["submitted"]
    assert len({each["id"].partition("_")[0] for each in submitted if each["job"] == "points"}) == 1

    events = [journal(folder, 1, number) for number in range(3)]
    assert [event["event"] for event in events[0]] == ["started", "done"]
    assert [event["event"] for event in events[1]] == ["started", "died", "started", "stopped"]
    spans = []
    for element in events:
        for start, end in zip(element[::2], element[1::2], strict=True):
            spans.append((start["time"], end["time"]))
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))

    # Another rate in the place of the failed one: only its point runs.
    (folder / "sweep.csv").unlink()
    said = call(*words, "sweep.training.learning_rate=1e-3,4e-3,2e-3", cwd=ROOT, env=environment)
    assert f"3 points in {folder}, 1 to run" in said
    wait_for(folder / "sweep.csv")
    lines = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [line["state"] for line in lines] == ["finished"] * 3
    assert [event["event"] for event in journal(folder, 2, 0)] == ["started", "done"]
    assert not (folder / "launch" / "2" / "journal" / "points-1.jsonl").exists()
    assert not asked.exists()
