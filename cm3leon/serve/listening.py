"""A server, or a page, at its port, until a signal stops it."""

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
    """What answers at a port."""

    app: Any
    stopping: bool
    """Whether new requests are refused."""

    def described(self) -> str:
        """What is served, in a line."""

    def close(self, timeout: float) -> None:
        """Finishes what was accepted, in so many seconds, and ends all threads."""


class _Uvicorn(uvicorn.Server):
    """Ends by signals, without raising them once more when it has ended."""

    def __init__(self, config: uvicorn.Config, server: Listening, grace: int) -> None:
        super().__init__(config)
        self._server, self._grace = server, grace
        self._deadline: float | None = None

    @property
    def seconds_left(self) -> float:
        """Of the grace, when the connections have ended; none after a second Ctrl-C."""
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
            print("stopping: what was accepted is finished first", flush=True)
        self._server.stopping = True
        super().handle_exit(sig, frame)


def listen(server: Listening, *, host: str, port: int, grace: int, path: str = "") -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what was accepted.

    Args:
        port: 0 = any that is free.
        grace: seconds that it may take.
        path: at which it is found, behind host and port.

    Raises:
        UserError: for an address that cannot be listened at.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"host={host} port={port} cannot be listened at: {error.strerror or error}; take another port, or 0 for "
            "any that is free"
        ) from error
    with listener:
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {server.described()}", flush=True)
        print(f"http://{shown}:{listener.getsockname()[1]}{path} (Ctrl-C ends it)", flush=True)
        inner = uvicorn_of(server, grace)
        inner.run(sockets=[listener])
    server.close(inner.seconds_left)


def uvicorn_of(server: Listening, grace: int) -> _Uvicorn:
    """What answers at a socket; `should_exit` ends it."""
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=grace,
        timeout_keep_alive=30,
    )
    return _Uvicorn(config, server, grace)
