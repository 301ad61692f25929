"""The process of a logger: `python -m cm3leon.loggers.child`, which reads messages and does what they say.

What was logged is remembered beside the stage, with the id by which the service knows the record, so that a resumed
training goes on with the same record, and steps that it repeats after a kill are not logged a second time.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import io
import json
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from cm3leon.io import read_json, write_json
from cm3leon.loggers.base import Logger, Training, reason
from cm3leon.registry import LOGGERS, import_file
from cm3leon.types import UserError

WARNING = "warning: "
"""What a line begins with that says something, and ends nothing."""
SECONDS_ALONE = 30.0
"""What is left to end in, once the training has gone without a word."""
RECORDS = "loggers"
"""Folder beside a stage's files: what each logger has logged."""
WHAT = ("figures", "images", "table")
"""Messages with a step."""


def main() -> None:
    """Serve the messages on the standard input; warnings and what went wrong, or `done`, go to the standard output."""
    # The services' packages print, and ask for passwords: neither reaches the pipes.
    messages, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nowhere, stream)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

    def warn(sentence: str) -> None:
        os.write(answers, f"{WARNING}{sentence}\n".encode())

    try:
        _serve(messages, warn)
        answer = "done"
    except BaseException as error:
        answer = reason(error) if isinstance(error, Exception) else type(error).__name__
    os.write(answers, answer.encode())
    # Packages leave threads and functions for the end of the process, which may hang.
    os._exit(0)


def _serve(file: BinaryIO, warn: Callable[[str], None]) -> None:
    messages = _messages(file)
    first = next(messages)
    training = Training(**{**first["training"], "folder": Path(first["training"]["folder"])})
    _import(first["module"], first["file"])
    name = first["component"]["name"]
    logger = LOGGERS.build(first["component"])
    record = Record(training.folder / RECORDS / f"{name}.json", warn)
    logger.start(replace(training, id=record.id))
    for message in messages:
        if message["do"] == "close":
            logger.close(finished=message["finished"])
            return
        key = f"{message['do']} {message.get('kind') or message['name']}"
        if record.is_new(key, message["step"]):
            _do(logger, message)
            record.add(key, message["step"])
    logger.close(finished=False)  # the training was killed


def _do(logger: Logger, message: dict[str, Any]) -> None:
    step = message["step"]
    if message["do"] == "figures":
        logger.figures(step, message["kind"], message["figures"])
    elif message["do"] == "images":
        logger.images(
            step, message["name"], np.stack([_pixels(each) for each in message["images"]])
        )
    else:
        logger.table(step, message["name"], message["columns"], message["rows"])


def _messages(file: BinaryIO) -> Iterator[dict[str, Any]]:
    for line in file:
        message = json.loads(line)
        yield message
        if message.get("do") == "close":
            return
    timer = threading.Timer(SECONDS_ALONE, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def _import(module: str, file: str | None) -> None:
    """Import the module that registers the logger: that of a package, or of a plugin that was loaded from a path."""
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is None and file is not None:
        import_file(top, Path(file))
    importlib.import_module(module)


class Record:
    """The last step that was logged of each kind of figures, images and tables; the id of the whole.

    A copy of a run, whose original is still where it was, is another training and gets an id of its own; a run that was
    moved keeps its id, and so does one that is seen under two names.

    Args:
        file: where it lies.
        warn: is given a sentence where the training cannot go on with its record.
    """

    def __init__(self, file: Path, warn: Callable[[str], None]) -> None:
        self._file = file.resolve()
        new: dict[str, Any] = {"id": uuid.uuid4().hex[:16], "steps": {}}
        try:
            self._content = _read_record(self._file) if file.is_file() else new
        except UserError as error:
            warn(f"{reason(error)}; a new record is begun")
            self._content = new
        original = Path(self._content.get("file", self._file))
        if _is_copy(self._file, original, self._content["id"]):
            warn(f"{self._file} is a copy of {original}; a new record is begun")
            self._content = new
        self._content["file"] = str(self._file)
        self._write()

    @property
    def id(self) -> str:
        """By which the service knows the training."""
        return self._content["id"]

    def is_new(self, key: str, step: int) -> bool:
        """Whether nothing of a later step, nor of this one, was logged."""
        return step > self._content["steps"].get(key, -1)

    def add(self, key: str, step: int) -> None:
        """Remember that it was logged."""
        self._content["steps"][key] = step
        self._write()

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, self._content)


def _read_record(file: Path) -> dict[str, Any]:
    """A record as it was written. Raises UserError for a damaged one."""
    content: dict[str, Any] = read_json(file, {"id": str, "steps": {str: int}, "file?": str})
    # Older ones, which have no file, did not tell figures, images and tables of one name apart.
    if "file" not in content:
        steps = content["steps"].items()
        content["steps"] = {f"{what} {name}": step for name, step in steps for what in WHAT}
    return content


def _is_copy(file: Path, original: Path, known: str) -> bool:
    """Whether the record is also where it was written last, in another file."""
    try:
        return not file.samefile(original) and _read_record(original)["id"] == known
    except (OSError, UserError):
        return False


if __name__ == "__main__":
    main()
