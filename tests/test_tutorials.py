"""The notebooks of docs/tutorials run from their first cell to the last, in a small form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
SMALL = {"own_pictures": "pictures, tokenizer_steps, steps = 40, 30, 25", "write_a_plugin": ""}
"""What takes the place of a notebook's cell of parameters; empty if the notebook has none."""
ELSEWHERE = {"look_and_draw"}
"""Notebooks that need a finished run: the test that makes one runs them as well."""


def test_every_notebook_has_a_test() -> None:
    assert {file.stem for file in FOLDER.glob("*.py")} - ELSEWHERE == set(SMALL)


@pytest.mark.parametrize(
    "name", [pytest.param("own_pictures", marks=pytest.mark.slow), "write_a_plugin"]
)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = FOLDER / f"{name}.py"
    jupytext = pytest.importorskip("jupytext", reason="it makes notebooks of docs/tutorials")
    nbclient = pytest.importorskip("nbclient", reason="it runs notebooks")
    pytest.importorskip("ipykernel", reason="notebooks run in it")

    notebook = jupytext.read(file, fmt="py:percent")
    if small := SMALL[file.stem]:
        tagged = [each for each in notebook.cells if "parameters" in each.metadata.get("tags", ())]
        (given,) = tagged
        names = {line.partition(" = ")[0] for line in given.source.splitlines() if " = " in line}
        assert names == set(small.partition(" = ")[0].split(", "))
        given.source = small

    # The kernel is this interpreter's own; what it and IPython keep stays in the test's folder.
    for variable in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / "jupyter"))
    work = tmp_path / "work"
    work.mkdir()
    client = nbclient.NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    )
    client.execute()

    code = [each for each in notebook.cells if each.cell_type == "code"]
    assert len(code) >= 5
    assert all(each.execution_count for each in code)


def test_the_settings_for_own_pictures_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notebook up to its first stage, in which all its settings are checked."""
    monkeypatch.chdir(tmp_path)
    cells = (FOLDER / "own_pictures.py").read_text().split("# %%")
    last = next(number for number, cell in enumerate(cells) if "until=documents" in cell)
    defined: dict[str, Any] = {}
    for cell in cells[: last + 1]:
        if "[markdown]" not in cell.partition("\n")[0]:
            exec(compile("#" + cell, "own_pictures.py", "exec"), defined)

    skipped = (tmp_path / "runs/photos/documents/skipped.jsonl").read_text()
    assert "notes.png" in skipped
    assert len(list((tmp_path / "photos").glob("*.txt"))) == defined["pictures"]
