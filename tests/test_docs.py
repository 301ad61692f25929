"""What pages tell a reader to type exists: extras, files, targets of make, scripts.

The project's own commands are parsed in test_commands.py.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_commands import PAGES

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = "benchmarks|cm3leon|docs|evaluation|experiments|plugins|requirements|tests"

OF_OTHERS = ("evaluation/evaluate_images.py",)
"""Scripts of other projects that a page says how to call: GenEval's, in its own folder."""


def commands(page: Path) -> Iterator[str]:
    """Each line of a page's blocks, and what stands between single backticks."""
    text = page.read_text()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language in ("", "bash", "sh"):
            yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", outside)


def words_after(program: str) -> list[tuple[str, list[str]]]:
    """The lines that call a program, and the words that follow it there.

    The call stands at a line's beginning or behind &&; variables may stand in front of it, and the
    folder that it lies in.
    """
    before = r"(?:[A-Z_]+=\S* )*(?:taskset -c \d+ )?(?:[\w./-]+/)?"
    found = []
    for page in PAGES:
        for line in commands(page):
            for words in re.findall(rf"(?:^|&& ?){before}{program} ([^&#|;]+)", line):
                found.append((f"{page.relative_to(ROOT)}: {line}", shlex.split(words)))
    return found


def extras() -> set[str]:
    """The names of extras in setup.py."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key) for key in node.value.keys if key is not None}
    raise AssertionError("setup.py has no extras")


def test_every_pip_install_names_extras_and_files_that_are_there() -> None:
    known, found = extras(), 0
    for where, words in words_after("pip install"):
        for number, word in enumerate(words):
            if wanted := re.fullmatch(r"(?:cm3leon|\.)\[(.+)\]", word):
                # Three dots stand for any of them, in the heading of a table.
                assert set(wanted[1].split(",")) <= {*known, "…"}, where
                found += 1

            if word == "-r":
                assert (ROOT / words[number + 1]).is_file(), where
                found += 1
    assert found > 8


def test_every_extra_is_in_the_table_of_the_readme() -> None:
    table = (ROOT / "README.md").read_text().partition("## Extras")[2]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named: set[str] = set()
    for row in rows:
        named.update(re.findall(r"`(\w+)`", row))

    # The others contain these two: `test` is a part of `dev`, `perceptual` of `eval`.
    assert named == extras() - {"test", "perceptual"}


def test_every_target_of_make_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    # A prompt may begin so, too: "make it a woman".
    found = [(where, words) for where, words in words_after("make") if len(words) == 1]
    assert len(found) > 8
    for where, words in found:
        assert words[0] in targets, where


def test_every_script_is_there() -> None:
    found = words_after("python")
    scripts = [(where, words[0]) for where, words in found if words[0].endswith(".py")]
    assert len(scripts) > 8
    for where, script in scripts:
        assert script in OF_OTHERS or (ROOT / script).is_file(), where


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    suffixes = "cff|def|json|lock|md|py|sh|toml|yaml"
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]+\.(?:{suffixes}))`", page.read_text())
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing
