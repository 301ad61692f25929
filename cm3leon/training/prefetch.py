"""Batches made in a thread of their own while the device computes.

    batches thread   | batch 3 | batch 4 | waits ...      makes, weighs and pins; at most two ahead
    training         | step 1      | step 2      |        takes them in order

Each batch comes with the state that its stream had after it, so that a checkpoint records where the
training is, not how far the thread has come.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any, Protocol

import torch
from torch import Tensor

AHEAD = 2
"""Most batches that wait for the training."""


class Batches(Protocol):
    """An endless stream of batches with a state, from which another stream continues exactly.

    The stream must not change a state that it has returned.
    """

    def next(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class BatchSplit:
    """How a rank's batch is divided into parts, and what each weighs; by default one part.

    A step's loss is the mean of the losses of all parts on all ranks by these weights, so that it
    does not depend on the number of ranks and parts.
    """

    parts: Callable[[Any], Sequence[Any]] = lambda batch: [batch]
    """Called in the batches' thread, right after the batch is drawn."""
    weight: Callable[[Any], float] = lambda part: 1.0
    """Called there too, so that it sees tensors on the CPU."""
    ids: Callable[[Sequence[Any]], list[str]] = lambda parts: []
    """Ids of the documents in a batch's parts; called while no batch is drawn."""


WHOLE = BatchSplit()
"""Batches of one part."""


@dataclass(frozen=True)
class Ready:
    """A batch in parts, with their weights, and the stream's state after it."""

    parts: Sequence[Any]
    weights: list[float]
    state: dict[str, Any]


class Prefetch:
    """The next batches of a stream in order; must be closed.

    Args:
        count: number of batches to make, so that none is made in vain.
        device: batches for a GPU are put into pinned memory, which is copied to it in the
            background.
    """

    def __init__(
        self, batches: Batches, split: BatchSplit, *, count: int, device: torch.device
    ) -> None:
        self.state = batches.state_dict()
        """The stream's state after the batch that was taken last."""
        self._batches, self._split, self._count = batches, split, count
        self._pins = device.type == "cuda"
        self._made: Queue[Ready | BaseException] = Queue(AHEAD)
        self._looked_at: Ready | BaseException | None = None
        self._drawing = threading.Lock()
        self._closed = False

        # In this thread's context, whose variables say how to treat warnings and files.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._work,), name="batches", daemon=True
        )
        self._thread.start()

    def next(self) -> Ready:
        """The next batch; raises whatever kept it from being made."""
        ready = self._coming()
        if isinstance(ready, BaseException):
            raise ready
        self._looked_at = None
        self.state = ready.state
        return ready

    def coming_weight(self) -> float:
        """Weight of the next batch, which is not taken; 0 if it could not be made."""
        ready = self._coming()
        return 0.0 if isinstance(ready, BaseException) else sum(ready.weights)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Draw no batch inside: what reads the data allows one reader at a time."""
        with self._drawing:
            yield

    def close(self) -> None:
        """End the thread after the batch that it is making."""
        self._closed = True
        while self._thread.is_alive():
            with suppress(Empty):
                self._made.get(timeout=0.01)  # it may wait for room

    def _coming(self) -> Ready | BaseException:
        if self._looked_at is None:
            self._looked_at = self._made.get()
        return self._looked_at

    def _work(self) -> None:
        try:
            for _ in range(self._count):
                with self._drawing:
                    if self._closed:
                        return
                    ready = self._make()
                self._made.put(ready)
        except BaseException as error:
            self._made.put(error)

    def _make(self) -> Ready:
        parts = self._split.parts(self._batches.next())
        weights = [self._split.weight(part) for part in parts]
        if self._pins:
            parts = [pinned(part) for part in parts]
        return Ready(parts, weights, self._batches.state_dict())


def pinned(value: Any) -> Any:
    """Copy tensors, also those in lists and tuples, to pinned memory; leave the rest."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    if type(value) in (list, tuple):
        return type(value)(pinned(each) for each in value)
    return value
