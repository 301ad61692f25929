"""Server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from cm3leon.serve.errors import Refusal, refusal_of

LOG = logging.getLogger(__name__)
ALIVE = b": alive\n\n"
"""A comment, which clients ignore."""
DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """An event as bytes, under the given name or its own type if it has one."""
    name = name or data.get("type")
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


async def with_errors(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events of a stream; an error becomes the last one, as the status has been sent by
    then."""
    try:
        async for each in stream:
            yield each
    except Exception as error:
        refusal = refusal_of(error)
        if refusal is None:
            LOG.exception("a stream failed")
            refusal = Refusal(500, "the server failed; its log says why")
        yield event(refusal.body(), "error")
    yield DONE
