"""Batches made in a thread of their own while the device computes.

    batches thread   | batch 3 | batch 4 | waits ...      makes, counts, pins; two batches ahead at most
    training         | step 1      | step 2      |        takes them in order

Each batch comes with the state that its stream had after it, so that a checkpoint says where the
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
"""Batches that are held for the training at most."""


class Batches(Protocol):
    """An endless stream of batches with a state, from which another stream goes on exactly.

    States that it gave are not changed by it later.
    """

    def next(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class BatchSplit:
    """How a batch of this rank is divided, and what its parts weigh; the default is one part.

    The loss of a step is the mean of its parts' losses on all ranks by these weights, so that it
    does not depend on how many ranks and parts there are.
    """

    parts: Callable[[Any], Sequence[Any]] = lambda batch: [batch]
    """Called in the batches' thread, right after the batch was drawn."""
    weight: Callable[[Any], float] = lambda part: 1.0
    """Called there too, so that it looks at what lies on the CPU."""
    ids: Callable[[Sequence[Any]], list[str]] = lambda parts: []
    """Ids of the documents in the parts of a batch, called while no batch is drawn."""


WHOLE = BatchSplit()
"""Batches of one part."""


@dataclass(frozen=True)
class Ready:
    """A batch in parts, with their weights, and the stream's state after it."""

    parts: Sequence[Any]
    weights: list[float]
    state: dict[str, Any]


class Prefetch:
    """The next batches of a stream, in order; to be closed.

    Args:
        count: batches that are made at most, so that none is made in vain.
        device: what is made for a GPU lies in pinned memory,
            which is copied to it while both go on.
    """

    def __init__(
        self, batches: Batches, split: BatchSplit, *, count: int, device: torch.device
    ) -> None:
        self.state = batches.state_dict()
        """The stream's after the batch that was taken last."""
        self._batches, self._split, self._count = batches, split, count
        self._pins = device.type == "cuda"
        self._made: Queue[Ready | BaseException] = Queue(AHEAD)
        self._looked_at: Ready | BaseException | None = None
        self._drawing = threading.Lock()
        self._closed = False
        # In this thread's context, whose variables say how warnings and files are to be treated.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._work,), name="batches", daemon=True
        )
        self._thread.start()

    def next(self) -> Ready:
        """The next batch; raises, in its place, what kept it from being made."""
        ready = self._coming()
        if isinstance(ready, BaseException):
            raise ready
        self._looked_at = None
        self.state = ready.state
        return ready

    def coming_weight(self) -> float:
        """Weight of the next batch, which stays the next; 0 where it could not be made."""
        ready = self._coming()
        return 0.0 if isinstance(ready, BaseException) else sum(ready.weights)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """No batch is drawn meanwhile: what reads the data may have one reader at a time."""
        with self._drawing:
            yield

    def close(self) -> None:
        """Ends the thread, after the batch that it is making."""
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
    """Tensors, in lists and tuples too, in pinned memory; anything else as it is."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    if type(value) in (list, tuple):
        return type(value)(pinned(each) for each in value)
    return value
