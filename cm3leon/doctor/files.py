"""Whether a file system does what this project relies on, by trying it.

io.py          a file is replaced by rename: readers see the old one or the new one, whole
locks.py       a lock keeps out a second process: flock, or files where there is none
checkpoints    a folder gets its name by rename, when all of its files are on the disk
sweeps         runs share finished stages by symbolic links
shards         large files are read through memory maps
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cm3leon.doctor.findings import Finding, good, warning, wrong
from cm3leon.io import sync_to_disk, write_text
from cm3leon.locks import WITHOUT_FLOCK, locked
from cm3leon.types import UserError

ANOTHER_DISK = "put run= on another file system: a local disk, NFS, Lustre or GPFS"
LITTLE, VERY_LITTLE = 50e9, 2e9
"""Free bytes below which there is a warning, and below which nothing can be done. For comparison,
the three checkpoints of a 350M model take 16 GB."""
REPLACEMENTS = 200
SPEED_BYTES = 2**26
SKEW = 30.0
"""Seconds between the clocks of this machine and of the file system; a lock's file is stale after
180."""

SECOND_PROCESS = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("refused")
"""


def look_at_files(folder: Path) -> Iterator[Finding]:
    """Check the file system of a folder, or of the nearest folder above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    yield _space(folder)

    # All checks write into a hidden folder beside the runs, which is removed at the end.
    checks = (
        _replaced,
        _renamed_folder,
        _synced,
        _locked,
        _linked,
        _symlinked,
        _mapped,
        _clock,
        _speed,
    )
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as hidden:
            for check in checks:
                yield _attempted(check, Path(hidden))
    except OSError as error:
        yield wrong(
            "files",
            f"nothing can be written in {folder} ({error.strerror})",
            "name a folder that is yours with folder=DIR",
        )


def _attempted(check: Callable[[Path], Finding], place: Path) -> Finding:
    """What a check finds, or the error that the system gave instead."""
    try:
        return check(place)
    except OSError as error:
        name = check.__name__.strip("_").replace("_", " ")
        return wrong(f"files, {name}", f"refused ({error.strerror or error})", ANOTHER_DISK)


def _space(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:,.0f} GB free in {folder}"
    advice = "make room, or name another folder with folder=DIR; `plan` says what a training takes"
    if free < VERY_LITTLE:
        return wrong("disk", text, advice)
    if free < LITTLE:
        return warning("disk", text, advice)
    return good("disk", text)


def _replaced(place: Path) -> Finding:
    """A reader sees the old file or the new one, never half of either, while it is replaced."""
    path, content = place / "replaced", "whole " * 2000
    write_text(path, content)
    done, faults = threading.Event(), 0

    # One thread replaces the file, again and again; this one reads it all the while.
    def replace() -> None:
        for _ in range(REPLACEMENTS):
            write_text(path, content)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    while not done.is_set() and writer.is_alive():
        try:
            faults += path.read_text() != content
        except FileNotFoundError:
            faults += 1
    writer.join()

    if not done.is_set():
        return wrong("files, replaced", "a file cannot be replaced by rename", ANOTHER_DISK)
    if faults:
        text = f"a file was missing or cut {faults} times while it was replaced by rename"
        return wrong("files, replaced", text, ANOTHER_DISK)
    return good("files, replaced", f"a file stays whole while it is replaced {REPLACEMENTS} times")


def _renamed_folder(place: Path) -> Finding:
    """A checkpoint's folder gets its name by rename, and loses the old one."""
    partial, final = place / ".partial_1", place / "step_1"
    partial.mkdir()
    (partial / "file").write_text("x")
    partial.rename(final)
    if partial.exists() or (final / "file").read_text() != "x":
        return wrong("files, renamed folder", "a renamed folder keeps its old name", ANOTHER_DISK)
    return good("files, renamed folder", "a folder is renamed in one step")


def _synced(place: Path) -> Finding:
    """Content and names can be forced to the disk, as a checkpoint does before it counts."""
    path = place / "synced"
    path.write_text("x")
    sync_to_disk(path)
    sync_to_disk(place)
    return good("files, synced", "files and names of a folder are synced to the disk (fsync)")


def _locked(place: Path) -> Finding:
    """A second process is refused the lock of the first.

    Whether other hosts see the lock cannot be checked from one host.
    """
    with locked(place):
        done = subprocess.run(
            [sys.executable, "-c", SECOND_PROCESS, str(place / ".lock")],
            capture_output=True,
            text=True,
            check=False,
        )
        if "refused" in done.stdout:
            return good("files, locked", "a second process is refused a lock (flock)")

        # Some file systems have no flock at all; `locked` has then used a file instead.
        if any(f"[Errno {number}]" in done.stderr for number in WITHOUT_FLOCK):
            return _locked_by_files(place)
    return wrong(
        "files, locked", "two processes get the same lock (flock) at the same time", ANOTHER_DISK
    )


def _locked_by_files(place: Path) -> Finding:
    """Without flock, by files: this process holds the folder, and must be refused it a second
    time."""
    try:
        with locked(place):
            pass
    except UserError:
        return warning(
            "files, locked",
            "there is no flock; files that name their process serve as locks instead",
            "other hosts get the lock of a killed run only after 3 minutes; mount with flock if you "
            "can",
        )
    return wrong("files, locked", "there is no flock, and files do not lock either", ANOTHER_DISK)


def _linked(place: Path) -> Finding:
    """Hard links exist: by one, a lock's file that was taken away by mistake is put back."""
    path = place / "linked"
    path.write_text("x")
    try:
        os.link(path, place / "link")
    except OSError as error:
        return warning(
            "files, linked",
            f"there are no hard links ({error.strerror})",
            "fine with flock; without it, start one command at a time in a run folder",
        )
    return good("files, linked", "hard links are made")


def _symlinked(place: Path) -> Finding:
    """Symbolic links exist: by them, the runs of a sweep share stages."""
    (place / "symlinked").write_text("x")
    (place / "symlink").symlink_to("symlinked")
    assert (place / "symlink").read_text() == "x"
    return good("files, symlinked", "symbolic links are made")


def _mapped(place: Path) -> Finding:
    """Files can be memory-mapped, as tokens, vectors and the index are."""
    path = place / "mapped"
    path.write_bytes(b"x" * mmap.PAGESIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[0] == ord("x")
    return good("files, mapped", "files are read through a memory map")


def _clock(place: Path) -> Finding:
    """The file system's clock is near this machine's: locks without flock compare the two."""
    path = place / "clock"
    path.write_text("x")
    apart = path.stat().st_mtime - time.time()
    if abs(apart) > SKEW:
        return warning(
            "files, clock",
            f"the file system's clock is {apart:+.0f} s from this machine's",
            "set both by NTP: locks without flock go by the times of files",
        )
    return good("files, clock", "the file system's clock is this machine's")


def _speed(place: Path) -> Finding:
    """How fast a checkpoint can be written at most; this is printed, not judged."""
    path, block = place / "speed", os.urandom(2**20)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(SPEED_BYTES // len(block)):
            file.write(block)
    sync_to_disk(path)
    rate = SPEED_BYTES / (time.perf_counter() - start)
    return good("files, speed", f"{rate / 1e6:,.0f} MB/s written and synced by one process")
