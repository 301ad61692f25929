"""Texts of corpora, file names and words of users are shown on a terminal, never obeyed by it."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import cm3leon
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tqdm import tqdm

from cm3leon import run
from cm3leon.terminal import guarded, is_printable, printable
from cm3leon.types import Notice

# A screen that is cleared, a window's title, a direction of writing, colours, and a second line.
HOSTILE = "a \x1b[2J\x1b]0;owned\x07 \u202egnp.exe\u2066 \x9b31m\r\nreport: fine"
OBEYED = ("\x1b", "\x07", "\x9b", "\u202e", "\u2066")


@given(st.text())
def test_printable_is_one_line_that_says_all(text: str) -> None:
    shown = printable(text)
    assert is_printable(shown)
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown
    shown.encode("utf-8")  # no halves of pairs, which no stream could write


def test_usual_text_stays_as_it_is() -> None:
    text = "Ein Hündchen, 一只小狗, كلب صغير, 👩‍🔬 — “quoted”"
    assert printable(text) == text


def test_streams_show_escapes_and_keep_lines_and_progress_bars() -> None:

    out = io.StringIO()
    before, sys.stdout = sys.stdout, out
    try:
        with guarded():
            print(HOSTILE)
            for _ in tqdm(range(2), file=sys.stdout, desc="below", position=1, ascii=True):
                pass
    finally:
        sys.stdout = before

    first, second, rest = out.getvalue().split("\n", 2)
    assert not any(mark in first + second for mark in OBEYED)
    assert "\\x1b[2J" in first
    assert first.endswith("\\r")
    assert second == "report: fine"

    # The progress bar moves the cursor: what the program itself writes is obeyed.
    assert "\rbelow: " in rest
    assert "\x1b[A" in rest


def hostile_folder(place: Path) -> Path:
    """Two images with hostile captions, and a file with a hostile name that is no image."""
    for number in range(2):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(HOSTILE)
    (place / "\x1b[31mred\u202e\n.png").write_bytes(b"no image")
    return place


def test_validate_shows_what_a_corpus_holds(tmp_path: Path) -> None:
    said = cm3leon("validate", f"data.path={hostile_folder(tmp_path)}")
    assert "\\x1b[31mred\\u202e\\n.png: " in said.stdout
    assert not any(mark in said.stdout + said.stderr for mark in OBEYED)


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=\x1b[2J\u202e"],
        ["\x1b[2J\u202e"],
        ["search", "run=\x1b[2J\u202e", "text=x"],
        ["generate", "run=\x1b[2J\u202e", "prompt=x"],
        ["status", "run=\x1b[2J\u202e"],
        ["validate", "data.path=\x1b[2J\u202e"],
        ["experiment=digits_smoke", "data.\x1b[2J\u202e=3"],
    ],
)
def test_messages_show_the_words_of_the_command_line(words: Sequence[str]) -> None:
    said = cm3leon(*words, check=False)
    assert said.returncode == 2
    assert "\\x1b[2J\\u202e" in said.stderr
    assert not any(mark in said.stderr for mark in OBEYED)
    assert said.stderr.count("\n") == 1


def test_a_file_name_that_is_no_text_is_shown(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a square")
    assert "\\udcff.png" in cm3leon("validate", f"data.path={tmp_path}").stdout


def test_our_warnings_are_a_line_and_those_of_libraries_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def function(options: object) -> None:
        for _ in range(2):
            warnings.warn("a library's", DeprecationWarning, stacklevel=1)
            warnings.warn("a library's", UserWarning, stacklevel=1)
            warnings.warn("said once\x1b", Notice, stacklevel=1)

    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setattr("cm3leon.commands.run.main", function)
    assert run.main(["run", "experiment=digits"]) == 0
    assert capsys.readouterr().err == "cm3leon: said once\\x1b\n"


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=digits_smoke", "run={file}"],
        ["experiment=digits_smoke", "run={file}/run"],
        ["experiment=digits_smoke", "run=/proc/x"],
        ["experiment=scenes", "run={file}"],
        ["experiment=digits_smoke", "sweep.seed=1,2", "run={file}"],
        ["experiment=digits_smoke", "run={file}", "launcher=torchrun"],
        ["part", "stage=tokens", "part=0/2", "experiment=corpus", "data.path=x", "run={file}"],
        ["show", "sample=0", "experiment=digits_smoke", "run={file}"],
        ["search", "run={file}", "text=x"],
        ["add", "run={file}", "data.path={folder}"],
        ["point", "run={file}"],
        ["collect", "run={file}"],
        ["status", "run={file}"],
        ["cancel", "run={file}"],
        ["logs", "run={file}"],
        ["generate", "run={file}", "prompt=x"],
        ["perplexity", "runs=[{file}]"],
        ["export", "to=hf", "run={file}", "out={folder}/out"],
        ["validate", "data.path={file}"],
    ],
)
def test_a_file_where_a_folder_is_needed_is_a_sentence(tmp_path: Path, words: list[str]) -> None:
    file = tmp_path / "README.md"
    file.write_text("mine")
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")

    said = cm3leon(*(word.format(file=file, folder=folder) for word in words), check=False)
    assert said.returncode == 2, said
    assert said.stderr.startswith("cm3leon: ")
    assert said.stderr.count("\n") == 1
    assert file.read_text() == "mine"
    assert json.dumps(said.stderr).count("Traceback") == 0
