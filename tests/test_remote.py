"""A missing network is one sentence wherever it fails: before, while listing, and within a file."""

from __future__ import annotations

import io
import socket
from typing import Any

import fsspec
import pytest
from command_line import cm3leon
from fsspec.implementations.memory import MemoryFileSystem

from cm3leon.data import remote
from cm3leon.data.files import Files
from cm3leon.data.remote import is_network_error
from cm3leon.types import UserError


class ClientConnectorError(OSError):
    """aiohttp raises this error, an OSError without a number."""


ClientConnectorError.__module__ = "aiohttp.client_exceptions"


class HTTPError(Exception):
    pass


HTTPError.__module__ = "httpx"

ERRORS = [
    ClientConnectorError("Cannot connect to host"),
    HTTPError("503 Service Unavailable\nfor url"),
    ConnectionResetError(104, "Connection reset by peer"),
    socket.gaierror(-2, "Name or service not known"),
    TimeoutError(),
]


class Broken(io.BytesIO):
    """A file whose connection is lost after its first bytes."""

    def __init__(self, error: Exception) -> None:
        super().__init__(b"a\tb\n" * 10)
        self._error, self._reads = error, 0

    def read(self, size: int | None = -1) -> bytes:
        self._reads += 1
        if self._reads > 1:
            raise self._error
        return super().read(2 if size is None or size < 0 else size)

    readline = read  # type: ignore[assignment]


class Remote(MemoryFileSystem):
    """A file system whose server is gone when it is asked for what `fails` names."""

    protocol = "gone"
    cachable = False
    fails, error, opened = "", OSError(), False

    def _fail(self, at: str) -> None:
        if self.fails == at:
            raise self.error

    def isdir(self, path: str) -> bool:
        self._fail("isdir")
        return True

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._fail("find")
        return {f"{path}/a.jsonl": {"type": "file", "size": 40}}

    def info(self, path: str, **kwargs: Any) -> Any:
        self._fail("info")
        return {"type": "file", "size": 40}

    def open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._fail("open")
        if self.fails == "read" and Remote.opened:
            raise self.error
        Remote.opened = True
        return Broken(self.error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("fails", ["isdir", "find", "open", "read"])
def test_a_server_that_is_gone_is_a_sentence(
    error: Exception, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("gone", Remote, clobber=True)
    monkeypatch.setattr(Remote, "fails", fails)
    monkeypatch.setattr(Remote, "error", error)
    monkeypatch.setattr(Remote, "opened", False)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)

    done = cm3leon("validate", "data.path=gone://corpus", check=False)
    assert done.returncode == 2
    assert "gone://corpus" in done.stderr or "/corpus" in done.stderr

    # The sentence tells the first line of the error, or its kind if it has no text.
    told = getattr(error, "strerror", None) or str(error)
    reason = told.partition("\n")[0] or type(error).__name__
    assert f"cannot be reached ({reason}); see that this machine has a network" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("cm3leon: data.path: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "no"), ValueError("x"), OSError(5, "Input/output error")]
)
def test_other_errors_are_not_the_network_s(error: Exception) -> None:
    assert not is_network_error(error)


class Shaky(io.BytesIO):
    """A file in which the next of the `failing` actions fails, whichever copy of it is asked."""

    def __init__(self, failing: list[str], tag: str) -> None:
        super().__init__(bytes(range(100)))
        self._failing = failing
        self.details = {"ETag": tag}

    def _fail(self, action: str) -> None:
        if self._failing[:1] == [action]:
            del self._failing[0]
            raise ConnectionResetError(104, "Connection reset by peer")

    def read(self, size: int | None = -1) -> bytes:
        self._fail("read")
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._fail("seek")
        return super().seek(offset, whence)


class Shakies:
    """A file system of one such file; each opening finds the next tag, and the last one stays."""

    def __init__(self, *tags: str) -> None:
        self.failing: list[str] = []
        self._tags = list(tags)

    def open(self, path: str, mode: str, **options: Any) -> Shaky:
        tag = self._tags.pop(0) if len(self._tags) > 1 else self._tags[0]
        return Shaky(self.failing, tag)


def test_a_seek_that_fails_after_a_lost_connection_gives_no_wrong_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    system = Shakies("a")
    raw = remote._Persistent(system, "there", "data.path")
    assert raw.read(40) == bytes(range(40))

    system.failing += ["read", "seek"]
    assert raw.read(20) == bytes(range(40, 60))
    assert not system.failing


def test_a_file_that_was_replaced_is_not_read_however_often_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    system = Shakies("a", "b")
    raw = remote._Persistent(system, "there", "data.path")

    system.failing.append("read")
    for _ in range(2):
        with pytest.raises(UserError, match="the file was replaced while it was read"):
            raw.read(20)


def test_a_file_system_that_is_not_installed_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    for path in ("s3://bucket/x.tar", "nosuch://x", "https://localhost/x.tar"):
        with pytest.raises(UserError, match=f"^data.path: {path} cannot be (opened|reached)"):
            Files(path)
