"""Report functions that torch.compile gives up on, where the user looks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOGGER = "torch._dynamo.convert_frame"
_LIMIT = "torch._dynamo hit config."
"""Start of the message that torch logs when it gives up on a function
that it compiled too often."""


@contextmanager
def recompile_limits(report: Callable[[str], object]) -> Iterator[None]:
    """Call `report` with a sentence for every function that torch stops compiling, as it had to
    compile it too often.

    torch says so only in its log, which scrolls by while the training stays slower for good.
    """
    logger, handler = logging.getLogger(_LOGGER), _Limits(report)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Limits(logging.Handler):
    def __init__(self, report: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        if not (str(record.msg).startswith(_LIMIT) and isinstance(record.args, tuple)):
            return
        limit, number, function, reason = map(str, record.args[:4])
        self._report(
            f"torch.compile reached its limit of {number} ({limit}) at {function}; from here on, "
            "inputs that it has not compiled for run uncompiled, which is slower; it last had to "
            f"compile again because: {' '.join(reason.split())}"
        )
