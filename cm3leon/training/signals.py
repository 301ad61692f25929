"""Signals that ask a run to stop: SIGTERM, and SIGUSR1 and SIGUSR2, which clusters send some time
before a limit.

Whatever a run writes is written whole or not at all, so it can be stopped anywhere and continued
later. Only inside a training a signal is noted instead, and answered between two micro-batches once
a checkpoint is written.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from cm3leon.types import Again

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """A context in which these signals raise Again, as Ctrl-C raises KeyboardInterrupt; only in the
    main thread.

    Contexts can be nested: the innermost one receives the signals.

    Args:
        noted: note signals in `received` and raise nothing, except inside `at_once`.
    """

    def __init__(self, *, noted: bool = False) -> None:
        self.received = ""
        """Name of the last signal; "" if there was none."""
        self._noted = noted
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Again, and one that was noted before raises it on entry."""
        before, self._noted = self._noted, False
        try:
            self.check()
            yield
        finally:
            self._noted = before

    def check(self) -> None:
        """Raise Again if a signal was received."""
        if self.received:
            raise Again(f"stopped by {self.received}")

    def _receive(self, number: int, _: FrameType | None) -> None:
        first, self.received = not self.received, signal.Signals(number).name
        # A second signal must not interrupt the cleaning up that the first one started.
        if first and not self._noted:
            self.check()
