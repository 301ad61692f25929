"""Remote files: passing troubles are waited out, and all others become a sentence for the user.

    throttling (503 SlowDown), a server's fault,         asked again, from the byte that was reached
    a lost connection
    no credentials, a forbidden bucket, a server         UserError, which ends the run
    that stays away
    a file that does not exist                           FileNotFoundError, as on a disk

File systems of fsspec pass on the errors of the libraries that they are built on; these are told
apart here.
"""

from __future__ import annotations

import errno
import io
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, TypeVar

import fsspec.config
from fsspec.core import url_to_fs

from cm3leon.secrets import masked
from cm3leon.types import UserError

T = TypeVar("T")

TRIES = 6
"""How often something is tried before the trouble counts as lasting."""
FIRST_WAIT = 1.0
"""Seconds before the second try; each further wait is twice as long, so 31 seconds in all."""
BLOCK_BYTES = 8 * 2**20
"""Bytes of one request. A file that is read from front to back holds at most twice as many."""

CHECKSUMS = ("ETag", "etag", "checksum", "md5Hash", "content_md5", "blob_id", "CRC")
"""Keys under which file systems of fsspec keep a value that changes exactly when the content of a
file changes."""

_LIBRARIES = frozenset(
    (
        "aiobotocore",
        "aiohttp",
        "botocore",
        "fsspec",
        "gcsfs",
        "httpcore",
        "httpcore2",
        "httpx",
        "httpx2",
        "huggingface_hub",
        "requests",
        "s3fs",
        "urllib3",
    )
)
"""Packages whose errors are those of a network or of a server."""
_PASSING_NUMBERS = (errno.EBUSY, errno.EREMOTEIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.EAGAIN)
"""The numbers that s3fs gives to 503 (SlowDown), 500 (InternalError) and the like."""
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
_PASSING_NAMES = frozenset(
    (
        *("HTTPClientError", "ResponseParserError", "IncompleteReadError"),  # botocore
        *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
        *("TransportError", "Timeout", "ChunkedEncodingError", "ProtocolError"),  # httpx, requests
        "RateLimitError",
    )
)
"""Classes of `_LIBRARIES` whose errors may be gone at the next try."""
_NO_CREDENTIALS = frozenset(("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"))
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)


# ----------------------------------------------------------------------------------- file systems


def file_system(path: str) -> tuple[Any, str]:
    """The file system of a path or address, and the path in it.

    S3 is asked anew for every listing. The retries of botocore are turned off. What is left are the
    five quick tries of s3fs (within 2 seconds; for throttling and lost connections alone), which
    each of the `TRIES` of `persistently` includes.

    Raises:
        ImportError, ValueError: for a file system that is unknown or not installed.
    """
    options = {}
    for protocol in ("s3", "s3a"):
        if f"{protocol}://" in path:
            given = fsspec.config.conf.get(protocol, {})
            own = {"retries": {"total_max_attempts": 1}}
            config = {**own, **given.get("config_kwargs", {})}
            options[protocol] = {"use_listings_cache": False, "config_kwargs": config}
    return url_to_fs(path, **options)


def kind_of(system: Any, whole: str) -> Literal["folder", "file", ""]:
    """What lies at a path of a file system; "" for nothing.

    Raises:
        FileNotFoundError: for a bucket that does not exist.
    """
    if "s3" not in system.protocol:
        if system.isdir(whole or "/"):
            return "folder"
        return "file" if system.exists(whole) else ""

    # S3 is asked about the path alone: to recognise a folder, s3fs would list all of it.
    try:
        is_folder = system.info(whole)["type"] == "directory"
    except FileNotFoundError:
        bucket = whole.partition("/")[0]
        try:
            system.info(bucket)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no bucket", bucket) from None
        return ""
    return "folder" if is_folder else "file"


def missing_path(path: str, where: str, error: FileNotFoundError | None = None) -> UserError:
    """The error for a path at which there is nothing."""
    what = "does not exist"
    if error is not None and error.strerror == "no bucket":
        what = f"does not exist: there is no bucket {error.filename}"
    return UserError(
        f"{where}: {path} {what}; give a file, a folder, or a glob such as DIR/**/*.tar"
    )


# ------------------------------------------------------------------------------------------ tries


def persistently(action: Callable[[], T]) -> T:
    """Return the action's result, trying again after a wait if the trouble may pass.

    Raises:
        Exception: the action's last error.
    """
    for attempt in range(TRIES):
        try:
            return action()
        except Exception as error:
            if attempt + 1 == TRIES or not is_passing(error):
                raise
            # Workers that were throttled together must not all come back at the same moment.
            time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.0))
    raise AssertionError("the last try either returns or raises")


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True

    # Libraries name the status of a response in one of two ways.
    status = getattr(error, "status", None)
    status = getattr(getattr(error, "response", None), "status_code", status)
    if isinstance(status, int):
        return status in _PASSING_STATUS
    if isinstance(error, OSError) and error.errno in _PASSING_NUMBERS:
        return True
    return any(cls.__name__ in _PASSING_NAMES for cls in _library_classes(error))


