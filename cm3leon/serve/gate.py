"""What every request passes before it is read: who may ask, from where, and how much they may
send."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cm3leon.io import digest_of
from cm3leon.serve.errors import Refusal
from cm3leon.types import UserError

LOG = logging.getLogger(__name__)
KEY_VARIABLE = "CM3LEON_API_KEY"
LOCAL = ("127.0.0.1", "::1", "localhost")
"""Hosts that only this machine reaches."""
BODY_SECONDS = 60
"""Time that a client may take to send its request."""

BODIES = 16
"""How many requests of the largest size may be held in memory at a time, of all clients."""
DRAIN_SECONDS = 2
"""Seconds for which the rest of a refused request is read."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def read_key(file: Path | None) -> str | None:
    """The API key from a file, else from the environment; None if there is none.

    Raises:
        UserError: for a file that cannot be read, or an empty key.
    """
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
        where = KEY_VARIABLE
    else:
        where = f"key_file: {file}"
        try:
            key = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read: {error}") from error
    if key is not None and not key.strip():
        raise UserError(f"{where} is empty; it must hold the API key")
    return None if key is None else key.strip()


def key_to_listen(host: str, file: Path | None, word: str) -> str | None:
    """The key that clients of an address must send, as `read_key` finds it.

    Args:
        word: what users call the key, for messages.

    Raises:
        UserError: as `read_key`, and without a key for an address that other machines reach.
    """
    key = read_key(file)
    if key is None and host not in LOCAL:
        raise UserError(
            f"host is {host}, which other machines can reach, but no {word} is set; set "
            f"{KEY_VARIABLE}, give key_file=FILE, or take host=127.0.0.1"
        )
    return key


class Gate:
    """An ASGI application in front of another one.

    Args:
        key: what requests must bring; None = no key, and then only programs of this machine and
            pages of this server may ask.
        body_bytes: the most bytes of a request, however it is sent.
        open_paths: paths that are answered without a key.
    """

    def __init__(
        self,
        app: Callable[[Message, Receive, Send], Awaitable[None]],
        *,
        key: str | None,
        body_bytes: int,
        open_paths: tuple[str, ...] = (),
    ) -> None:
        self._app, self._body_bytes, self._open_paths = app, body_bytes, open_paths
        self._digest = None if key is None else digest_of(key)
        self._held = _Held(BODIES * body_bytes)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, dict(scope["headers"]), self._body_bytes, self._held)
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            if body.whole:
                await send(message)
                return

            # An answer before the whole request has come: closing the connection with unread bytes
            # would lose the answer too, so that some of the rest is read first.
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                await send({**message, "headers": headers})
            elif message.get("more_body", False):
                await send(message)
            else:
                await send({**message, "more_body": True})
                await body.drain()
                await send({"type": "http.response.body", "body": b""})

        # What the gate and the application refuse is answered here, before anything was sent.
        try:
            self._check(scope)
            await self._app(scope, body.receive, sending)
        except Refusal as refusal:
            await _answer(sending, refusal)
        except Exception:
            # The client gets a sentence, the log gets the traceback.
            LOG.exception("a request failed")
            if not begun:
                await _answer(sending, Refusal(500, "the server failed; its log says why"))
        finally:
            body.release()

    def _check(self, scope: Message) -> None:
        """Raise Refusal if the client may not ask, or announces too much."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] not in self._open_paths:
            self._check_asker(headers)
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refusal(415, "the request is compressed; send it as it is")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._body_bytes:
            raise _too_large(self._body_bytes)

    def _check_asker(self, headers: dict[bytes, bytes]) -> None:
        """Raise Refusal for a wrong key or, without a key, for a request from elsewhere."""
        # Digests are compared, in constant time: nothing of the key can be learned from the time.
        if self._digest is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(
                digest_of(given.strip()), self._digest
            ):
                sentence = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
                raise Refusal(401, sentence)
            return

        # Any page in this machine's browser could ask a server without a key, by this machine's
        # address or by a name that someone points at it.
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin")
        try:
            name = urlsplit(f"//{host}").hostname
            foreign = origin is not None and urlsplit(origin.decode("latin-1")).netloc != host
        except ValueError:
            raise Refusal(400, "the header Host or Origin names no address") from None
        if name not in LOCAL or foreign:
            raise Refusal(
                403,
                f"without an API key only programs of this machine may ask, at {LOCAL[0]} or "
                f"{LOCAL[2]}; set {KEY_VARIABLE} where the server is started",
            )


@dataclass
class _Held:
    """The bytes of all requests that are not answered yet."""

    limit: int
    bytes: int = 0


class _Body:
    """A request's body as it comes in, limited in bytes and in time."""

    def __init__(
        self, receive: Receive, headers: dict[bytes, bytes], limit: int, held: _Held
    ) -> None:
        self._receive, self._limit, self._received = receive, limit, 0
        self._held, self._own = held, 0
        self._end = time.monotonic() + BODY_SECONDS
        has_none = headers.get(b"content-length", b"0") == b"0"
        self.whole = has_none and b"transfer-encoding" not in headers
        """Whether all of it has come."""

    async def receive(self) -> Message:
        """The next message. Raises Refusal if the body is too large or takes too long."""
        if self.whole:
            return await self._receive()
        before = self._received
        message = await self._next(self._end)
        if self._received > self._limit:
            raise _too_large(self._limit)
        self._own += self._received - before
        self._held.bytes += self._received - before
        if self._held.bytes > self._held.limit:
            raise Refusal(429, "the server holds as many requests as it can; try again", retry=5)
        return message

    def release(self) -> None:
        """Give back the bytes, when the request is answered."""
        self._held.bytes -= self._own
        self._own = 0

    async def drain(self) -> None:
        """Read the rest of the body, if it is short and comes soon."""
        end, most = time.monotonic() + DRAIN_SECONDS, self._received + 2 * self._limit
        with suppress(Refusal):
            while not self.whole and self._received < most:
                if (await self._next(end))["type"] == "http.disconnect":
                    return

    async def _next(self, end: float) -> Message:
        try:
            message = await asyncio.wait_for(self._receive(), max(end - time.monotonic(), 0))
        except TimeoutError:
            sentence = f"the request was not sent whole within {BODY_SECONDS} seconds"
            raise Refusal(408, sentence) from None
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
        return message


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the request is too large; it may have {limit} bytes")


async def _answer(send: Send, refusal: Refusal) -> None:
    content = json.dumps(refusal.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        **refusal.headers,
    }
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})
