"""Every command that a page, a message or a document prints can be typed as it is printed."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import cm3leon

from cm3leon import run
from cm3leon.commands import COMMANDS, plan
from cm3leon.types import refuse

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
CODE_FILES = [
    file
    for folder in ("cm3leon", "evaluation", "plugins")
    for pattern in ("*.py", "*.yaml", "*.md")
    for file in sorted((ROOT / folder).rglob(pattern))
]
PRINTED = (
    *PAGES,
    *sorted((ROOT / "docs" / "tutorials").glob("*.py")),
    ROOT / "Makefile",
    ROOT / "experiments.yaml",
    *sorted((ROOT / "experiments").rglob("*.yaml")),
    *CODE_FILES,
)
CALL = "-m cm3leon.run"
ASKED = rf"(?:{'|'.join((*COMMANDS, *run.FLAGS))})(?: |$)|experiment="
SCRIPT = re.compile(rf"(?<![\w./=-])(?<!from )cm3leon(?= (?:{ASKED}))")
"""The installed command and behind it one of its words, as pages write it."""
PYTHON = ("f'", 'f"', '"""')
"""A line of Python that makes a command begins with one of these; such a command is tested where it
is printed."""


def printed_commands() -> Iterator[tuple[str, str]]:
    """Where each command stands, and its words.

    A command may stand in a block of a page, in a sentence, or in a comment.
    """
    for file in PRINTED:
        text = re.sub(r"\\\n\s*#?\s*", " ", file.read_text())
        if file.suffix == ".md":
            text = SCRIPT.sub(f"python {CALL}", text)
        for number, line in enumerate(text.splitlines(), 1):
            if CALL not in line or line.strip().startswith(PYTHON):
                continue
            if line.startswith("$ "):
                continue  # its output stands below it, see the test of printed answers

            # A command for sbatch stands in its --wrap, others between backticks or alone on the
            # line.
            wrapped = re.search(rf'--wrap "[^"]*{CALL}([^"]*)"', line)
            sentence = re.findall(rf"`[^`]*{CALL}([^`]*)`", line)
            if wrapped:
                sentence = [f"{wrapped[1]} part=0/256"]

            for words in sentence or [line.partition(CALL)[2]]:
                if not words.strip():
                    continue  # a mention of the program, without a command
                where = f"{file.relative_to(ROOT)}-{number}"
                yield where, words.replace("$stage", "tokens").strip()


PRINTED_COMMANDS = dict(printed_commands())
EXPLAINED = ("[command]", "experiment=NAME [key=value ...]", "| --help", "count run=")
"""Legends, and the command that docs/architecture.md writes as an example."""


def words_of(text: str) -> list[str]:
    """The words of a command.

    What stands behind it is cut off: a comment, a pipe, a file for its output. The shell's quotes
    around its words go as well.
    """
    text = re.split(r"\s+#|\s+[|>] |\s{4,}|, or ", text)[0]
    return shlex.split(text.removesuffix("."))


def test_commands_are_found() -> None:
    assert len(PRINTED_COMMANDS) > 100
    assert {name.partition("-")[0] for name in PRINTED_COMMANDS} >= {"README.md", "docs/data.md"}


def _checks_settings(experiment: object, folder: Path, *, found: list[str], **_: object) -> None:
    """Refuse wrong settings, as the real check does, but without a look at other runs."""
    refuse(found)


@pytest.fixture
def stops_before_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Stop each command where it would begin to work; returns the places that were reached.

    Files that the commands name are there.
    """
    reached: list[str] = []
    for target in (
        "cm3leon.stages.running.run_experiment",
        "cm3leon.stages.running.run_stage_part",
        "cm3leon.studies.run_study",
        "cm3leon.launch.runs.launch_experiment",
        "cm3leon.studies.run.launch_study",
        "cm3leon.commands.sample.show",
    ):
        monkeypatch.setattr(target, lambda *_, target=target, **__: reached.append(target))

    monkeypatch.setattr("cm3leon.commands.run._record", lambda folder: None)

    # The runs and files that a command names do not exist, so only its settings are checked.
    monkeypatch.setattr("cm3leon.stages.running.check_before_stages", _checks_settings)
    monkeypatch.setattr("cm3leon.data.formats.told_source", lambda path: ("folder", []))

    planned = plan.plan
    monkeypatch.setattr(plan, "plan", lambda *given: reached.append("plan") or planned(*given))
    for name in set(COMMANDS) - {"run", "part", "show", "plan"}:
        main = f"cm3leon.commands.{name}.main"
        monkeypatch.setattr(main, lambda options, main=main: reached.append(main))
    monkeypatch.chdir(tmp_path)

    # The plugin that docs/plugins.md shows, and the project's own files, under the printed names.
    page = (ROOT / "docs/plugins.md").read_text()
    example = re.search(r"```python\n(from dataclasses .*?)```", page, re.S)
    assert example
    (tmp_path / "sharp.py").write_text(example[1])
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "plugins").symlink_to(ROOT / "plugins")
    return reached


def test_an_answer_that_is_printed_is_the_one_that_comes() -> None:
    sessions = []
    for file in PRINTED:
        lines = file.read_text().splitlines()
        for line, answer in itertools.pairwise(lines):
            if line.startswith("$ ") and CALL in line:
                sessions.append((line.partition(CALL)[2], answer))

    assert sessions
    for words, answer in sessions:
        said = cm3leon(*shlex.split(words), check=False)
        assert answer in said.stdout + said.stderr


@pytest.mark.parametrize("where", PRINTED_COMMANDS)
def test_a_printed_command_is_understood(
    where: str,
    stops_before_work: list[str],
    registries: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = PRINTED_COMMANDS[where]
    if any(each in text for each in EXPLAINED):
        pytest.skip("a legend")

    words = words_of(text)
    assert run.main(words) == 0, (words, capsys.readouterr().err)
    assert stops_before_work or words[-1].startswith("--") or "--list" in words
