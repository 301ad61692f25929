"""Files: written whole or not at all, JSON whose shape is checked, and SHA-256.

with atomic(path) as partial:  # a reader sees the old file or the new one, never half of either
    partial.write_bytes(content)

write_json(path, {"step": 3})
read_json(path, {"step": int})["step"]
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cm3leon.permissions import check_readable
from cm3leon.types import UserError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SETTLED = 1.0
"""Seconds after which a second change of a file is sure to show in its time."""

_digests: dict[tuple[int, ...] | None, str] = {}


# ------------------------------------------------------------------------------------------------ whole or not at all


@contextmanager
def atomic(path: Path, *, shared: bool = False, sync: bool = False) -> Iterator[Path]:
    """Yield a name beside `path` to write under; the file is renamed to `path` if nothing fails, and removed else.

    Args:
        shared: other processes may be writing the same file at this time, so that the name is this one's own. The last
            rename wins. What a killed process leaves is not written over by the next one.
        sync: have the content on the disk before the file gets its name.
    """
    partial = partial_name(path) if shared else path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if sync:
            sync_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_name(path: Path) -> Path:
    """The name under which this process writes a file before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def sync_to_disk(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, shared: bool = False, sync: bool = False) -> None:
    """Write a text file whole or not at all, see `atomic`."""
    with atomic(path, shared=shared, sync=sync) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(
    path: Path,
    content: Any,
    *,
    indent: int | None = 2,
    shared: bool = False,
    sync: bool = False,
) -> None:
    """Write a JSON file whole or not at all, see `atomic`."""
    write_text(path, json.dumps(content, indent=indent), shared=shared, sync=sync)


def write_json_lines(path: Path, entries: Iterable[Any]) -> None:
    """Write a JSON-lines file whole or not at all, see `atomic`."""
    with atomic(path) as partial, partial.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(entry) + "\n")


# ------------------------------------------------------------------------------------------------ SHA-256


def digest_of(content: str | ReadableBuffer) -> str:
    """SHA-256 of a text (as UTF-8) or of bytes, in hexadecimal."""
    return digest_of_parts([content])


def digest_of_parts(parts: Iterable[str | ReadableBuffer]) -> str:
    """SHA-256 of texts and bytes joined, which need not be in memory at one time."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


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


def read_log(path: Path, shape: Any = dict) -> list[Any]:
    """The lines of a JSON-lines file that is written a line at a time, each of the given shape, see `read_json`.

    Without the file there are none. A line that a kill has cut short, inside a character perhaps, is left out.

    Raises:
        UserError: naming the first whole line that is not as it should be.
    """
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8", errors="replace").split("\n"), 1
    ):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
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
