"""docs/paper.md names only files and experiments that exist, and no table or figure is left out."""

from __future__ import annotations

import re
from pathlib import Path

from cm3leon.experiment import list_experiments

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/paper.md").read_text()


def test_every_named_file_and_experiment_is_there() -> None:
    experiments = list_experiments()
    named = re.findall(r"`([^`]+)`", PAGE[PAGE.index("## Sections") :])
    files = {name for name in named if "/" in name}
    assert len(files) > 60
    for file in sorted(files):
        assert (ROOT / file).is_file(), file
    others = {name for name in named if name not in files} - {"<break>", "Config", "--list"}
    assert others <= set(experiments), others - set(experiments)


def test_every_row_has_its_code_and_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) > 30
    for row in rows:
        cells = row.strip("|").split("|")
        assert "`" in cells[1], row
        assert "`tests/test_" in cells[-1], row


def test_no_section_that_says_what_to_build_is_left_out() -> None:
    rows = PAGE[PAGE.index("## Sections") : PAGE.index("## Formulas")]
    numbers = re.findall(r"^\| ([2-4A-E](?:\.\d)?)[ :]", rows, re.MULTILINE)
    assert sorted(set(numbers)) == [
        *("2.1", "2.2", "2.3", "3.1", "3.2", "3.3", "4", "4.1", "4.2", "A", "E.1"),
    ]


def test_no_table_and_no_figure_is_left_out() -> None:
    """The paper has five tables and sixteen figures."""
    tables = PAGE[PAGE.index("## Tables") : PAGE.index("## Figures")]
    assert re.findall(r"^\| (\d):", tables, re.M) == ["1", "2", "3", "4", "5"]
    found: set[int] = set()
    for cell in re.findall(r"^\| ([\d, to]+)", PAGE[PAGE.index("## Figures") :], re.M):
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", cell):
            found |= set(range(int(first), int(last or first) + 1))
    assert found == set(range(1, 17))
