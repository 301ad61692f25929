"""The log of a running training: its loggers, and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cm3leon.config import Component, NoSettings
from cm3leon.loggers.base import FAILURES, Logger, Loggers, Training, failure
from cm3leon.loggers.jsonl import JsonLines
from cm3leon.loggers.process import Process
from cm3leon.loggers.tensorboard import TensorBoard
from cm3leon.registry import LOGGERS
from cm3leon.training.distributed import Ranks
from cm3leon.training.meter import Record
from cm3leon.types import UserError


@dataclass(frozen=True)
class Tracking:
    """Where a training is logged besides the JSON lines in its folder,
    and the settings it tells there."""

    loggers: Sequence[Component] = (Component("tensorboard", TensorBoard.Config()),)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The experiment as plain data, without secrets."""


class TrainingLog:
    """A training's loggers, events and progress bar; on all ranks but the first it does nothing.

    Args:
        step: where the training continues. Later records and events are of a run that was killed,
            and are cut off.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        tracking: Tracking,
        *,
        title: str,
        step: int,
        first: int,
        last: int,
    ) -> None:
        self._folder = folder.absolute()
        self._writes = ranks.first
        self._step, self._last = step, last
        self._lines = JsonLines(NoSettings())
        self._loggers = Loggers({}, self._say)
        self._validated: set[int] = set()
        if self._writes:
            training = Training(
                run=self._folder.parent.name,
                stage=self._folder.name,
                folder=self._folder,
                step=step,
                settings=tracking.settings,
            )
            self._lines.start(training)
            self._validated = {record["step"] for record in self._lines.records["validation"]}
            self._loggers = Loggers(_named(tracking.loggers, self._say), self._say)
            self._loggers.start(training)
        self._progress = tqdm(
            total=last - first,
            initial=step - first,
            desc=title,
            unit="step",
            mininterval=2.0,
            dynamic_ncols=True,
            disable=not self._writes,
        )

    @property
    def records(self) -> list[Record]:
        """The records of the whole training, on the first rank."""
        return self._lines.records["training"] if self._writes else []

    @property
    def images(self) -> Loggers | None:
        """Takes images and tables, on the first rank."""
        return self._loggers if self._writes else None

    def record(self, record: Record) -> None:
        """Log figures under their `step`."""
        if not self._writes:
            return
        figures = {name: value for name, value in record.items() if name != "step"}
        self._lines.figures(record["step"], "training", figures)
        self._loggers.figures(record["step"], "training", figures)
        if "loss" in record:
            self._progress.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)

    def validation(self, step: int, figures: Mapping[str, float]) -> None:
        """Log figures of the validation documents."""
        if self._writes and figures:
            self._lines.figures(step, "validation", figures)
            self._loggers.figures(step, "validation", figures)

    def has_validation(self, step: int) -> bool:
        """Whether figures of this step are logged, on the first rank."""
        return step in self._validated

    def event(self, step: int, kind: str, **details: Any) -> None:
        """Log an event of a step, and print it above the progress bar."""
        if self._writes:
            self._lines.event(step, kind, details)
            said = ", ".join(f"{name} {_short(value)}" for name, value in details.items())
            tqdm.write(f"      step {step}: {kind}: {said}")

    def advance(self) -> None:
        """Count a step."""
        self._step += 1
        self._progress.update()

    def close(self) -> None:
        """Close the loggers."""
        self._progress.close()
        if self._writes:
            self._lines.close(finished=True)
            self._loggers.close(finished=self._step == self._last)

    def _say(self, sentence: str) -> None:
        """Print that a logger has failed."""
        tqdm.write(f"      {self._folder}: {sentence}; the training goes on")


def _named(loggers: Sequence[Component], say: Callable[[str], None]) -> dict[str, Logger]:
    """The loggers by name, without the JSON lines, which are always written.

    Raises:
        UserError: for settings that a logger refuses when it is built.
    """
    named: dict[str, Logger] = {}
    for each in loggers:
        if each.name == "jsonl":
            continue
        if LOGGERS.get(each.name).apart:
            named[each.name] = Process(each, say)
            continue
        try:
            named[each.name] = LOGGERS.build(each)
        except UserError:
            raise
        except FAILURES as error:
            say(failure(each.name, error))
    return named


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) > 5:
        return f"{', '.join(map(str, value[:5]))} and {len(value) - 5} more"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
