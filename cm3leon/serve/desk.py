"""Requests between the event loop and the threads that ask the model.

    event loop   answer(), grow() ── waits for: done, a change, the client leaving
                   │ start              ▲ put, wake      │ give_up
    thread       work(model) ───────> engine ──────> tokens, result

A client that leaves gives up its request: its samples are cancelled in the engine, so that their
rows are free for others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch

from cm3leon.api import CM3Leon
from cm3leon.serve.engine import Busy, Caller
from cm3leon.serve.errors import Refusal
from cm3leon.serve.service import Service
from cm3leon.types import Notice

T = TypeVar("T")
Work = Callable[[CM3Leon], T]
"""What a thread does with the model."""
Receive = Callable[[], Awaitable[Any]]

HEARTBEAT = 15
"""Seconds after which a stream that has nothing to show sends a comment, to keep the connection."""


@dataclass
class Answered(Generic[T]):
    """The result of a request, and what it took."""

    result: T
    caller: Caller
    notices: list[Notice]

    @property
    def usage(self) -> dict[str, int]:
        """The tokens that it took, by both names that OpenAI has for each number."""
        given, made = self.caller.prompt_tokens, self.caller.answer_tokens
        return {
            "prompt_tokens": given,
            "completion_tokens": made,
            "input_tokens": given,
            "output_tokens": made,
            "total_tokens": given + made,
        }


class Told(Protocol[T]):
    """A request: how its answer is made, and how it is sent."""

    @property
    def work(self) -> Work[T]:
        """What a thread does with the model."""

    @property
    def every(self) -> int | None:
        """Tokens of a sample after which a stream shows it; None = a row of an image's codes."""

    def body(self, answered: Answered[T]) -> dict[str, Any]:
        """The answer as JSON."""

    def events(self, growing: Growing[T]) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""


class Desk:
    """Threads that ask a service for clients who may leave.

    Args:
        requests: how many are open at a time. Each has a thread, which mostly waits.
    """

    def __init__(self, service: Service, requests: int) -> None:
        self.service, self._requests = service, requests
        self.open = 0
        """Number of open requests."""
        # The engine's thread has all cores; the others compute on one core.
        alone = partial(torch.set_num_threads, 1)
        self._pool = ThreadPoolExecutor(requests, "request", initializer=alone)
        # For partial images only; each stream waits for one at a time.
        self._brief = ThreadPoolExecutor(1, "brief", initializer=alone)

    def close(self) -> None:
        """End the threads; their requests must be finished."""
        for pool in (self._pool, self._brief):
            pool.shutdown(wait=True, cancel_futures=True)

    async def briefly(self, function: Callable[[], T]) -> T:
        """Run a function that does not use the engine in a thread, for an open request."""
        return await asyncio.get_running_loop().run_in_executor(self._brief, function)

    async def answer(self, receive: Receive, client: str, work: Work[T]) -> Answered[T]:
        """Do the work in a thread, and return its result.

        Raises:
            Refusal: if the client leaves before; its samples are given up.
        """
        job = _ThreadWork[T](self.service.caller(client), self)
        job.start(work)
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            waited: set[asyncio.Future[Any]] = {job.done, gone}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not job.done.done():
                raise Refusal(499, "the client has gone")
            return job.answered()
        finally:
            gone.cancel()
            await job.give_up()

    async def grow(
        self, receive: Receive, client: str, work: Work[T], *, every: int | None = None
    ) -> Growing[T]:
        """Do the work in a thread, and return it while it grows, once its samples are queued.

        Errors before that have a status of their own; those that come later are events of the
        stream.

        Raises:
            Exception: what the work raises before its samples are queued.
            Refusal: as `answer` does.
        """
        growing = Growing[T](receive)
        caller = self.service.caller(client, on_tokens=growing.put, every=every)
        caller.on_queued = growing.wake
        growing.job = job = _ThreadWork[T](caller, self)
        job.start(work)
        try:
            await growing.next_change()
            if growing.gone.done():
                raise Refusal(499, "the client has gone")
            if job.done.done():
                job.done.result()
        except BaseException:
            await growing.close()
            raise
        return growing


class _ThreadWork(Generic[T]):
    """The work of a request in a thread."""

    done: asyncio.Future[T]

    def __init__(self, caller: Caller, desk: Desk) -> None:
        self.caller, self._desk = caller, desk
        self._notices: list[Notice] = []

    def start(self, work: Work[T]) -> None:
        """Give the work to a thread. Raises Busy if none is free."""
        desk = self._desk
        if desk.open >= desk._requests:
            raise Busy(desk.service.engine.seconds_until_free())
        desk.open += 1
        loop = asyncio.get_running_loop()
        self.done = loop.run_in_executor(desk._pool, self._work, work)
        self.done.add_done_callback(self._ended)

    def _work(self, work: Work[T]) -> T:
        with self._desk.service.asking(self.caller, self._notices) as model:
            return work(model)

    def _ended(self, done: asyncio.Future[T]) -> None:
        self._desk.open -= 1
        if not done.cancelled():
            done.exception()  # marks it as seen: nobody else looks if the client has left

    def answered(self) -> Answered[T]:
        return Answered(self.done.result(), self.caller, self._notices)

    async def give_up(self) -> None:
        """Cancel the work if it is not done, and wait for its thread."""
        if not self.done.done():
            self.caller.cancel()
            await asyncio.wait({self.done})


@dataclass
class Growing(Generic[T]):
    """Work whose samples are shown as they grow."""

    receive: Receive
    job: _ThreadWork[T] = field(init=False)
    gone: asyncio.Future[None] = field(init=False)

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._fresh: dict[int, list[int]] = {}
        self.gone = asyncio.ensure_future(_until_gone(self.receive))

    def put(self, _: int, sample: int, tokens: list[int]) -> None:
        """Keep the newest state of a sample, in place of one that was not shown. For any thread."""
        self._loop.call_soon_threadsafe(self._fresh.__setitem__, sample, tokens)
        self.wake()

    def wake(self) -> None:
        """Wake `next_change`. For any thread."""
        self._loop.call_soon_threadsafe(self._changed.set)

    async def next_change(self) -> None:
        """Wait for something new, the end of the work, the client leaving, or the heartbeat."""
        changed = asyncio.ensure_future(self._changed.wait())
        waited: set[asyncio.Future[Any]] = {changed, self.gone, self.job.done}
        try:
            await asyncio.wait(waited, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        self._changed.clear()

    async def states(self) -> AsyncIterator[tuple[int, list[int]] | None]:
        """The indices of samples that have grown, with their tokens; None for a heartbeat.

        Ends with the work, or when the client has gone.
        """
        while not self.job.done.done() and not self.gone.done():
            if not self._fresh:
                await self.next_change()
            fresh, self._fresh = self._fresh, {}
            for sample, tokens in fresh.items():
                yield sample, tokens
            if not fresh and not self.job.done.done():
                yield None

    def answered(self) -> Answered[T]:
        """The result, once the states have ended. Raises what the work has raised."""
        if not self.job.done.done():
            raise Refusal(499, "the client has gone")
        return self.job.answered()

    async def close(self) -> None:
        """Give up the work if it is not done."""
        self.gone.cancel()
        await self.job.give_up()


async def _until_gone(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
