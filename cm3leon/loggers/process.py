"""A logger in a process of its own, which gets its work as lines of JSON.

    training ── queue ── thread ── pipe ──▶ child.py: wandb, mlflow, trackio ──▶ a network

The training puts messages into the queue and goes on. Whatever happens behind the queue (an import
fails, a network hangs, a library ends its process) is reported once and delays nobody: messages for
which a full queue has no room are left out, and a process that does not end in time is killed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cm3leon.config import Component, to_mapping
from cm3leon.loggers.base import Kind, Logger, Training, reason
from cm3leon.loggers.child import WARNING
from cm3leon.registry import LOGGERS
from cm3leon.secrets import masked

HERE = Path(__file__).resolve().parents[2]
"""Folder of the package."""
WAITING = 1000
"""Largest number of messages in the queue."""
SECONDS_TO_END = 60.0
"""Time of the process at the end of a training to send the rest."""
SECONDS_TO_STOP = 10.0
"""The same if the training stops early: SLURM kills a job 30 seconds (KillWait) after SIGTERM."""


class Process(Logger):
    """A logger that works in another process.

    Args:
        component: the logger and its settings.
        say: called with a sentence if the logger fails.
    """

    def __init__(self, component: Component, say: Callable[[str], None]) -> None:
        self._component, self._say = component, say
        self._messages: queue.SimpleQueue[Callable[[], dict[str, Any]] | None]
        self._messages = queue.SimpleQueue()
        self._left_out = 0
        self._failed = False

    def start(self, training: Training) -> None:
        module = sys.modules[LOGGERS.get(self._component.name).__module__]
        top = sys.modules[module.__name__.partition(".")[0]]

        # The first message tells which logger to build, and for which training.
        first = {
            "module": module.__name__,
            "file": getattr(top, "__file__", None),
            "component": to_mapping(self._component),
            "training": {**asdict(training), "folder": str(training.folder.absolute())},
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cm3leon.loggers.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])},
            # Ctrl-C and SLURM's signals are for the training, which then ends this process.
            start_new_session=True,
        )

        # One thread sends, the other listens for warnings, errors and the end.
        self._put(lambda: first)
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._send, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def figures(self, step: int, kind: Kind, figures: Mapping[str, float]) -> None:
        given = dict(figures)
        self._put(
            lambda: {
                "do": "figures",
                "step": step,
                "kind": kind,
                "figures": {name: float(value) for name, value in given.items()},
            }
        )

    def images(self, step: int, name: str, images_BHWC: np.ndarray) -> None:
        images = images_BHWC.copy()
        self._put(
            lambda: {"do": "images", "step": step, "name": name, "images": list(map(_png, images))}
        )

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Any]) -> None:
        rows = [list(map(masked, row)) for row in rows]
        self._put(
            lambda: {"do": "table", "step": step, "name": name, "columns": columns, "rows": rows}
        )

    def close(self, *, finished: bool) -> None:
        self._seconds = SECONDS_TO_END if finished else SECONDS_TO_STOP
        self._end = time.monotonic() + self._seconds
        # The last two messages are never left out, however full the queue is.
        self._messages.put(lambda: {"do": "close", "finished": finished})
        self._messages.put(None)

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(max(0.0, self._end - time.monotonic()))
        if self._threads[1].is_alive():
            self._fail(f"did not end within {self._seconds:.0f} seconds; some of it may be missing")
        elif self._left_out:
            self._fail(f"{self._left_out:,} messages were left out, as it was too slow for them")

        # Processes that it has started belong to its session, and end with it.
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _put(self, message: Callable[[], dict[str, Any]] | None) -> None:
        """Queue a function that builds a message; the sending thread calls it."""
        if self._messages.qsize() < WAITING:
            self._messages.put(message)
        else:
            self._left_out += 1

    def _send(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while (message := self._messages.get()) is not None:
                # A message that cannot be written does not keep the others from being sent.
                try:
                    line = json.dumps(message()).encode()
                except Exception as error:
                    self._fail(f"what cannot be sent is left out: {reason(error)}")
                    continue
                pipe.write(line + b"\n")
                pipe.flush()
        except OSError:
            pass  # the process has ended, and the other thread reports why
        finally:
            with suppress(OSError):
                pipe.close()

    def _listen(self) -> None:
        """Pass on warnings until the process ends, and report an end that is not `done`."""
        assert self._process.stdout is not None
        said = ""
        for line in self._process.stdout:
            said = line.decode(errors="replace").strip()
            if said.startswith(WARNING):
                self._say(f"{self._component.name}: {masked(said.removeprefix(WARNING))}")
                said = ""
        if said != "done":
            self._fail(f"{said or 'its process has ended'}; it is left out from here on")

    def _fail(self, what: str) -> None:
        if not self._failed:
            self._failed = True
            self._say(f"{self._component.name}: {masked(what)}")


def _png(image_HWC: np.ndarray) -> str:
    """Write an image as a PNG file in base64."""
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
