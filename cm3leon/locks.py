"""One process at a time in a folder that commands write into.

The lock is the system's (`flock`), which goes with the process however it ends. A file system may offer none (NFS
without its lock daemon, some FUSE and cluster file systems). There the lock is a file that names its holder:

    .lock.exclusive                  host, process and start of the one that holds the folder alone
    .lock.shared.NUMBER.HOST-...     one for each that shares it

Each holder touches its file every `BEAT` seconds. A file counts as left behind if its process is gone from this host,
or if another host has not touched it for `STALE` seconds.
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
"""What a file system that has no locks answers."""
BEAT, STALE = 20.0, 180.0
"""Seconds; a holder of another host is given longer than files' times may be cached by NFS."""
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
) -> Iterator[None]:
    """Hold a folder alone, or together with any number of other `shared` holders; the lock goes with the process.

    Args:
        folder: it must exist.
        name: of the lock's file; locks of other names are other locks.
        wait: wait for the holder instead of refusing.
        where: the key of the command line that names the folder, for the message.

    Raises:
        UserError: if another process holds it.
        OSError: if no file can be made in the folder.
    """
    refusal = UserError(
        f"{where}: another process is working in {folder}; wait for it, or choose another {where}="
    )
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


# ------------------------------------------------------------------------------------------------ without flock


@contextmanager
def _locked_by_file(
    folder: Path, name: str, *, shared: bool, wait: bool, refusal: UserError
) -> Iterator[None]:
    """The same by files. Whoever wants the lock first makes its file, then looks for others: two never both go on."""
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
    """Whether this process now holds the lock; if not, it has left no file."""
    try:
        descriptor = os.open(own, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        _remove_if_stale(own)
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(_holder())
    others = [alone] if own != alone else sorted(folder.glob(f"{name}.shared.*"))
    if not any(_is_held(other) for other in others):
        return True
    own.unlink(missing_ok=True)
    for other in others:
        _remove_if_stale(other)
    return False


def _holder() -> str:
    """This process, also told apart from a later one of the same number."""
    return f"{socket.gethostname()}-{os.getpid()}-{_started(os.getpid())}"


def _started(process: int) -> str:
    """When a process of this host began, in the kernel's ticks; empty where that is not known."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_held(file: Path) -> bool:
    """Whether the holder that a file names is still there."""
    try:
        age = time.time() - file.stat().st_mtime
        holder = file.read_text().rsplit("-", 2)
    except FileNotFoundError:
        return False
    # A file without a whole name is being written, or was cut by a full disk.
    if len(holder) != 3 or holder[0] != socket.gethostname():
        return age < STALE
    process = int(holder[1])
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, as another user
        return True
    return _started(process) == holder[2]


def _remove_if_stale(file: Path) -> None:
    """Take away the file of a holder that is gone, unless another process has done so and holds the lock by now."""
    if _is_held(file):
        return
    aside = file.with_name(f".{file.name}.{_holder()}.stale")
    with contextlib.suppress(OSError):
        file.rename(aside)
        if _is_held(aside):
            os.link(aside, file)
        aside.unlink()


def _touch(file: Path, done: threading.Event) -> None:
    """Keep the time of a holder's file new, for other hosts."""
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(file)
