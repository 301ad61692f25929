"""Work on the items of a stream in threads, a few items ahead of the reader.

This is how images are decoded. Pillow releases Python's lock while it decodes and resizes, and a
device that encodes one batch need not wait for the pixels of the next:

    reader thread     record 7, record 8, ...       reads the files, a few records ahead of the pool
    pool              |decode 5| |decode 6|         as many at once as there are processors
    whoever reads     <- squares 0 .. 4, in order   and may compute meanwhile
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
"""Most results that wait for the reader: as many as a batch of the encoder takes."""
MAX_THREADS = 32
"""Most threads of a pool; beyond that, Python's own part of the work is the limit."""

_share = 1


def share_processors(processes: int) -> None:
    """Divide the processors among this many processes, of which this is one."""
    global _share
    _share = max(1, processes)


def usable_processors() -> frozenset[int]:
    """The indices of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def threads() -> int:
    """How many threads decode in this process: one for each processor of its share."""
    return min(max(1, len(usable_processors()) // _share), MAX_THREADS)


def worked_ahead(
    items: Iterable[T], work: Callable[[T], R], *, most: int = MAX_AHEAD
) -> Iterator[R]:
    """Yield `work(item)` of all items in their order, computed in threads before it is asked for.

    At first only a few results are computed ahead, and with each result taken one more, up to
    `most`: a reader of the first ten documents does not have a whole part decoded. Of those, at
    most twice as many items as threads have been read and wait for a thread.

    Args:
        items: read in a thread of its own.
        work: called in several threads at a time.
        most: how many results may wait for the reader.

    Raises:
        Exception: whatever the items or the work raise, in the place of that item's result.
    """
    count = threads()
    allowed = min(2 * count, most)  # results that may wait for the reader at present
    room, pending = threading.Semaphore(allowed), threading.Semaphore(2 * count)
    closed = threading.Event()
    coming: SimpleQueue[Future[R] | None] = SimpleQueue()
    context = contextvars.copy_context()

    def read() -> None:
        """Give every item to the pool, as soon as there is room for its result."""
        try:
            for item in items:
                room.acquire()
                pending.acquire()
                if closed.is_set():
                    return
                future = pool.submit(context.copy().run, work, item)
                future.add_done_callback(lambda _: pending.release())
                coming.put(future)
            coming.put(None)  # the end
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
                # A reader that keeps on reading has more made ahead.
                if allowed < most:
                    room.release()
                    allowed += 1
                yield result
        finally:
            # The reader may have stopped early, while the thread waits for room that nobody
            # makes any more.
            closed.set()
            room.release()
            pending.release()
            reader.join()
            pool.shutdown(cancel_futures=True)
