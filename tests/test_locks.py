"""One process at a time works in a folder, also on a file system that has no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cm3leon import locks
from cm3leon.locks import locked
from cm3leon.types import UserError

HOLD = """
import sys, time
from pathlib import Path
from tests_locks_refuse import refuse
from cm3leon.locks import locked
refuse(int(sys.argv[2]))
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
REFUSE = """
import fcntl, os
def refuse(number):
    def flock(*args):
        raise OSError(number, os.strerror(number))
    if number:
        fcntl.flock = flock
"""


@pytest.fixture(params=[0, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def refused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Error number with which the file system refuses flock; 0 where it has locks."""

    def flock(*_: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


def left(folder: Path) -> list[str]:
    """Names of the files that stand for locks."""
    return [file.name for file in folder.iterdir() if file.name != ".lock"]


@pytest.mark.usefixtures("refused")
def test_a_folder_has_one_holder_or_several_that_share_it(tmp_path: Path) -> None:
    folder = re.escape(str(tmp_path))
    refusal = f"^out: another process is working in {folder}; .* another folder with out=DIR$"
    with locked(tmp_path):
        for shared in (False, True):
            with (
                pytest.raises(UserError, match=refusal),
                locked(tmp_path, shared=shared, where="out"),
            ):
                pass

        # What is held may be a file in the folder, or the folder another one's.
        busy = "^out: another process is writing to a; wait for it, or choose another file$"
        with (
            pytest.raises(UserError, match=busy),
            locked(tmp_path, where="out", doing="writing to a", instead="choose another file"),
        ):
            pass

        # A lock of another name in the folder does not matter.
        with locked(tmp_path, ".other"):
            pass

    # Two that share it keep a third out who wants it alone.
    with (
        locked(tmp_path, shared=True),
        locked(tmp_path, shared=True),
        pytest.raises(UserError, match=refusal),
        locked(tmp_path, where="out"),
    ):
        pass

    # Nothing is held any more.
    with locked(tmp_path):
        pass
    assert left(tmp_path) == [".other"]


@pytest.mark.usefixtures("refused")
def test_who_waits_has_the_lock_after_its_holder(tmp_path: Path) -> None:
    order = []

    def wait() -> None:
        with locked(tmp_path, wait=True):
            order.append("second")

    with locked(tmp_path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_the_lock_goes_with_a_killed_process(tmp_path: Path, refused: int) -> None:
    (tmp_path / "tests_locks_refuse.py").write_text(REFUSE)
    held = tmp_path / "held"
    held.mkdir()
    paths = os.pathsep.join([str(tmp_path), str(Path(locks.__file__).parents[1])])

    # Another process that holds the lock, on a file system that answers in the same way.
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(held), str(refused)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process"), locked(held):
            pass
    finally:
        process.kill()
        process.communicate()

    with locked(held, wait=True):
        pass
    assert left(held) == []


@pytest.fixture
def unlockable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, where a file stands for one."""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("unlockable")
def test_a_lock_of_another_host_counts_while_it_is_touched(tmp_path: Path) -> None:
    other = tmp_path / ".lock.exclusive"
    other.write_text("elsewhere-17-4711")
    with pytest.raises(UserError, match="another process"), locked(tmp_path):
        pass

    past = time.time() - locks.STALE
    os.utime(other, (past, past))
    with locked(tmp_path, wait=True):
        assert other.read_text() == locks._holder()


@pytest.mark.usefixtures("unlockable")
def test_a_process_that_has_the_number_of_a_dead_holder_is_not_the_holder(tmp_path: Path) -> None:
    (tmp_path / ".lock.exclusive").write_text(f"{socket.gethostname()}-{os.getpid()}-1")
    with locked(tmp_path, wait=True):
        pass


@pytest.mark.usefixtures("unlockable")
def test_a_holder_touches_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.01)
    file = tmp_path / ".lock.exclusive"
    with locked(tmp_path):
        os.utime(file, (0, 0))
        limit = time.monotonic() + 10
        while file.stat().st_mtime == 0:
            assert time.monotonic() < limit
            time.sleep(0.01)


def test_what_the_file_system_says_besides_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass
