"""Errors of the network, as a sentence: file systems of fsspec pass on those of the libraries that they are made of."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from cm3leon.types import UserError

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


@contextmanager
def reaching(path: str, where: str) -> Iterator[None]:
    """Say that a remote file could not be had, whatever library was asked for it.

    Args:
        where: the setting that holds the path, for the message.

    Raises:
        UserError: in place of an error of the network, with its reason.
    """
    try:
        yield
    except Exception as error:
        if not is_network_error(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"{where}: {path} cannot be reached ({reason}); see that this machine has a network and may read "
            "there, or name a local path; what is done already is kept"
        ) from error


def is_network_error(error: BaseException) -> bool:
    """Whether an error is one of a connection, or comes from a library that talks to servers."""
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
        return True
    return any(cls.__module__.partition(".")[0] in _LIBRARIES for cls in type(error).__mro__)
