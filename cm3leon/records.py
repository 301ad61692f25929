"""What folders say of themselves: JSON files that others may have written, and checksums that are compared on opening.

A finished stage has a `stage.json` with the checksum of each of its files:

    {"fingerprint": "3f0c...", "seconds": 12.5, "files": {"tokenizer.json": "9a1b...", "shard-0.arrow": "8192 bytes"}}

Whoever opens one of the files compares it first, once in a process. An Arrow shard carries its own checksum, which
`data.shards.open_shard` compares; here only its size is looked at.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.permissions import check_readable
from cm3leon.types import UserError

STAGES = (
    "documents",
    "text_tokenizer",
    "image_tokenizer",
    "reconstruction",
    "retriever",
    "tokens",
    "vectors",
    "index",
    "neighbours",
    "pretraining",
    "generation",
    "evaluation",
)
"""Stages in the order in which they are made."""
MARKER = "stage.json"
"""Written last: a stage is finished when its folder has one."""
SETTLED = 1.0
"""Seconds after which a second change of a file is sure to show in its time."""

KINDS = {"run": "config.yaml", "sweep": "sweep.yaml", "study": "study.yaml"}
"""What a folder may be of, and the file that says so."""

_digests: dict[tuple[int, ...] | None, str] = {}


# ------------------------------------------------------------------------------------------------ checksums


def sha256(path: Path) -> str:
    """SHA-256 of a file, read once in a process while the file stays as it is."""
    check_readable(path)
    state = state_of(path)
    if state in _digests:
        return _digests[state]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if state is not None:
        _digests[state] = digest
    return digest


def state_of(path: Path) -> tuple[int, ...] | None:
    """What changes with every change of a file, however it is called.

    None for one that has changed within the last second: another change might have the same time.
    """
    status = path.stat()
    if time.time() - max(status.st_mtime, status.st_ctime) < SETTLED:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def checksum(path: Path) -> str:
    """What a record says of a file: its SHA-256, or the size of a shard, which carries a checksum of its own."""
    if path.suffix == ".arrow":  # there may be terabytes of them
        return f"{path.stat().st_size} bytes"
    return sha256(path)


def changed(folder: Path, files: Mapping[str, str]) -> list[str]:
    """The names of files in a folder that are missing or have another checksum than the recorded one."""
    return [
        name
        for name, recorded in files.items()
        if not (folder / name).is_file() or checksum(folder / name) != recorded
    ]


def check_unchanged(folder: Path, files: Mapping[str, str]) -> None:
    """Compare files with their recorded checksums.

    Raises:
        UserError: naming the first that is missing or has changed.
    """
    for name in changed(folder, files):
        file = folder / name
        what = "has changed since it was written" if file.is_file() else "is missing"
        raise UserError(
            f"{file} {what}; put a copy back, or run the experiment again, which makes it anew "
            "(verify=false opens what has changed as it is)"
        )


def check_stage(folder: Path, names: Sequence[str] = (), *, finished: bool = True) -> None:
    """Compare files of a stage with its record before they are read; without names, all files.

    Args:
        finished: refuse a stage without a record. If off, such a stage is one that is being made, and passes.

    Raises:
        UserError: for a file that is missing, has changed or is not in the record, or a stage that is not finished.
    """
    if not (folder / MARKER).is_file():
        if finished:
            raise UserError(f"{folder} is not finished: its {MARKER} is missing")
        return
    recorded = read_stage(folder)["files"]
    if not names and not recorded:
        raise UserError(
            f"{folder / MARKER} names no files; run the experiment again, which makes the stage anew"
        )
    for name in names:
        if name not in recorded:
            raise UserError(
                f"{folder / MARKER} does not name {name}; run the experiment again, which makes the stage anew"
            )
    check_unchanged(folder, {name: recorded[name] for name in names or recorded})


def read_stage(folder: Path) -> dict[str, Any]:
    """The record of a finished stage: `fingerprint`, `seconds`, `files`.

    Raises:
        UserError: for a stage without a record, or with a damaged one.
    """
    return read_json(
        folder / MARKER, {"fingerprint": str, "seconds": (int, float), "files": {str: str}}
    )


def read_array(path: Path) -> np.ndarray:
    """A NumPy file, without running what a pickle might hold.

    Raises:
        UserError: for a file that is missing, may not be read, or is damaged.
    """
    check_readable(path)
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged: it is no readable NumPy file ({error})") from error


# ------------------------------------------------------------------------------------------------ JSON


def read_json(path: Path, shape: Any = dict) -> Any:
    """The content of a JSON file, checked against the shape that the caller relies on.

    A shape is a type (or several), `[shape]` for a list of such, `{str: shape}` for any keys with such values, or
    `{"key": shape}` for keys that must be there; other keys are let through, and "key?" may be missing or null.

        read_json(file, {"step": int, "loss": (int, float), "lanes": [{"position": int}], "note?": str})

    Raises:
        UserError: for a file that is missing, may not be read, is no JSON or has another shape, naming the file and
            the place in it.
        OSError: where the system refuses to read it.
    """
    check_readable(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error})") from error
    check_shape(content, shape, str(path))
    return content


def read_json_lines(path: Path, shape: Any = dict) -> list[Any]:
    """The lines of a JSON-lines file, each of the given shape, see `read_json`.

    Raises:
        UserError: for a file that is missing or may not be read, or naming the first line that is not as it should be.
    """
    check_readable(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not UTF-8") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged: line {number} is not JSON ({error})") from error
        check_shape(content, shape, f"{path}: line {number}")
        found.append(content)
    return found


def check_shape(content: Any, shape: Any, where: str) -> None:
    """Raises UserError if JSON content has not the shape, see `read_json`; `where` names it."""
    if isinstance(shape, list):
        _check_type(content, (list,), where)
        for number, entry in enumerate(content):
            check_shape(entry, shape[0], f"{where}: {number}")
    elif isinstance(shape, dict):
        _check_type(content, (dict,), where)
        if str in shape:
            for key, value in content.items():
                check_shape(value, shape[str], f"{where}: {key}")
            return
        for key, wanted in shape.items():
            name = key.removesuffix("?")
            if key.endswith("?") and content.get(name) is None:
                continue
            if name not in content:
                raise UserError(f"{where} has no {name}")
            check_shape(content[name], wanted, f"{where}: {name}")
    else:
        _check_type(content, shape if isinstance(shape, tuple) else (shape,), where)


_WORDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _check_type(content: Any, types: tuple[type, ...], where: str) -> None:
    # JSON's true is an int to Python, and means another thing.
    if isinstance(content, types) and (bool in types or not isinstance(content, bool)):
        return
    shown = json.dumps(content)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    wanted = [each for each in types if not (each is int and float in types)]
    words = " or ".join(_WORDS[each] for each in wanted)
    raise UserError(f"{where} is {shown}; it must be {words}")


# ------------------------------------------------------------------------------------------------ kinds of folders


def refuse_other_kind(folder: Path, kind: str) -> None:
    """Raises UserError where the folder is that of a run, a sweep or a study, and not of this kind."""
    found = [each for each, file in KINDS.items() if (folder / file).is_file()]
    if any(folder.glob(f"*/{MARKER}")):
        found.insert(0, "run")
    for other in found:
        if other != kind:
            raise UserError(
                f"run: {folder} is the folder of a {other}, and a {kind} needs one of its own; choose another run=, "
                f"for example run={folder}-{kind}"
            )
