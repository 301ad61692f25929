"""The base class of loggers, and several loggers as one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cm3leon.registry import LOGGERS
from cm3leon.secrets import masked
from cm3leon.types import UserError

Kind = Literal["training", "validation"]
"""Whether figures are of the training batches, or of documents and images held out from them."""


@dataclass(frozen=True)
class Training:
    """The training that a logger follows."""

    run: str
    """Name of the run folder."""
    stage: str
    """Name of the stage, which is different for each training of a run."""
    folder: Path
    """Folder of the stage, where a logger may keep files."""
    step: int = 0
    """Step from which the training goes on. Anything logged after it came from a killed process."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The experiment as plain data, without secrets."""
    id: str = ""
    """Id of the training for services, the same when it is resumed; "" for loggers that work in the
    process of the training."""


class Logger:
    """Records a training. A derived class ignores what it does not override.

    An error in a logger ends the logger and is reported once; the training goes on. This covers
    `__init__` as well, unless it raises UserError: settings that fit nothing are refused.
    """

    package = ""
    """Package that it needs, as Python imports it; "" for none."""
    extra = ""
    """The extra of cm3leon that installs the package."""
    apart = False
    """Whether it works in a process of its own, so that a hanging network delays nobody."""

    @dataclass(kw_only=True)
    class Config:
        """Settings; a derived class replaces it."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def start(self, training: Training) -> None:
        """Begin the record of a training, or continue it."""

    def figures(self, step: int, kind: Kind, figures: Mapping[str, float]) -> None:
        """Record numbers by name."""

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None:
        """Record images, uint8 RGB of one size."""

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        """Record a table of texts; each row is a sequence of texts."""

    def close(self, *, finished: bool) -> None:
        """End the record: of a finished training, or of one that will be resumed."""

    def wait(self) -> None:
        """Wait until the logger has ended, for a limited time that counts from `close`.

        All loggers are closed before the first is waited for.
        """


def check_installed(name: str, where: str) -> None:
    """Raise UserError, naming the section `where`, for a logger whose package is not installed."""
    logger = LOGGERS.get(name)
    found = importlib.util.find_spec(logger.package) if logger.package else None

    # A folder of that name, such as wandb makes, is found as well, but without an origin.
    if logger.package and (found is None or found.origin is None):
        wanted = f"cm3leon[{logger.extra}]" if logger.extra else logger.package
        raise UserError(
            f"{where} is {name}, which needs the package {logger.package}: pip install '{wanted}'"
        )


def tagged(kind: Kind, figures: Mapping[str, float]) -> dict[str, float]:
    """Name figures for a service, which tells those of validation by "validation/" in front."""
    prefix = "" if kind == "training" else "validation/"
    return {f"{prefix}{name}": value for name, value in figures.items()}


class Loggers:
    """Several loggers as one; a logger that fails is left out from then on."""

    def __init__(self, loggers: Mapping[str, Logger], say: Callable[[str], None]) -> None:
        """
        Args:
            loggers: loggers by their names in messages.
            say: called with a sentence for each logger that fails.
        """
        self._loggers = dict(loggers)
        self._say = say

    def start(self, training: Training) -> None:
        """See `Logger.start`."""
        self._each(lambda logger: logger.start(training))

    def figures(self, step: int, kind: Kind, figures: Mapping[str, float]) -> None:
        """See `Logger.figures`."""
        self._each(lambda logger: logger.figures(step, kind, figures))

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None:
        """See `Logger.images`."""
        self._each(lambda logger: logger.images(step, name, images_BHWC))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        """See `Logger.table`."""
        self._each(lambda logger: logger.table(step, name, columns, rows))

    def close(self, *, finished: bool) -> None:
        """See `Logger.close`."""
        self._each(lambda logger: logger.close(finished=finished))
        self._each(lambda logger: logger.wait())

    def _each(self, do: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                do(logger)
            except FAILURES as error:
                del self._loggers[name]
                self._say(failure(name, error))


FAILURES = (Exception, SystemExit)
"""What counts as an error in a logger; Ctrl-C and signals stop the training as ever."""


def failure(name: str, error: Exception | SystemExit) -> str:
    """Say that a logger has failed and why."""
    return f"{name}: {reason(error)}; it is left out from here on"


def reason(error: Exception | SystemExit) -> str:
    """Return the message of an error as one line without secrets."""
    if isinstance(error, SystemExit):
        return "it tried to end the process (sys.exit)"
    if isinstance(error, OSError) and error.strerror:
        return masked(error.strerror)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return masked(lines[0]) if lines else type(error).__name__
