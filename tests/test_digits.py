"""The demo as it is shipped, about ten minutes on two cores: `python -m pytest -m slow`.

The floors lie below the figures in the README by more than their intervals: another processor rounds otherwise. Those
of captions and of infilled bottom halves lie below what the README says of several runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_demo_learns(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "cm3leon.run",
        "experiment=digits",
        f"run={tmp_path / 'digits'}",
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=3600)
    metrics = json.loads((tmp_path / "digits" / "metrics.json").read_text())

    def accuracy(key: str, task: str) -> float:
        entries = [
            entry for entry in metrics[key] if entry["task"] == task and entry["documents"] == 0
        ]
        return max(
            entry["accuracy"] for entry in entries if entry["cfg"] in (None, metrics["chosen_cfg"])
        )

    assert metrics["judge_accuracy_real"] > 0.97
    assert metrics["judge_accuracy_reconstructed"] > 0.96
    assert accuracy("t2i_accuracy", "text_to_image") > 0.95
    assert accuracy("caption_accuracy", "caption") > 0.8
    assert accuracy("infill_accuracy", "infill_top") > 0.85
    assert accuracy("infill_accuracy", "infill_bottom") > 0.65
    assert all(entry["copies"] < 0.05 for entry in metrics["t2i_accuracy"])
