"""The S3 protocol for tests: moto's server in its own process, behind a gate that causes faults."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

KEY_ID, SECRET = "planted-key-id", "planted-secret-0123456789"
"""Credentials that no file of a run, log or message may show."""

SERVER = """
import os, sys, threading
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
app = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
print(server.port, flush=True)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
server.serve_forever()
"""
"""The server ends when its standard input is closed: however a test ends, it leaves no server."""

ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
ANSWERS = {
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "500": (500, "InternalError", "We encountered an internal error."),
    "403": (403, "AccessDenied", "Access Denied"),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}
"""A fault's status, and S3's code and message for it."""


@contextmanager
def moto_server() -> Iterator[int]:
    """The port of a server that keeps buckets in its memory."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    # The server prints its port when it listens, and ends with its standard input.
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@dataclass
class Fault:
    """Trouble for the next `count` requests whose line contains `text`."""

    kind: str
    """One of `ANSWERS`, or reset: close the connection; cut: close it in the middle of the answer;
    hang: never answer."""
    text: str = ""
    count: int = 1


@dataclass
class Asked:
    """A request, and the number of bytes of its answer."""

    line: str
    bytes: int


@dataclass
class Gate:
    """Stands between a client and the server, notes each request, and causes faults."""

    port: int = 0
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault_for(self, line: str) -> str:
        """Use up the first fault that meets this request, and return its kind; "" without one."""
        for fault in self.faults:
            if fault.count and fault.text in line:
                fault.count -= 1
                return fault.kind
        return ""

    def count(self, text: str) -> int:
        """Number of requests whose line contains the text."""
        return sum(text in asked.line for asked in self.asked)


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """Run a server in a thread of this process, and give its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """HTTP 1.1, without a log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(
        self, status: int, content: bytes, headers: Any = (), sent: int | None = None
    ) -> None:
        """Send an answer; with `sent`, only that many of its bytes."""
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])


@contextmanager
def gate_to(server: int) -> Iterator[Gate]:
    """Put a gate in front of the server at this port."""
    gate = Gate()

    class Through(Handler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            line = f"{self.command} {self.path} {self.headers.get('Range', '')}".strip()
            asked = Asked(line, 0)
            gate.asked.append(asked)

            # Of these requests the server never hears.
            kind = gate.fault_for(line)
            if kind in ("reset", "hang"):
                if kind == "hang":
                    gate.closed.wait()
                self.close_connection = True
                return
            if kind in ANSWERS:
                status, code, message = ANSWERS[kind]
                content = ERROR.format(code=code, message=message).encode()
                self.answer(status, content, [("Content-Type", "application/xml")])
                return

            # Anything else goes to the server, and its answer back, whole or cut off in the middle.
            connection = http.client.HTTPConnection("127.0.0.1", server)
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            response = connection.getresponse()
            content = response.read()

            asked.bytes = len(content)
            left_out = ("connection", "transfer-encoding", "server", "date")
            headers = []
            for name, value in response.getheaders():
                if name.lower() not in left_out:
                    headers.append((name, value))

            # An answer to HEAD has no content, but the length of what GET would return.
            if self.command == "HEAD":
                self.send_response(response.status)
                for name, value in headers:
                    self.send_header(name, value)
                self.end_headers()
            else:
                headers = [each for each in headers if each[0].lower() != "content-length"]
                sent = len(content) // 2 if kind == "cut" else None
                self.answer(response.status, content, headers, sent)
                self.close_connection = self.close_connection or kind == "cut"
            connection.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    with served(Through) as gate.port:
        try:
            yield gate
        finally:
            gate.closed.set()


@contextmanager
def surroundings(gate: Gate, folder: Path, *, tries: int = 1) -> Iterator[None]:
    """The environment of a user whose S3 is behind the gate, without this machine's own settings.

    Args:
        tries: how often s3fs itself tries a request, waiting in between; by default it is 5 times.
    """
    import fsspec.config
    from s3fs import S3FileSystem

    # No settings and no other credentials of this machine are seen.
    environment = {
        "AWS_ENDPOINT_URL": gate.address,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(folder / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
    }

    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_CA_BUNDLE"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)

        # s3fs keeps its clients: earlier ones must not be used here, nor these ones later.
        patch.setattr(fsspec.config, "conf", {})
        patch.setattr(S3FileSystem, "retries", tries)
        S3FileSystem.clear_instance_cache()
        try:
            yield
        finally:
            S3FileSystem.clear_instance_cache()


def upload(folder: Path, address: str) -> None:
    """Copy a folder's files into a bucket, which is made if it does not exist."""
    import s3fs

    system = s3fs.S3FileSystem(use_listings_cache=False)
    bucket = address.removeprefix("s3://").partition("/")[0]
    if not system.exists(bucket):
        system.mkdir(bucket)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            system.pipe_file(f"{address}/{file.relative_to(folder).as_posix()}", file.read_bytes())
