"""Refusals in OpenAI's form: a status, and JSON with a sentence."""

from __future__ import annotations

from typing import Any

import torch
from starlette.requests import ClientDisconnect

from cm3leon.serve.engine import Busy, Cancelled, Stopped
from cm3leon.types import NotFinite, UserError, sentences_of

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "server_error",
    503: "server_error",
}
"""OpenAI's names of errors, by their status."""


class Refusal(Exception):
    """A request that is not answered.

    Args:
        param: the field of the request that is wrong.
        retry: seconds after which the client may try again.
    """

    def __init__(
        self, status: int, sentence: str, *, param: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(sentence)
        self.status, self.param = status, param
        self.headers = {} if retry is None else {"retry-after": str(retry)}
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's JSON."""
        kind = KINDS.get(self.status, "server_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": None}
        return {"error": error}


def refusal_of(error: BaseException) -> Refusal | None:
    """The refusal for an error; None for a bug of ours."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ClientDisconnect):
        return Refusal(499, "the client has gone")

    # The server cannot answer now, but may do so later.
    if isinstance(error, Busy):
        return Refusal(429, str(error), retry=error.seconds)
    if isinstance(error, Stopped):
        return Refusal(503, str(error), retry=5)
    if isinstance(error, Cancelled):
        return Refusal(503, str(error), retry=5)

    # The request asks for something that it cannot have.
    if isinstance(error, NotFinite):
        return Refusal(400, str(error))
    if isinstance(error, UserError):
        return Refusal(400, "; ".join(sentences_of(error)))
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        sentence = "this request takes more memory than the server has; ask for less"
        return Refusal(503, sentence, retry=30)
    return None
