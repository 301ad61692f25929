"""The command `perplexity` draws figure 3 of the paper from run folders."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cm3leon.commands import perplexity
from cm3leon.commands.perplexity import curves_of
from cm3leon.config import dump_yaml, from_mapping
from cm3leon.types import UserError


def draw(options: dict[str, Any]) -> None:
    """Run the command with these options."""
    perplexity.main(from_mapping(perplexity.Options, options))


def write_run(
    folder: Path,
    steps: range,
    *,
    epoch: int = 100,
    batch_tokens: int | None = 512,
    start: Path | None = None,
) -> Path:
    """A run folder whose loss at step s is 8 - log10(s), and half of that for images.

    An epoch has `epoch` steps.
    """
    (folder / "pretraining").mkdir(parents=True)
    training = {"batch_tokens": batch_tokens, "batch_size": 4, "start": start and str(start)}
    training["start_with"] = "everything" if start else "weights"
    (folder / "config.yaml").write_text(dump_yaml({"training": training, "model": {"seq_len": 64}}))

    lines = []
    for step in steps:
        logarithm = math.log10(step)
        losses = {"loss": 8 - logarithm, "loss_image": 4 - logarithm / 2}
        lines.append(json.dumps({"step": step, "epoch": step / epoch, **losses}) + "\n")
    (folder / "pretraining" / "validation.jsonl").write_text("".join(lines))
    return folder


def test_numbers_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = range(20, 201, 20)
    runs = [
        write_run(tmp_path / "small", steps, batch_tokens=512),
        write_run(tmp_path / "big", steps, batch_tokens=None),
    ]
    out = tmp_path / "figures" / "p.png"
    draw({"runs": [str(run) for run in runs], "out": str(out), "of": "loss_image", "width": 500})

    # Ten points a run. Where a run has no batch_tokens, its batch of 4 blocks of 64 tokens counts.
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["curve"], int(row["updates"])) for row in rows[9:11]] == [
        ("small", 200),
        ("big", 20),
    ]
    assert [float(row["tokens"]) for row in (rows[1], rows[11])] == [40 * 512, 40 * 4 * 64]
    for row in rows:
        # exp(4 - log10(s) / 2) is exp(4) * s ** (-1 / (2 ln 10)).
        expected = math.exp(4) * int(row["updates"]) ** (-0.5 / math.log(10))
        assert float(row["perplexity"]) == pytest.approx(expected)

    with Image.open(out) as picture:
        assert picture.width == 500
    assert "big: 17.28 after 200 updates, 2 epochs" in capsys.readouterr().out


def test_a_continued_run_is_one_curve_with_its_epochs(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", range(20, 121, 20), batch_tokens=512)
    second = write_run(tmp_path / "second", range(140, 221, 20), batch_tokens=1024, start=first)
    (curve,) = curves_of([first, second], "loss")

    assert curve == curves_of([second], "loss")[0]
    assert [point.updates for point in curve.points] == list(range(20, 221, 20))
    assert curve.points[-1].tokens == 120 * 512 + 100 * 1024
    assert [(one.updates, other.updates) for one, other in curve.junctions()] == [(120, 140)]
    # An epoch has 100 steps: its end lies between the last point before it and the first one after.
    assert [(one.updates, other.updates) for one, other in curve.epoch_ends()] == [
        (80, 100),
        (180, 200),
    ]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run", range(1, 3)) for name in "ab"]
    assert [curve.name for curve in curves_of(runs, "loss")] == [str(run) for run in runs]


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_other_formats(tmp_path: Path, suffix: str) -> None:
    run = write_run(tmp_path / "run", range(1, 3))
    draw({"runs": str(run), "out": str(tmp_path / f"p{suffix}"), "by": "tokens"})
    assert (tmp_path / f"p{suffix}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"runs": []}, "runs is empty"),
        ({"runs": ["{run}"], "out": "p.doc"}, "must end in one of .png, .svg, .pdf"),
        (
            {"runs": ["{run}/none"]},
            "none is not the folder of a run with validation figures: .*config.yaml is missing",
        ),
        (
            {"runs": ["{run}"], "of": "loss_txt"},
            "of is loss_txt, which .* does not have; it has loss, loss_image",
        ),
        ({"runs": ["{run}"], "by": "hours"}, "by is .hours.; it must be one of"),
        ({"runs": ["{empty}"]}, "has no records yet; the first is written at step"),
    ],
)
def test_mistakes_are_said(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    folders = {
        "run": write_run(tmp_path / "run", range(1, 3)),
        "empty": write_run(tmp_path / "empty", range(0)),
    }
    options["runs"] = [run.format(**folders) for run in options["runs"]]
    with pytest.raises(UserError, match=sentence):
        draw(options)
