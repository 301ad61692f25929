"""What a logger is, and several of them as one."""

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
"""Of figures: of the batches that are trained on, or of documents and images that are not."""


@dataclass(frozen=True)
class Training:
    """What a logger is told of the training that it follows."""

    run: str
    """Name of the run folder."""
    stage: str
    """Name of the stage; the trainings of a run are told apart by it."""
    folder: Path
    """Of the stage, where files of a logger may lie."""
    step: int = 0
    """Where the training goes on; what was logged after it is of a process that was killed."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The experiment as plain data, without secrets."""
    id: str = ""
    """By which a service knows the training, the same when it is resumed; set for loggers in a process of their own."""


class Logger:
    """Takes down what a training says of itself. What it does not take is left out.

    Any error in it ends it and is said once; the training goes on.
    """

    package = ""
    """What has to be installed for it, as Python imports it; "" for nothing."""
    extra = ""
    """The extra of cm3leon that brings it."""
    apart = False
    """Whether it works in a process of its own, so that a network that hangs keeps nobody waiting."""

    @dataclass(kw_only=True)
    class Config:
        """Settings; those of a derived class take its place."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def start(self, training: Training) -> None:
        """Begin, or go on with the record of the same training."""

    def figures(self, step: int, kind: Kind, figures: Mapping[str, float]) -> None:
        """Take down numbers by their names."""

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None:
        """Take down images, uint8 RGB of one size."""

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        """Take down a table of texts, a sequence of them for each row."""

    def close(self, *, finished: bool) -> None:
        """End, of a training that is finished, or that will go on another time."""

    def wait(self) -> None:
        """Wait for the end, for a time that counts from `close`: every logger is told before one is waited for."""


def check_installed(name: str, where: str) -> None:
    """Raise UserError, naming the section `where`, for a logger whose package is not installed."""
    logger = LOGGERS.get(name)
    found = importlib.util.find_spec(logger.package) if logger.package else None
    # A folder of that name, as wandb makes one, is no package.
    if logger.package and (found is None or found.origin is None):
        wanted = f"cm3leon[{logger.extra}]" if logger.extra else logger.package
        raise UserError(
            f"{where} is {name}, which needs the package {logger.package}: pip install '{wanted}'"
        )


def tagged(kind: Kind, figures: Mapping[str, float]) -> dict[str, float]:
    """The figures by the names that services know them by: those of validation have it before them."""
    prefix = "" if kind == "training" else "validation/"
    return {f"{prefix}{name}": value for name, value in figures.items()}


class Loggers:
    """Several loggers, each given what comes until it fails."""

    def __init__(self, loggers: Mapping[str, Logger], say: Callable[[str], None]) -> None:
        """
        Args:
            loggers: by the names that messages call them.
            say: is given a sentence for each that fails.
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
            except Exception as error:
                del self._loggers[name]
                self._say(f"{name}: {reason(error)}; it is left out from here on")


def reason(error: Exception) -> str:
    """What an error says, in a line without secrets."""
    if isinstance(error, OSError) and error.strerror:
        return masked(error.strerror)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return masked(lines[0]) if lines else type(error).__name__
