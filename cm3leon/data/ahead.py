"""Work on the items of a stream in threads, some items ahead of whoever reads it.

Images are decoded so: Pillow lets other threads run while it decodes and resizes, and a device that
encodes one batch does not wait for the pixels of the next.

    reader thread      record 7, record 8, ...                 reads the files, a few records ahead of the pool
    pool               |decode 5| |decode 6|                   as many at once as this process has processors
    whoever reads      <- squares 0 .. 4, in order             which may compute meanwhile
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

MAX_AHEAD = 256
"""Results that are held for the reader at most: a batch of what encodes them."""
MAX_THREADS = 32
"""Threads of a pool at most; beyond, Python's own part of the work is the bound."""

_share = 1


def share_processors(processes: int) -> None:
    """Leave this process its share of the processors, where so many processes decode on them."""
    global _share
    _share = max(1, processes)


def usable_processors() -> frozenset[int]:
    """Numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def threads() -> int:
    """Threads that decode in this process: its share of the processors that it may use."""
    return min(max(1, len(usable_processors()) // _share), MAX_THREADS)


def worked_ahead(
    items: Iterable[T], work: Callable[[T], R], *, most: int = MAX_AHEAD
) -> Iterator[R]:
    """`work(item)` of all items in their order, done in threads before it is asked for.

    At first only a few results are made ahead, and one more with each that is taken, up to `most`:
    who takes but the first ten of a part has not had it decoded whole. Items that are read and not
    worked on yet are at most twice as many as threads. What the items or the work raise is raised
    here, in its place.

    Args:
        items: read in a thread of its own.
        work: called in several threads at a time.
    """
    count = threads()
    given = min(2 * count, most)
    room, pending = threading.Semaphore(given), threading.Semaphore(2 * count)
    closed = threading.Event()
    coming: SimpleQueue[Future[R] | None] = SimpleQueue()
    context = contextvars.copy_context()

    def read() -> None:
        try:
            for item in items:
                room.acquire()
                pending.acquire()
                if closed.is_set():
                    return
                future = pool.submit(context.copy().run, work, item)
                future.add_done_callback(lambda _: pending.release())
                coming.put(future)
            coming.put(None)
        except BaseException as error:
            failed: Future[R] = Future()
            failed.set_exception(error)
            coming.put(failed)

    with ThreadPoolExecutor(count, "decode") as pool:
        reader = threading.Thread(target=context.copy().run, args=(read,), name="read", daemon=True)
        reader.start()
        try:
            while (future := coming.get()) is not None:
                result = future.result()
                room.release()
                if given < most:
                    room.release()
                    given += 1
                yield result
        finally:
            # Whoever reads may have had enough: the reader waits for room that nobody makes any
            # more.
            closed.set()
            room.release()
            pending.release()
            reader.join()
            pool.shutdown(cancel_futures=True)
