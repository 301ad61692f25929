"""Lines of JSON in a stage's folder: the run's own record of its trainings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cm3leon.config import NoSettings
from cm3leon.io import read_log, write_json_lines
from cm3leon.loggers.base import Kind, Logger, Training
from cm3leon.registry import LOGGERS
from cm3leon.secrets import without_secrets

FILES: Mapping[Kind, str] = {"training": "log.jsonl", "validation": "validation.jsonl"}
EVENTS = "events.jsonl"


@LOGGERS.register("jsonl")
class JsonLines(Logger):
    """Lines in log.jsonl and validation.jsonl of each stage's folder; reports need them.

    Lines that the disk refuses are kept, and written with a later one.
    """

    Config = NoSettings  # type: ignore[assignment]

    def start(self, training: Training) -> None:
        self._folder = training.folder
        self._unwritten: dict[str, str] = {}
        _cut(self._folder / EVENTS, training.step)
        self.records = {
            kind: _cut(self._folder / file, training.step) for kind, file in FILES.items()
        }
        """The lines of each kind so far, including those of earlier processes of this training."""

    def figures(self, step: int, kind: Kind, figures: Mapping[str, float]) -> None:
        record = {"step": step, **figures}
        self.records[kind].append(record)
        self._append(FILES[kind], record)

    def event(self, step: int, name: str, details: Mapping[str, Any]) -> None:
        """Record an event at a step."""
        self._append(EVENTS, {"step": step, "event": name, **without_secrets(details)})

    def close(self, *, finished: bool) -> None:
        self._write()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        self._unwritten[name] = self._unwritten.get(name, "") + json.dumps(record) + "\n"
        self._write()

    def _write(self) -> None:
        for name, text in list(self._unwritten.items()):
            file = self._folder / name
            length = file.stat().st_size if file.exists() else 0
            try:
                with file.open("a") as lines:
                    lines.write(text)
                del self._unwritten[name]
            except OSError as error:
                with suppress(OSError):
                    os.truncate(file, length)  # remove the part of a line that was written
                tqdm.write(f"      {file}: {error.strerror}; the training goes on, and tries again")


def _cut(file: Path, step: int) -> list[dict[str, Any]]:
    """Return the lines of a file up to a step, and remove later ones from the file."""
    kept = [record for record in read_log(file, {"step": int}) if record["step"] <= step]
    write_json_lines(file, kept)
    return kept
