"""One engine shared by many callers: a thread owns it, clients take turns, and the queues are
bounded.

    threads of callers              the thread of the engine
    answers(requests) ─ samples ─>  a queue for each client, taken in turn ──> groups of the engine
                      <─ tokens ──  after each step: samples that grew, samples that finished

Each sample is a group of the engine by itself, so that a request of many samples takes turns with
others. With room for 3 samples, client A asking for four and then client B for two:

    queues     A: a1 a2 a3 a4    B: b1 b2
    engine     a1 b1 a2          one of each client in turn
    waiting    A: a3 a4          B: b2          B is first when a group is free
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
"""The most seconds that a refused client is told to wait."""
FORGETTING = 0.99
"""Weight by which a step multiplies the time and samples of earlier steps, for the recent pace."""

OnTokens = Callable[[int, int, list[int]], object]
"""Receives the index of a request, the index of a sample in it, and the sample's tokens so far."""


class Busy(Exception):
    """The queues are full."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the server is full; try again in {seconds} seconds")
        self.seconds = seconds
        """Seconds after which there is likely to be room."""


class Cancelled(Exception):
    """The caller has gone, or the server was stopped without waiting for it."""


class Stopped(Exception):
    """The engine takes no more requests."""


@dataclass
class Stats:
    """What an engine has done since its start."""

    finished: int = 0
    """Samples that were finished."""
    cancelled: int = 0
    """Samples whose caller left before they were finished."""
    failed: int = 0
    """Samples that ended in an error."""
    tokens: int = 0
    """Tokens of finished samples."""
    waited_seconds: float = 0.0
    """Sum of the times that samples have waited for a group."""
    busy_seconds: float = 0.0
    """Sum of the times of all steps."""


@dataclass(eq=False)
class _Sample:
    """A sample that waits or is being generated."""

    job: _Job
    request: int
    number: int
    asked: Request
    queued: float
    shown: int = 0
    """How many parts of it, of `Caller.every` tokens, its caller was shown."""


@dataclass(eq=False)
class _Job:
    """The requests of one call, and the answers that the call waits for."""

    caller: Caller
    found: list[dict[int, list[int]]]
    left: int
    done: Future[list[list[list[int]]]] = field(default_factory=Future)


class SharedEngine:
    """An engine in a thread of its own. Every method may be called from any thread.

    Args:
        computing: opens the context in which the model is run, such as autocast.
        waiting: samples that may wait at a time, of all clients.
    """

    def __init__(
        self, engine: Engine, computing: Callable[[], AbstractContextManager[object]], waiting: int
    ) -> None:
        self.waiting_limit = waiting
        self.stats = Stats()
        self._engine, self._computing = engine, computing

        # The condition guards the queues, what runs and what leaves. The engine itself belongs to
        # its thread.
        self._changed = threading.Condition()
        self._queues: OrderedDict[str, deque[_Sample]] = OrderedDict()
        self._running: dict[int, _Sample] = {}
        self._leaving: set[int] = set()
        self._stopping = False
        self._why = "the server is being stopped, and takes no more requests"

        # Time and finished samples of recent steps, by which waiting times are estimated.
        self._seconds, self._samples = 0.0, 0.0
        self._cores = torch.get_num_threads()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def engine(self) -> Engine:
        """The engine, for reading its shape and counts."""
        return self._engine

    @property
    def waiting(self) -> int:
        """Number of samples that wait."""
        with self._changed:
            return sum(map(len, self._queues.values()))

    @property
    def running(self) -> int:
        """Number of samples that are being generated."""
        with self._changed:
            return len(self._running)

    def stop(self, *, finish: bool = True, timeout: float | None = None) -> None:
        """Accept no more requests, finish those accepted, and end the thread.

        Args:
            finish: False = cancel the accepted requests instead.
            timeout: seconds after which unfinished requests are cancelled.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if finish:
            self._thread.join(timeout)

        # After a finished join there are no jobs left to end.
        with self._changed:
            for job in self._jobs():
                self._end(job, Cancelled("the server was stopped"))
            self._changed.notify_all()
        self._thread.join()

    def enqueue(self, caller: Caller, requests: Sequence[Request]) -> _Job:
        """Queue all samples of the requests, or none of them.

        Raises:
            UserError: for a request without room in the engine, or more samples than can ever wait.
            Busy: if not all of them can wait now.
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

            # A client's samples wait behind its earlier ones.
            queue = self._queues.setdefault(caller.client, deque())
            for number, request in enumerate(requests):
                for sample in range(len(request.seeds)):
                    queue.append(_Sample(job, number, sample, request.part([sample]), now))
            self._changed.notify_all()
        return job

    def seconds_until_free(self, count: int = 1) -> int:
        """Whole seconds until so many more samples are likely to have room, by the recent pace."""
        with self._changed:
            excess = max(self.waiting + count - self.waiting_limit, 1)
            pace = self._seconds / self._samples if self._samples > 0.5 else 1.0
        return max(1, min(round(pace * excess + 0.5), LONGEST_RETRY))

    def cancel(self, job: _Job) -> None:
        """End a job without answers; its rows are free before the next step."""
        with self._changed:
            self._end(job, Cancelled("the caller has gone"))
            self._changed.notify_all()

    # -------------------------------------------------------------------------------- the thread

    def _loop(self) -> None:
        """Run the engine until it is stopped or fails; then end all jobs."""
        try:
            self._work()
        except BaseException:
            LOG.exception("the engine has stopped because of an error")
            self._why = (
                "the engine has stopped because of an error, which is in the server's log; restart "
                "the server"
            )
        finally:
            # However the thread ends, no caller may wait for ever, nor queue behind it.
            with self._changed:
                self._stopping = True
                for job in self._jobs():
                    self._end(job, Stopped(self._why))

    def _work(self) -> None:
        """Free what was cancelled, let in what has room, make a step; again and again."""
        # torch.set_num_threads counts for the thread that calls it; a new one may begin with the
        # number that another thread set last.
        torch.set_num_threads(self._cores)
        with self._computing():
            while True:
                with self._changed:
                    self._changed.wait_for(self._has_work)

                    # Cancelled samples give back their rows before others are let in.
                    for ticket in self._leaving:
                        self._engine.cancel(ticket)
                    self._leaving.clear()
                    if self._stopping and not self._queues and not self._running:
                        return
                    self._let_in()
                    if not self._running:
                        continue

                # Outside of the lock: callers may queue and cancel while the model computes.
                self._step()

    def _has_work(self) -> bool:
        return bool(self._queues or self._running or self._leaving or self._stopping)

    def _let_in(self) -> None:
        """Give the engine as many samples as it has room for, one of each client in turn."""
        now = time.monotonic()
        while self._queues and self._engine.free > 0:
            client, queue = next(iter(self._queues.items()))
            sample = queue[0]
            self._running[self._engine.submit(sample.asked)] = sample

            # The client goes to the end of the line.
            queue.popleft()
            del self._queues[client]
            if queue:
                self._queues[client] = queue
            self.stats.waited_seconds += now - sample.queued

    def _step(self) -> None:
        """Make one step, show samples that grew, and hand over finished ones."""
        started = time.monotonic()
        finished: list[FinishedSample] = []

        # Logits that are not finite end the job that they belong to; any other error ends all.
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
        """Show callers the samples that have grown by another `Caller.every` tokens."""
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

        # Outside of the lock, as it is others' code that is called.
        for sample, tokens in grown:
            assert sample.job.caller.on_tokens is not None
            try:
                sample.job.caller.on_tokens(sample.request, sample.number, tokens)
            except Exception as error:  # a fault of this caller must not end others' jobs
                with self._changed:
                    self._end(sample.job, error)

    def _keep(self, answer: FinishedSample) -> None:
        """Keep a finished sample for its job, which is done with its last one."""
        sample = self._running.pop(answer.ticket, None)
        if sample is None:
            return
        self.stats.finished += 1
        self.stats.tokens += len(answer.tokens)
        job = sample.job
        job.found[sample.request][sample.number] = answer.tokens
        job.left -= 1
        if not job.left and not job.done.done():
            answers = []
            for by_number in job.found:
                answers.append([by_number[number] for number in range(len(by_number))])
            job.done.set_result(answers)

    def _jobs(self) -> set[_Job]:
        """The jobs that have a sample waiting or running."""
        waiting = {sample.job for queue in self._queues.values() for sample in queue}
        return waiting | {sample.job for sample in self._running.values()}

    def _end(self, job: _Job, error: Exception) -> None:
        """End a job without answers, and all of its samples."""
        # Samples that wait are forgotten at once; those that run leave before the next step.
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
    """One who asks a shared engine; takes the place of an `Answerer` in a model.

    Args:
        client: whose turns the caller takes; callers of one client share its turns.
        on_tokens: is shown each sample as it grows, in the engine's thread, which it must not hold
            up.
        every: tokens of a sample after which it is shown.
        on_queued: is called when the requests are queued.
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
        """Whether the caller was cancelled."""
        return self._gone

    def cancel(self) -> None:
        """Give up present and later requests; `answers` raises Cancelled."""
        with self._lock:
            self._gone = True
            job = self._job
        if job is not None:
            self._engine.cancel(job)

    def answers(self, requests: Sequence[Request]) -> list[list[list[int]]]:
        """Wait for the tokens of all samples of all requests, as `Answerer.answers`.

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
