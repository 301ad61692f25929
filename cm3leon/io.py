"""Files: written whole or not at all, JSON whose shape is checked, and SHA-256.

with atomic(path) as partial:  # readers see the old file or the new one, never half of either
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
"""Seconds after which a second change of a file is certain to change its time."""

_digests: dict[tuple[int, ...] | None, str] = {}


# ---------------------------------------------------------------------------- whole or not at all


@contextmanager
def atomic(path: Path, *, shared: bool = False, sync: bool = False) -> Iterator[Path]:
    """Yield a name beside `path` to write to, and rename the file to `path` if nothing fails.

    Otherwise the file is removed.

    Args:
        path: the file to be written.
        shared: whether other processes may write the same file at this time. The yielded name then
            belongs to this process, and the last rename wins. A file that a killed process leaves
            is not overwritten later.
        sync: whether the content must be on the disk before the file gets its name.
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
    """Return the name to which this process writes a file before renaming it to `path`."""
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
    """Write a JSON file whole or not at all, like `atomic`."""
    write_text(path, json.dumps(content, indent=indent), shared=shared, sync=sync)


def holds_json(path: Path, content: Any) -> bool:
    """Whether a file is there and is what `write_json` would write."""
    return path.is_file() and path.read_bytes() == json.dumps(content, indent=2).encode()


def write_json_lines(path: Path, entries: Iterable[Any]) -> None:
    """Write a JSON-lines file whole or not at all, like `atomic`."""
    with atomic(path) as partial, partial.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(entry) + "\n")


# ---------------------------------------------------------------------------------------- SHA-256


def digest_of(content: str | ReadableBuffer) -> str:
    """Return the SHA-256 of a text (as UTF-8) or of bytes, in hexadecimal."""
    return digest_of_parts([content])


def digest_of_parts(parts: Iterable[str | ReadableBuffer]) -> str:
    """Return the SHA-256 of texts and bytes joined; they need not be in memory at the same time."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, which a process reads only once unless the file changes."""
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
    """Return numbers that change with every change of a file, whatever its name.

    None for a file that has changed within the last second, because another change might have the
    same time.
    """
    status = path.stat()
    if time.time() - max(status.st_mtime, status.st_ctime) < SETTLED:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


# ------------------------------------------------------------------------------------------- JSON


def read_json(path: Path, shape: Any = dict) -> Any:
    """Read a JSON file, and check its content against the shape that the caller relies on.

    A shape is one of these:

        int                a value of this type
        (int, float)       a value of one of these types
        [shape]            a list of such values
        {str: shape}       an object with any keys and such values
        {"key": shape}     an object that has this key; other keys are ignored
        {"key?": shape}    an object in which this key may be missing or null

    For example {"step": int, "lanes": [{"position": int}]} accepts {"step": 3, "lanes": []}.

    Raises:
        UserError: for a file that is missing, may not be read, is not JSON or has another shape,
            naming the file and the place in it.
        OSError: if the system fails to read it.
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
    """Read the lines of a JSON-lines file, each of the given shape (see `read_json`).

    Raises:
        UserError: for a file that is missing or may not be read, or naming the first wrong line.
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
    """Read a JSON-lines file that is written line by line, each of the given shape.

    A missing file has no lines. A line that a kill has cut short, perhaps within a character, is
    left out. `read_json` explains shapes.

    Raises:
        UserError: naming the first whole line of another shape.
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
    """Raise UserError, naming `where`, for JSON content of another shape (see `read_json`)."""
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
    # To Python JSON's true is an int, but it is not meant as one.
    if isinstance(content, types) and (bool in types or not isinstance(content, bool)):
        return
    shown = json.dumps(content)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    wanted = [each for each in types if not (each is int and float in types)]
    words = " or ".join(_WORDS[each] for each in wanted)
    raise UserError(f"{where} is {shown}; it must be {words}")
