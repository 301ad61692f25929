"""OpenAI's endpoints, answered by a service.

The fields of requests are in `asked.py`; the answers are made in `drawing.py` and `chat.py`. A POST
request goes through these steps:

    Gate         key, origin and size
    _counted     counted, timed, refused while the server is stopping
    _asked       its JSON read and checked against the limits
    _answer      handed to a thread by the desk; answered whole, or event by event
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from cm3leon.serve import chat, drawing
from cm3leon.serve.asked import (
    Asked,
    ChatAsked,
    EditAsked,
    GenerationAsked,
    RetrieveAsked,
    file_of,
    form_values,
    read_asked,
    read_json_body,
)
from cm3leon.serve.desk import Desk, Told
from cm3leon.serve.errors import Refusal, refusal_of
from cm3leon.serve.gate import Gate
from cm3leon.serve.metrics import Metrics
from cm3leon.serve.pictures import encoded, given_pixels
from cm3leon.serve.service import Service, is_tuned
from cm3leon.serve.setting import Limits, Setting
from cm3leon.types import UserError

HEALTH = "/health"
FORM_FIELDS = 64


class Server:
    """The application, with its desk, its metrics and its routes.

    Args:
        key: what clients must send; None = only programs of this machine may ask.
    """

    def __init__(
        self, service: Service, *, limits: Limits | None = None, key: str | None = None
    ) -> None:
        limits = limits or Limits()
        self.service = service
        self.desk = Desk(service, limits.requests)
        self.setting = Setting(self.desk, limits, service.model.run.folder.resolve().name)
        self.metrics = Metrics(self.desk)
        self._trusted = key is not None
        self.stopping = False
        """Whether new requests are refused."""
        self._created = int(time.time())

        # No pages of FastAPI: its documentation would load scripts from elsewhere.
        application = FastAPI(
            title="CM3Leon", docs_url=None, redoc_url=None, openapi_url=None, exception_handlers={}
        )
        routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("POST", "/v1/images/generations", self._generations),
            ("POST", "/v1/images/edits", self._edits),
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/retrieve", self._retrieve),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{name}", self._model),
            ("GET", HEALTH, self._health),
            ("GET", "/metrics", self._metrics),
        ]
        for method, path, answer in routes:
            application.add_api_route(
                path, self._counted(path, answer), methods=[method], response_model=None
            )

        # Every error is answered in OpenAI's form, those of the framework too.
        for kind in (Refusal, HTTPException, Exception):
            application.add_exception_handler(kind, _said)
        self.app = Gate(application, key=key, body_bytes=limits.body_bytes, open_paths=(HEALTH,))

    def described(self) -> str:
        """What is served, and the memory that it has taken, in a line."""
        engine = self.service.engine.engine
        shape = engine.shape
        return (
            f"{self.setting.name}: up to {shape.groups} samples at a time, each with {shape.width} "
            f"rows of {shape.tail} tokens behind a prefix of {shape.prefix}; "
            f"{engine.cache_bytes / 1e6:,.1f} MB are reserved for keys and values; "
            f"{self.service.engine.waiting_limit} more samples may wait"
        )

    def close(self, timeout: float) -> None:
        """Finish accepted requests, and end all threads.

        Args:
            timeout: seconds after which unfinished samples are cancelled.
        """
        self.stopping = True
        self.service.engine.stop(timeout=timeout)
        self.desk.close()

    def _counted(
        self, path: str, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that is counted and timed, to the end of its stream if it has one."""

        async def counted(request: Request) -> Response:
            started = time.monotonic()

            def count(status: int) -> None:
                self.metrics.count(path, status, time.monotonic() - started)

            # Errors are counted by the status that the client will get.
            try:
                if self.stopping and request.method == "POST":
                    raise Refusal(503, "the server is being stopped", retry=5)
                response = await answer(request)
            except Exception as error:
                refusal = refusal_of(error)
                count(500 if refusal is None else refusal.status)
                if refusal is None:
                    raise
                raise refusal from error

            # A stream is counted when it has ended, and as 499 if its client left before.
            if isinstance(response, StreamingResponse):
                response.body_iterator = _until_the_end(response.body_iterator, count)
            else:
                count(response.status_code)
            return response

        return counted

    # ----------------------------------------------------------------------------------- endpoints

    async def _generations(self, request: Request) -> Response:
        asked = await self._asked(GenerationAsked, request)
        return await self._answer(request, asked, drawing.generation(self.setting, asked))

    async def _edits(self, request: Request) -> Response:
        async with request.form(max_files=4, max_fields=FORM_FIELDS) as form:
            files = await _files(form)
            texts = {name: value for name, value in form.items() if isinstance(value, str)}
        asked = read_asked(EditAsked, form_values(EditAsked, texts))
        self.setting.check(asked)
        return await self._answer(request, asked, drawing.edit(self.setting, asked, files))

    async def _chat(self, request: Request) -> Response:
        asked = await self._asked(ChatAsked, request)
        return await self._answer(request, asked, chat.completion(self.setting, asked))

    async def _answer(self, request: Request, asked: Asked, task: Told[Any]) -> Response:
        client = self._client(request, asked)
        if not asked.stream:
            answered = await self.desk.answer(request.receive, client, task.work)
            return JSONResponse(task.body(answered))
        growing = await self.desk.grow(request.receive, client, task.work, every=task.every)
        return StreamingResponse(task.events(growing), media_type="text/event-stream")

    async def _retrieve(self, request: Request) -> Response:
        asked = await self._asked(RetrieveAsked, request)
        setting = self.setting
        image = None if asked.image is None else file_of(asked.image, "image")

        # In a thread: images are decoded, embedded and encoded there.
        def work(model: Any) -> list[dict[str, Any]]:
            pixels_HWC = None
            if image is not None:
                pixels_HWC = given_pixels(
                    image, "image", size=setting.size, max_pixels=setting.limits.pixels
                )
            documents = []
            for found in model.search(asked.text, pixels_HWC, count=asked.count):
                picture = found.image if asked.images else None
                documents.append(
                    {
                        "id": found.id,
                        "text": found.text,
                        "score": found.score,
                        "b64_json": None if picture is None else encoded(picture, "png"),
                    }
                )
            return documents

        answered = await self.desk.answer(request.receive, self._client(request, asked), work)
        return JSONResponse({"object": "list", "data": answered.result})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        self.setting.check_name(request.path_params["name"])
        return JSONResponse(self._described())

    async def _health(self, request: Request) -> Response:
        if not self.service.engine.alive or self.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _described(self) -> dict[str, Any]:
        run = self.service.model.run
        return {
            "id": self.setting.name,
            "object": "model",
            "created": self._created,
            "owned_by": "cm3leon",
            "image_size": self.setting.image_size,
            "codes": list(run.grid),
            "positions": self.service.engine.engine.shape.prefix,
            "retrieves": run.has_retriever and run.has_bank,
            "takes_instructions": is_tuned(self.service.model),
        }

    def _client(self, request: Request, asked: Asked) -> str:
        """Whose turn a request takes: the named user's if the server has a key, else the address's.

        Without a key, anyone could take a turn for each request, by giving a new name each time.
        """
        if asked.user and self._trusted:
            return f"user {asked.user}"
        address = request.client.host if request.client else "?"
        return f"address {address}"

    async def _asked(self, cls: type[Any], request: Request) -> Any:
        body = await request.body()
        asked = read_asked(cls, read_json_body(body, request.headers.get("content-type", "")))
        self.setting.check(asked)
        return asked


async def _files(form: FormData) -> dict[str, bytes]:
    """The files of a form by their names; `image[]` counts as `image`.

    Raises:
        UserError: for a name that several files have.
    """
    files: dict[str, bytes] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            plain = name.removesuffix("[]")
            if plain in files:
                raise UserError(f"{plain} is given several times; give one file")
            files[plain] = await value.read()
    return files


async def _until_the_end(
    stream: AsyncIterable[Any], count: Callable[[int], None]
) -> AsyncIterator[Any]:
    """The stream, whose end is counted: with status 200, or 499 if the client left before."""
    status = 499
    try:
        async for each in stream:
            yield each
        status = 200
    finally:
        count(status)


async def _said(request: Request, error: Exception) -> Response:
    """An error in OpenAI's form."""
    if isinstance(error, HTTPException):
        path = request.scope["path"]  # `request.url` would parse the header Host, whatever it is
        known = {404: f"{path} is not an endpoint of this server",
                 405: f"{path} does not take {request.method}"}  # fmt: skip
        refusal = Refusal(error.status_code, known.get(error.status_code, str(error.detail)))
    else:
        refusal = refusal_of(error) or Refusal(500, "the server failed; its log says why")
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)
