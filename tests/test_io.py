"""Files are written whole or not at all, JSON is read by its shape, and digests are SHA-256."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cm3leon.io import (
    atomic,
    digest_of,
    digest_of_parts,
    read_json,
    read_json_lines,
    read_log,
    write_json,
)
from cm3leon.types import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_a_digest_is_that_of_the_parts_joined() -> None:
    whole = hashlib.sha256("aä\0b".encode()).hexdigest()
    parts = ["a", "ä".encode(), memoryview(b"\0"), "b"]
    assert digest_of("aä\0b") == digest_of_parts(parts) == whole


def test_two_writers_of_one_file_do_not_share_a_name(tmp_path: Path) -> None:
    with atomic(tmp_path / "file", shared=True) as mine, atomic(tmp_path / "file") as other:
        assert mine != other
        mine.write_text("mine")
        other.write_text("other")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "mine")]


def test_a_log_is_read_without_the_line_that_a_kill_cut(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    assert read_log(file) == []

    # Cut in the middle of a letter of two bytes.
    file.write_bytes('{"step": 1}\n{"step": 2, "text": "ä'.encode()[:-1])
    assert read_log(file, {"step": int}) == [{"step": 1}]

    file.write_text('{"step": 1}\n{"steps": 2}\n')
    with pytest.raises(UserError, match="line 2 has no step"):
        read_log(file, {"step": int})


def test_a_line_nested_too_deep_for_json_is_no_line_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("[" * 100_000 + '\n{"step": 1}\n', encoding="utf-8")
    assert read_log(path) == [{"step": 1}]


def test_files_are_hashed_and_renamed_into_place_here_alone() -> None:
    """Everything else uses `atomic` and `digest_of`."""

    def hashes_or_renames(node: ast.AST) -> bool:
        if isinstance(node, ast.Import):
            return any(each.name == "hashlib" for each in node.names)
        return isinstance(node, ast.Attribute) and ast.unparse(node) == "os.replace"

    other = []
    for folder in ("cm3leon", "evaluation", "plugins"):
        for file in (ROOT / folder).rglob("*.py"):
            if any(map(hashes_or_renames, ast.walk(ast.parse(file.read_text())))):
                other.append(file.name)

    # A push hashes a file while it copies it, as it may change before it would be read again.
    assert set(other) <= {"io.py", "types.py", "store.py"}


def test_json_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for something in ({"a": [1, None, "ü"]}, [1, 2]):
        write_json(path, something)
        assert json.loads(path.read_text()) == something
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_what_is_no_json_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_write_that_is_cut_off_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    write_text = Path.write_text

    def half(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        write_text(self, text[: len(text) // 2])
        raise OSError("no space left on device")

    def fails(*args: Any) -> None:
        raise OSError("interrupted")

    with monkeypatch.context() as patch:
        if step == "write_text":
            patch.setattr(Path, "write_text", half)
        else:
            patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match=r"no space left|interrupted"):
            write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}

    # The next write succeeds, and nothing else is left.
    write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize(
    ("content", "shape", "sentence"),
    [
        ("{", dict, "is damaged: it is not JSON"),
        ("[" * 100_000, list, "is damaged: it is not JSON"),
        ('{"a": ' + "1" * 5000 + "}", dict, "is damaged: it is not JSON"),
        ("[]", dict, r"is \[\]; it must be an object$"),
        ("{}", {"a": int}, "has no a$"),
        ('{"a": true}', {"a": int}, "a is true; it must be a whole number$"),
        ('{"a": "x"}', {"a": (int, float)}, 'a is "x"; it must be a number$'),
        ('{"a": [1, "x"]}', {"a": [int]}, 'a: 1 is "x"; it must be a whole number$'),
        ('{"a": {"b": 1}}', {"a": {str: str}}, "a: b is 1; it must be a text$"),
    ],
)
def test_json_of_another_shape_is_a_sentence(
    content: str, shape: object, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(UserError, match=f"^{file}.*{sentence}"):
        read_json(file, shape)

    file.write_text(f"{{}}\n{content}\n")
    if sentence.endswith("$"):
        with pytest.raises(UserError, match=f"^{file}: line [12].*{sentence}|line 1 has no a"):
            read_json_lines(file, shape)


def test_json_of_the_shape_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"a": 1, "more": [2], "b": null}')
    content = read_json(file, {"a": (int, float), "b?": str, "c?": int})
    assert content == {"a": 1, "more": [2], "b": None}

    with pytest.raises(UserError, match=r"y.json is missing"):
        read_json(tmp_path / "y.json")

    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is damaged"):
        read_json(file)
