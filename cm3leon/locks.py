"""Let only one process at a time write into a folder.

The lock is the system's (`flock`), which the system releases however the process ends. Some file
systems have no such locks (NFS without its lock daemon, some FUSE and cluster file systems). There
the lock is a file that names its holder:

    .lock.exclusive                  host, process and start of the one that has the folder alone
    .lock.shared.NUMBER.HOST-...     one file for each process that shares it

Each holder touches its file every `BEAT` seconds. A file is stale if its process no longer runs on
this host, or if another host has not touched it for `STALE` seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cm3leon.types import UserError

WITHOUT_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that have no locks."""
BEAT, STALE = 20.0, 180.0
"""Seconds. A holder on another host has longer than NFS may cache the times of files."""
LOCK = ".lock"
_numbers = itertools.count()


@contextmanager
def locked(
    folder: Path,
    name: str = LOCK,
    *,
    shared: bool = False,
    wait: bool = False,
    where: str = "run",
    doing: str | None = None,
    instead: str | None = None,
) -> Iterator[None]:
    """Hold a folder alone, or together with any number of other `shared` holders.

    Args:
        folder: an existing folder.
        name: name of the lock's file. Locks of different names are independent.
        shared: whether other shared holders are allowed.
        wait: whether to wait for the present holder; otherwise it is an error.
        where: key of the command line that names the folder, for the message.
        doing: what the other process is doing, for the message; None = working in the folder.
        instead: what can be done instead of waiting for it; None = choosing another folder.

    Raises:
        UserError: if another process holds it.
        OSError: if no file can be made in the folder.
    """
    doing = doing or f"working in {folder}"
    instead = instead or f"choose another folder with {where}=DIR"
    refusal = UserError(f"{where}: another process is {doing}; wait for it, or {instead}")
    with (folder / name).open("a") as file:
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, mode if wait else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal from None
        except OSError as error:
            if error.errno not in WITHOUT_FLOCK:
                raise
            with _locked_by_file(folder, name, shared=shared, wait=wait, refusal=refusal):
                yield
            return
        yield


# ---------------------------------------------------------------------------------- without flock


@contextmanager
def _locked_by_file(
    folder: Path, name: str, *, shared: bool, wait: bool, refusal: UserError
) -> Iterator[None]:
    """Lock by files. A process first makes its file and then looks for others, so two never win."""
    alone = folder / f"{name}.exclusive"
    own = folder / f"{name}.shared.{next(_numbers)}.{_holder()}" if shared else alone
    while not _taken(folder, name, own, alone):
        if not wait:
            raise refusal
        time.sleep(0.2)
    done = threading.Event()
    threading.Thread(target=_touch, args=(own, done), name="lock", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        own.unlink(missing_ok=True)


def _taken(folder: Path, name: str, own: Path, alone: Path) -> bool:
    """Try to take the lock, and tell whether this process holds it; if not, it leaves no file."""
    try:
        descriptor = os.open(own, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        _remove_if_stale(own)
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(_holder())

    # Give way to any living holder that excludes this one.
    others = [alone] if own != alone else sorted(folder.glob(f"{name}.shared.*"))
    if not any(_is_held(other) for other in others):
        return True
    own.unlink(missing_ok=True)
    for other in others:
        _remove_if_stale(other)
    return False


def _holder() -> str:
    """Name this process by host, number and start, since a later process may have its number."""
    return f"{socket.gethostname()}-{os.getpid()}-{_started(os.getpid())}"


def _started(process: int) -> str:
    """Return when a process of this host began, in the kernel's ticks; "" if that is unknown."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_held(file: Path) -> bool:
    """Tell whether the holder that a file names still exists."""
    try:
        age = time.time() - file.stat().st_mtime
        holder = file.read_text().rsplit("-", 2)
    except FileNotFoundError:
        return False

    # A file without a complete name is being written, or was cut by a full disk.
    if len(holder) != 3 or holder[0] != socket.gethostname():
        return age < STALE

    process = int(holder[1])
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        return True
    return _started(process) == holder[2]


def _remove_if_stale(file: Path) -> None:
    """Remove the file of a holder that is gone.

    By now another process may have done so and taken the lock. Its file is then put back.
    """
    if _is_held(file):
        return

    aside = file.with_name(f".{file.name}.{_holder()}.stale")
    with contextlib.suppress(OSError):
        file.rename(aside)
        if _is_held(aside):
            os.link(aside, file)
        aside.unlink()


def _touch(file: Path, done: threading.Event) -> None:
    """Keep a holder's file recent, for other hosts to see."""
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(file)
