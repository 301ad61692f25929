"""The tables of README.md and docs/ follow from the result files, which a run writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cm3leon.evaluation.metrics import proportion

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script of the tables, which lies beside the package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results

    return results


MEANS = ("Fréchet distance of cells", "CLIP score")
"""Figures that are not shares of the items."""


def shares(found: Any, name: str = "") -> Iterator[dict[str, Any]]:
    """Every share below a part of a result file."""
    if isinstance(found, dict) and "value" in found:
        if name not in MEANS:
            yield found
    elif isinstance(found, dict):
        for below, part in found.items():
            yield from shares(part, below)
    elif isinstance(found, list):
        for part in found:
            yield from shares(part)


def test_every_page_is_what_the_result_files_give(script: Any) -> None:
    for page in script.pages():
        name = page.relative_to(ROOT)
        hint = f"{name} is not what docs/results/ gives: python benchmarks/results.py"
        assert script.filled(page) == page.read_text(), hint


def test_every_table_stands_on_a_page(script: Any) -> None:
    marked: set[str] = set()
    for page in script.pages():
        marked |= set(re.findall(r"<!-- table (\w+) -->", page.read_text()))
    assert marked == set(script.tables())


def test_another_figure_makes_another_page(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs/results.md"
    files = script.result_files()
    (row, *_) = files["digits"].content["evaluations"]["caption"]
    accuracy = {"value": 0.5, "low": 0.25, "high": 1.0, "n": 1234, "runs": {"deviation": 0.125}}
    row["metrics"]["accuracy"] = accuracy

    monkeypatch.setattr(script, "result_files", lambda: files)
    line = "| captions that name the right digit | 50.0 ± 12.5 % | 25.0 to 100 | 93 % | 1,234 |"
    assert line in script.filled(page)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "docs/results").glob("*.json")), ids=lambda f: f.stem
)
def test_a_result_file_says_what_made_it_and_its_intervals_are_possible(file: Path) -> None:
    content = json.loads(file.read_text())
    made = content["made"]
    for key in ("command", "machine", "torch", "seeds"):
        assert made[key], key
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", made["date"])

    found = list(shares(content))
    assert found
    for figure in found:
        assert 0 <= figure["value"] <= 1
        if "runs" in figure:
            # The mean over seeds, whose interval is the mean of theirs.
            assert figure["value"] == pytest.approx(np.mean(figure["runs"]["values"]))
            assert figure["low"] <= figure["value"] <= figure["high"]
        elif "n" in figure and "low" in figure:
            # Wilson's interval of as many hits, up to the rounding of the tables.
            hits_N = np.arange(figure["n"]) < round(figure["value"] * figure["n"])
            wilson = proportion(hits_N)
            assert abs(wilson.low - figure["low"]) < 0.0006
            assert abs(wilson.high - figure["high"]) < 0.0006


def test_figures_are_taken_from_a_finished_run(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a finished run leaves: its evaluation, and what made it.
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    accuracy = {"value": 0.75, "low": 0.3, "high": 0.95, "n": 4}
    row = {"row": "documents 0", "metrics": {"accuracy": accuracy}, "seconds": 3.0, "notes": []}
    rows = [row]
    for name, ceiling in (("a", 1.0), ("b", 1.0), ("c", 0.9)):
        rows.append({**row, "row": name, "ceiling": {"accuracy": {**accuracy, "value": ceiling}}})
    written = {"judge": {"real": accuracy}, "evaluations": {"caption": rows}}
    (run / "evaluation/results.json").write_text(json.dumps(written))
    (run / "environment.json").write_text(json.dumps({"packages": {"torch": "2.14.1"}}))
    (run / "config.yaml").write_text("seed: 7\n")
    (run / "metrics.json").write_text(json.dumps({"wall_seconds": {"total": 900.0}}))

    monkeypatch.setattr(script, "RESULTS", tmp_path)
    script.take("digits", run, "one core")

    # The file that was taken gives the cells of tables and a line on what made them.
    file = script.ResultFile(tmp_path / "digits.json")
    assert f"{file['caption/documents 0/metrics/accuracy']:share}" == "75.0 %"
    assert f"{file['judge/real']:interval}" == "30.0 to 95.0"

    # A ceiling that a row shares with the one above it stands there only.
    has_ceiling = ["ceiling" in each for each in file.content["evaluations"]["caption"]]
    assert has_ceiling == [False, True, False, True]
    ceilings = [f"{file[f'caption/{name}/ceiling/accuracy']:share}" for name in "abc"]
    assert ceilings == ["100.0 %", "100.0 %", "90.0 %"]
    with pytest.raises(KeyError, match="has no figure caption/documents 0/ceiling/accuracy"):
        file["caption/documents 0/ceiling/accuracy"]

    assert "seed 7, one core, torch 2.14.1, 20" in f"{file:made}"
    assert f"{file:made}".endswith(": 15 minutes ([digits.json](docs/results/digits.json)).")

    # Of a run with several seeds, its own figures over them.
    several = tmp_path / "several"
    for name, seed in (("digits", 7), ("digits-seed_1", 8)):
        (several / name / "pretraining").mkdir(parents=True)
        (several / name / "config.yaml").write_text(f"seed: {seed}\n")
    own = {"digits": {"judge": {}, "evaluations": {"caption": [row]}}}
    (several / "results.json").write_text(json.dumps({"evaluations": {}, "own_evaluations": own}))
    (several / "environment.json").write_text((run / "environment.json").read_text())
    script.take("digits", several, "one core")
    file = script.ResultFile(tmp_path / "digits.json")
    assert f"{file['caption/documents 0/metrics/accuracy']:share}" == "75.0 %"
    assert f"{file:made}".startswith(
        "`python -m cm3leon.run experiment=digits seeds=2`, seeds 7, 8, one core"
    )
    with pytest.raises(KeyError, match="has no figure caption/documents 1"):
        file["caption/documents 1/metrics/accuracy"]
