"""Check names of files and folders of users, and say at once what the system would refuse."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cm3leon.locks import LOCK, locked
from cm3leon.types import UserError

_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)
_REFUSED = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
"""Errors of the system for a name that no file can have."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of a write for which there is no room, or whose disk fails."""


def path_of(text: str | Path, where: str) -> Path:
    """Return the path that a user has given, with `~` and `~name` replaced by the home folder.

    Raises:
        UserError: for a home folder that is not known, a user that does not exist, a NUL
            character, or a name that is longer than the system allows.
    """
    if "\0" in str(text):
        raise UserError(f"{where} holds a NUL character, which a path cannot have; leave it out")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        user = Path(text).parts[0]
        if user == "~":
            raise UserError(
                f"{where} is {text}, but the home folder is not known here; give the whole path"
            ) from error
        raise UserError(
            f"{where} is {text}, and this machine has no user {user[1:]}; write ./{user} for a "
            "folder of that name"
        ) from error

    # The system itself tells whether a name is possible.
    try:
        path.lstat()
    except OSError as error:
        if error.errno in _REFUSED:
            shown = str(path) if len(str(path)) <= 80 else f"{str(path)[:77]}..."
            raise UserError(f"{where} is {shown}: {os.strerror(error.errno).lower()}") from error
    return path


def kind_of(path: Path) -> str | None:
    """Say what stands at a path instead of a folder; None for a folder or nothing."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    return next((words for is_kind, words in _KINDS if is_kind(mode)), None)


def check_folder(folder: Path, where: str) -> None:
    """Raise UserError if a path, or one above it, is a file or a device, so cannot be a folder."""
    for path in (folder, *folder.parents):
        if kind := kind_of(path):
            what = "which" if path == folder else f"and {path}"
            raise UserError(f"{where} is {folder}, {what} is {kind}; it must be a folder")


def make_folder(folder: Path, where: str) -> None:
    """Make a folder to write into, with those above it.

    Raises:
        UserError: if something else stands there, or the system refuses to make it.
    """
    check_folder(folder, where)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{where} is {folder}, where no folder can be made: "
            f"{(error.strerror or str(error)).lower()}"
        ) from error


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Name the file or folder in errors of writing it.

    The system's own error of a write does not, NumPy's error has no number, and other libraries
    have errors of their own.

    Raises:
        OSError: instead of such an error, with its number and the path.
    """
    try:
        yield
    except Exception as error:
        number = _number_of(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(place)) from error


def _number_of(error: Exception) -> int | None:
    """Return the system's number of a writing error that does not name its file; None otherwise."""
    if isinstance(error, OSError):
        if error.filename is not None:
            return None
        if error.errno in _FULL:
            return error.errno
    text = str(error)
    if isinstance(error, OSError) and error.errno is None and " requested and " in text:
        return errno.ENOSPC  # NumPy: "1000 requested and 0 written"
    if isinstance(error, UserError):
        return None
    return next((number for number in _FULL if os.strerror(number) in text), None)


@contextmanager
def writing(folder: Path, where: str) -> Iterator[None]:
    """Make a folder to write into, and hold it alone.

    Raises:
        UserError: if no folder can be made there, or another process is writing into it.
    """
    make_folder(folder, where)
    with locked(folder, where=where):
        yield


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` to write into; it becomes `out` at the end if nothing fails."""
    out = out.resolve()
    make_folder(out.parent, "out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out: {out} exists already; out must be a new or empty folder")
    partial = out.with_name(f".{out.name}.partial")
    with writing(partial, "out"), naming(out):
        for left in partial.iterdir():  # files of an export that was killed
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield partial
            (partial / LOCK).unlink()
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
