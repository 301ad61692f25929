"""Listening at a port with a server or a page, until a signal stops it."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import uvicorn

from cm3leon.training.signals import SIGNALS
from cm3leon.types import UserError


class Listening(Protocol):
    """An application that answers at a port: the server, or the page of the demo."""

    app: Any
    stopping: bool
    """Whether new requests are refused."""

    def described(self) -> str:
        """What is served, in a line."""

    def close(self, timeout: float) -> None:
        """Finish accepted requests within so many seconds, and end all threads."""


class _Uvicorn(uvicorn.Server):
    """A server that ends by signals, without raising them again afterwards as uvicorn does."""

    def __init__(self, config: uvicorn.Config, server: Listening, grace: int) -> None:
        super().__init__(config)
        self._server, self._grace = server, grace
        self._deadline: float | None = None

    @property
    def seconds_left(self) -> float:
        """Seconds of the grace that are left after the connections ended; 0 after a second
        Ctrl-C."""
        if self.force_exit:
            return 0
        if self._deadline is None:
            return self._grace
        return max(self._deadline - time.monotonic(), 0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._deadline = time.monotonic() + self._grace
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, *SIGNALS)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._server.stopping:
            print("stopping: accepted requests are finished first", flush=True)
        self._server.stopping = True
        super().handle_exit(sig, frame)


def listen(server: Listening, *, host: str, port: int, grace: int, path: str = "") -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what was accepted.

    Args:
        port: 0 = any that is free.
        grace: seconds in which accepted requests can finish.
        path: where it is found behind host and port, for the printed address.

    Raises:
        UserError: for an address that cannot be listened at.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"the server cannot listen at host={host} port={port}: {error.strerror or error}; take "
            "another port, or port=0 for any that is free"
        ) from error

    # The port is open before the address is printed, so that whoever reads it can connect.
    with listener:
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {server.described()}", flush=True)
        print(
            f"http://{shown}:{listener.getsockname()[1]}{path} (Ctrl-C stops the server)",
            flush=True,
        )
        inner = uvicorn_of(server, grace)
        inner.run(sockets=[listener])
    server.close(inner.seconds_left)


def uvicorn_of(server: Listening, grace: int) -> _Uvicorn:
    """The application in a uvicorn server, which `should_exit` ends."""
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=grace,
        timeout_keep_alive=30,
    )
    return _Uvicorn(config, server, grace)