def _library_classes(error: BaseException) -> list[type]:
    """Those classes of an error that belong to a library that talks to servers."""
    return [cls for cls in type(error).__mro__ if cls.__module__.partition(".")[0] in _LIBRARIES]


def is_network_error(error: BaseException) -> bool:
    """Whether an error is about a connection, or comes from a library that talks to servers."""
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
        return True
    return bool(_library_classes(error))


# -------------------------------------------------------------------------------------- sentences


@contextmanager
def reaching(path: str, where: str, *, local: bool = False) -> Iterator[None]:
    """Turn errors inside the block into a sentence about a remote file, whatever library raised
    them.

    Args:
        where: the setting that holds the path, for the message.
        local: whether the path is on a disk, whose errors are passed on as they are.

    Raises:
        UserError: instead of an error of the network, a server or credentials, with its reason.
            Errors that say that a file does not exist are passed on.
    """
    try:
        yield
    except Exception as error:
        if local or isinstance(error, _ABSENT):
            raise
        if not isinstance(error, OSError) and not is_network_error(error):
            raise
        raise UserError(_sentence(path, where, error)) from error


def _sentence(path: str, where: str, error: Exception) -> str:
    """What happened, and what the user can do about it, without secrets."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OSError) and error.strerror:
        lines.insert(0, str(error.strerror))
    reason = type(error).__name__
    if lines:
        reason = lines[0]
    reason = masked(reason).rstrip(".")
    shown = masked(path)
    names = {cls.__name__ for cls in _library_classes(error)}

    # What the user can do depends on the cause: no credentials, no right, or no connection.
    if names & _NO_CREDENTIALS:
        return (
            f"{where}: {shown} cannot be opened without credentials ({reason}); set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for one of ~/.aws, or "
            "FSSPEC_S3_ANON=true for a public bucket"
        )
    if isinstance(error, PermissionError):
        return (
            f"{where}: {shown} is forbidden to these credentials ({reason}); they need the right "
            "to list and to read there, and to write where something is copied to; what is done "
            "already is kept"
        )
    return (
        f"{where}: {shown} cannot be reached ({reason}); see that this machine has a network and "
        "may read there, or name a local path; what is done already is kept"
    )


# ---------------------------------------------------------------------------------------- reading


def open_remote(system: Any, path: str, where: str) -> BinaryIO:
    """Open a file of a file system for reading in blocks; a block that fails is asked for again if
    that may help.

    Args:
        where: the setting that holds the path, for messages.
    """
    raw = _Persistent(system, path, where)
    return io.BufferedReader(raw, 64 * 2**10)


class _Persistent(io.RawIOBase):
    """A remote file that is opened again when its connection is lost, and read on from there.

    Its errors are UserErrors, because a reader of a format would take an OSError for a damaged
    file.
    """

    def __init__(self, system: Any, path: str, where: str) -> None:
        super().__init__()
        self._system, self._path, self._where = system, path, where
        self._at = 0
        self._file: Any = None
        with reaching(path, where):
            self._file = persistently(self._opened)
        self._version = self._version_of(self._file)

    def _opened(self) -> Any:
        return self._system.open(self._path, "rb", block_size=BLOCK_BYTES)

    def _version_of(self, file: Any) -> tuple[Any, ...]:
        """What changes when the file is replaced, as far as its file system says; the size comes
        first."""
        known = getattr(file, "details", None)
        if not isinstance(known, dict):
            known = {}
        return (getattr(file, "size", None), *(known.get(key) for key in CHECKSUMS))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with reaching(self._path, self._where):
            # In a file without blocks, such as one inside a zip, a seek reads, and so may fail.
            self._at = persistently(lambda: self._asked(lambda file: file.seek(offset, whence)))
        return self._at

    def readinto(self, buffer: Any) -> int:
        with reaching(self._path, self._where):
            content = persistently(lambda: self._asked(lambda file: self._read(file, len(buffer))))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def _read(self, file: Any, count: int) -> bytes:
        content: bytes = file.read(count)
        # A connection may also end without an error, before the end of the file.
        size = self._version[0]
        if count and not content and size is not None and self._at < size:
            raise ConnectionError(f"the file ended after {self._at} of {size} bytes")
        return content

    def _asked(self, action: Callable[[Any], T]) -> T:
        """Ask the open file; after trouble it is first opened anew, where the last read ended."""
        if self._file is None:
            file = self._opened()
            if self._version_of(file) != self._version:
                raise OSError(errno.ESTALE, "the file was replaced while it was read", self._path)
            file.seek(self._at)
            # Kept only now: a file at another position would give the next try wrong bytes.
            self._file = file
        try:
            return action(self._file)
        except Exception as error:
            if is_passing(error):
                self._file = None
            raise

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()
