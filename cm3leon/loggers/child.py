"""The process of a logger, `python -m cm3leon.loggers.child`: it reads messages and obeys them.

A file beside the stage remembers the last logged steps, and the id of the record at the service. A
resumed training therefore continues the same record, and does not log again the steps that it
repeats after a kill:

    first process    step 10 20 30 40  killed; its last checkpoint is of step 20
    second process           step 30 40 50 60
    logged                10 20 30 40 50 60
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
"""Beginning of an answer that is only a warning; the process goes on."""
SECONDS_ALONE = 30.0
"""Time to finish after the training has ended without a `close`."""
RECORDS = "loggers"
"""Folder in that of a stage, with a record for each logger."""
WHAT = ("figures", "images", "table")
"""Kinds of messages that have a step."""


def main() -> None:
    """Serve the messages on the standard input.

    Warnings go to the standard output, and at the end an error or `done`.
    """
    # The services' packages print, and ask for passwords; the pipes must see neither.
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

    # Packages leave threads, and functions that run at exit. They may hang, so they are skipped.
    os._exit(0)


def _serve(file: BinaryIO, warn: Callable[[str], None]) -> None:
    messages = _messages(file)
    first = next(messages)
    training = Training(**{**first["training"], "folder": Path(first["training"]["folder"])})
    _import(first["module"], first["file"])
    name = first["component"]["name"]
    logger = LOGGERS.build(first["component"])

    # Continue the record of an earlier process, and pass on only what it does not have.
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
    """Import the module that registers the logger, of a package or of a plugin from a path."""
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is None and file is not None:
        import_file(top, Path(file))
    importlib.import_module(module)


class Record:
    """The id of a training's record, and the last logged step of each kind of message.

    A copy of a run whose original is still in its place is another training, and gets an id of its
    own. A run that was moved keeps its id, and so does one that is reached by two paths.

    Args:
        file: where the record is kept.
        warn: called with a sentence if the training cannot continue its record.
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
        """Id of the training at the service."""
        return self._content["id"]

    def is_new(self, key: str, step: int) -> bool:
        """Tell whether neither this step nor a later one was logged."""
        return step > self._content["steps"].get(key, -1)

    def add(self, key: str, step: int) -> None:
        """Remember that a step was logged."""
        self._content["steps"][key] = step
        self._write()

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, self._content)


def _read_record(file: Path) -> dict[str, Any]:
    """Read a record. Raises UserError for a damaged one."""
    content: dict[str, Any] = read_json(file, {"id": str, "steps": {str: int}, "file?": str})

    # Older records have no "file", and one step for figures, images and tables of the same name.
    if "file" not in content:
        steps = content["steps"].items()
        content["steps"] = {f"{what} {name}": step for name, step in steps for what in WHAT}
    return content


def _is_copy(file: Path, original: Path, known: str) -> bool:
    """Tell whether another file, in which the record was last written, still holds it."""
    try:
        return not file.samefile(original) and _read_record(original)["id"] == known
    except (OSError, UserError):
        return False


if __name__ == "__main__":
    main()
