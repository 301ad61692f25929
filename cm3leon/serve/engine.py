"""One engine that many callers share: a thread owns it, clients take turns, and what waits is bounded.

    threads of callers                      the thread of the engine
    answers(requests) ── samples ──>  a queue for each client, taken in turn ──> groups of the engine
                      <── tokens ───  after each step: samples that grew, samples that are finished

A sample is a group of the engine by itself, so that a request of many samples takes turns with others, too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field

import torch

from cm3leon.decoders.choosing import NotFiniteLogits
from cm3leon.decoders.engine import Engine, FinishedSample
from cm3leon.decoders.request import Request
from cm3leon.types import UserError

LOG = logging.getLogger(__name__)
LONGEST_RETRY = 600
"""Seconds after which a client that was refused is asked to come again, at most."""
FORGETTING = 0.99
"""Share of the earlier steps' time and samples that a step keeps, where the pace is estimated."""

OnTokens = Callable[[int, int, list[int]], object]
"""Is given the number of a request, that of a sample in it, and the tokens that the sample has so far."""


class Busy(Exception):
    """No more samples can wait."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the server is full; try again in {seconds} seconds")
        self.seconds = seconds
        """When there is likely to be room."""


class Cancelled(Exception):
    """The caller has gone, or the server did not wait for it."""


class Stopped(Exception):
    """The engine takes no more requests."""


@dataclass
class Stats:
    """What an engine has done since it was started."""

    finished: int = 0
    """Samples that were finished."""
    cancelled: int = 0
    """Samples whose caller had gone before they were finished."""
    failed: int = 0
    """Samples that ended in an error."""
    tokens: int = 0
    """Tokens of finished samples."""
    waited_seconds: float = 0.0
    """Time that samples have waited for a group, all of them together."""
    busy_seconds: float = 0.0
    """Time that steps have taken."""


@dataclass(eq=False)
class _Sample:
    """A sample that waits or is in the making."""

    job: _Job
    request: int
    number: int
    asked: Request
    queued: float
    shown: int = 0
    """Parts of it that its caller was shown."""


@dataclass(eq=False)
class _Job:
    """The requests of a call, and the answers that it waits for."""

    caller: Caller
    found: list[dict[int, list[int]]]
    left: int
    done: Future[list[list[list[int]]]] = field(default_factory=Future)


class SharedEngine:
    """An engine in a thread of its own, which every method may be called from any thread for.

    Args:
        computing: opens the context that passes are made in, such as autocast.
        waiting: samples that may wait at a time, of all clients.
    """

    def __init__(
        self, engine: Engine, computing: Callable[[], AbstractContextManager[object]], waiting: int
    ) -> None:
        self.waiting_limit = waiting
        self.stats = Stats()
        self._engine, self._computing = engine, computing
        self._changed = threading.Condition()
        self._queues: OrderedDict[str, deque[_Sample]] = OrderedDict()
        self._running: dict[int, _Sample] = {}
        self._leaving: set[int] = set()
        self._stopping = False
        self._why = "the server is being stopped, and takes no more requests"
        self._seconds, self._samples = 0.0, 0.0
        self._cores = torch.get_num_threads()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def engine(self) -> Engine:
        """The engine, to be looked at."""
        return self._engine

    @property
    def waiting(self) -> int:
        """Samples that wait."""
        with self._changed:
            return sum(map(len, self._queues.values()))

    @property
    def running(self) -> int:
        """Samples in the making."""
        with self._changed:
            return len(self._running)

    def stop(self, *, finish: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests, and ends the thread when those that it has are finished.

        Args:
            finish: cancel them instead, if it is false.
            timeout: seconds after which those that are left are cancelled.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if finish:
            self._thread.join(timeout)
        with self._changed:
            for job in self._jobs():
                self._end(job, Cancelled("the server was stopped"))
            self._changed.notify_all()
        self._thread.join()

    def enqueue(self, caller: Caller, requests: Sequence[Request]) -> _Job:
        """Queues all samples of some requests.

        Raises:
            UserError: for a request without room in the engine, or more samples than may ever wait.
            Busy: where not all of them can wait now.
            Stopped: after `stop`.
        """
        for request in requests:
            self._engine.check(request)
        count = sum(len(request.seeds) for request in requests)
        if count > self.waiting_limit:
            raise UserError(
                f"{count} samples are asked for at a time; it must be at most {self.waiting_limit}"
            )
        job = _Job(caller, [{} for _ in requests], count)
        now = time.monotonic()
        with self._changed:
            if self._stopping:
                raise Stopped(self._why)
            if self.waiting + count > self.waiting_limit:
                raise Busy(self.seconds_until_free(count))
            if not count:
                job.done.set_result([[] for _ in requests])
                return job
            queue = self._queues.setdefault(caller.client, deque())
            for number, request in enumerate(requests):
                for sample in range(len(request.seeds)):
                    queue.append(_Sample(job, number, sample, request.part([sample]), now))
            self._changed.notify_all()
        return job

    def seconds_until_free(self, count: int = 1) -> int:
        """Whole seconds until so many more samples are likely to find room, by the pace of late."""
        with self._changed:
            excess = max(self.waiting + count - self.waiting_limit, 1)
            pace = self._seconds / self._samples if self._samples > 0.5 else 1.0
        return max(1, min(round(pace * excess + 0.5), LONGEST_RETRY))

    def cancel(self, job: _Job) -> None:
        """Forgets a job: its rows are free before the next step."""
        with self._changed:
            self._end(job, Cancelled("the caller has gone"))
            self._changed.notify_all()

    # -------------------------------------------------------------------------------------------- the thread

    def _loop(self) -> None:
        try:
            self._work()
        except BaseException:
            LOG.exception("the engine has ended by an error")
            self._why = (
                "the engine has ended by an error, which the server's log has; start it again"
            )
        finally:
            # However it ends, callers must not wait for ever, and nobody queues behind it.
            with self._changed:
                self._stopping = True
                for job in self._jobs():
                    self._end(job, Stopped(self._why))

    def _work(self) -> None:
        # torch keeps a number for each thread, and begins with what another one has set last.
        torch.set_num_threads(self._cores)
        with self._computing():
            while True:
                with self._changed:
                    self._changed.wait_for(self._has_work)
                    for ticket in self._leaving:
                        self._engine.cancel(ticket)
                    self._leaving.clear()
                    if self._stopping and not self._queues and not self._running:
                        return
                    self._let_in()
                    if not self._running:
                        continue
                self._step()

    def _has_work(self) -> bool:
        return bool(self._queues or self._running or self._leaving or self._stopping)

    def _let_in(self) -> None:
        """Gives the engine as many samples as it has room for: one of each client in turn."""
        now = time.monotonic()
        while self._queues and self._engine.free > 0:
            client, queue = next(iter(self._queues.items()))
            sample = queue[0]
            self._running[self._engine.submit(sample.asked)] = sample
            queue.popleft()
            del self._queues[client]
            if queue:
                self._queues[client] = queue
            self.stats.waited_seconds += now - sample.queued

    def _step(self) -> None:
        started = time.monotonic()
        finished: list[FinishedSample] = []
        try:
            finished = self._engine.step()
        except NotFiniteLogits as error:
            with self._changed:
                self._end(self._running[error.ticket].job, error)
        except Exception as error:  # whatever it is, callers must not wait for ever
            LOG.exception("a step of the engine failed")
            with self._changed:
                for job in self._jobs():
                    self._end(job, error)
        seconds = time.monotonic() - started
        self.stats.busy_seconds += seconds
        self._seconds = FORGETTING * self._seconds + seconds
        self._samples = FORGETTING * self._samples + len(finished)
        self._show_growth()
        with self._changed:
            for answer in finished:
                self._keep(answer)

    def _show_growth(self) -> None:
        """Shows callers the samples that grew by the part that they look at."""
        with self._changed:
            grown = []
            for ticket, _, tokens in self._engine.growing():
                sample = self._running.get(ticket)
                if sample is None or sample.job.caller.on_tokens is None:
                    continue
                parts = len(tokens) // sample.job.caller.every
                if parts > sample.shown:
                    sample.shown = parts
                    grown.append((sample, list(tokens)))
        for sample, tokens in grown:
            assert sample.job.caller.on_tokens is not None
            try:
                sample.job.caller.on_tokens(sample.request, sample.number, tokens)
            except Exception as error:  # the caller's fault is nobody else's
                with self._changed:
                    self._end(sample.job, error)

    def _keep(self, answer: FinishedSample) -> None:
        sample = self._running.pop(answer.ticket, None)
        if sample is None:
            return
        self.stats.finished += 1
        self.stats.tokens += len(answer.tokens)
        job = sample.job
        job.found[sample.request][sample.number] = answer.tokens
        job.left -= 1
        if not job.left and not job.done.done():
            job.done.set_result([[of[each] for each in range(len(of))] for of in job.found])

    def _jobs(self) -> set[_Job]:
        waiting = {sample.job for queue in self._queues.values() for sample in queue}
        return waiting | {sample.job for sample in self._running.values()}

    def _end(self, job: _Job, error: Exception) -> None:
        """Ends a job without its answers, and all samples of it."""
        left = 0
        for client, queue in list(self._queues.items()):
            kept = deque(sample for sample in queue if sample.job is not job)
            left += len(queue) - len(kept)
            if kept:
                self._queues[client] = kept
            else:
                del self._queues[client]
        for ticket, sample in list(self._running.items()):
            if sample.job is job:
                del self._running[ticket]
                self._leaving.add(ticket)
                left += 1
        if isinstance(error, Cancelled):
            self.stats.cancelled += left
        else:
            self.stats.failed += left
        with suppress(Exception):  # it was done already
            job.done.set_exception(error)


class Caller:
    """One who asks a shared engine: what stands for an `Answerer` in a model that is asked through it.

    Args:
        client: whose turn it is: callers of one client share its turns.
        on_tokens: is shown each sample as it grows, in the thread of the engine, which it must not hold up.
        every: tokens of a sample after which it is shown.
        on_queued: is called when its requests have found a place.
    """

    def __init__(
        self,
        engine: SharedEngine,
        client: str,
        *,
        on_tokens: OnTokens | None = None,
        every: int = 1,
        on_queued: Callable[[], object] | None = None,
    ) -> None:
        self.client, self.on_tokens, self.every = client, on_tokens, every
        self.on_queued = on_queued
        self.prompt_tokens = self.answer_tokens = 0
        self._engine = engine
        self._lock = threading.Lock()
        self._job: _Job | None = None
        self._gone = False

    @property
    def gone(self) -> bool:
        """Whether it was cancelled."""
        return self._gone

    def cancel(self) -> None:
        """Gives up what is asked for, now and later; `answers` raises Cancelled."""
        with self._lock:
            self._gone = True
            job = self._job
        if job is not None:
            self._engine.cancel(job)

    def answers(self, requests: Sequence[Request]) -> list[list[list[int]]]:
        """Tokens of all samples of all requests, as `Answerer.answers`; waits for them.

        Raises:
            Cancelled: after `cancel`.
            UserError, Busy, Stopped: as `SharedEngine.enqueue` does.
        """
        with self._lock:
            if self._gone:
                raise Cancelled("the caller has gone")
            job = self._job = self._engine.enqueue(self, requests)
        if self.on_queued is not None:
            self.on_queued()
        try:
            found = job.done.result()
        finally:
            self._job = None
        for request, samples in zip(requests, found, strict=True):
            self.prompt_tokens += len(request.streams[0])
            self.answer_tokens += sum(map(len, samples))
        return found
