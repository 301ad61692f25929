"""Processes that start at once: forked from one that has imported what all of them need.

A new interpreter takes seconds to import torch and the package. Here one process does that once,
and each process of a test is a copy of it, with its own environment, standard output and signals.
"""

from __future__ import annotations

import atexit
import importlib
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.secrets import mask_tracebacks
from cm3leon.terminal import guard

ROOT = Path(__file__).resolve().parent.parent
_CONTEXT = multiprocessing.get_context("forkserver")
_ENVIRONMENT = dict(os.environ)
"""As the tests begin, before any of them sets variables of its own."""


class Forked:
    """A process that calls `main` of a module with some words, as a `subprocess.Popen` does it.

        process = Forked("cm3leon.run", ["experiment=digits_smoke", "run=/tmp/run"])
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=60)

    Args:
        module: its `main` takes the list of words and returns the exit code.
        environment: variables added to those of the test.
    """

    def __init__(
        self, module: str, words: Sequence[Any], environment: Mapping[str, str] | None = None
    ) -> None:
        self.args = [module, *map(str, words)]
        # A file cannot fill up and stop the process, as a pipe that nobody reads would.
        self._folder = tempfile.TemporaryDirectory()
        self._said = [str(Path(self._folder.name, name)) for name in ("stdout", "stderr")]
        _begin()
        given = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self._process = _CONTEXT.Process(target=_call, args=(self.args, given, self._said))
        self._process.start()
        self.pid = self._process.pid
        _STARTED.add(self)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; one that takes longer is killed.

        Raises:
            subprocess.TimeoutExpired: if it was killed.
        """
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to its standard output and error, after its end."""
        self.wait(timeout)
        return self.said(0), self.said(1)

    def said(self, stream: int) -> str:
        """What it has written so far to standard output (0) or error (1)."""
        path = Path(self._said[stream])
        return path.read_text() if path.exists() else ""

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self.pid is not None:
            with suppress(ProcessLookupError):  # it may just have ended
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_STARTED: weakref.WeakSet[Forked] = weakref.WeakSet()


@atexit.register
def _kill_all() -> None:
    """Kill what a failed test has left, for which the end of the tests would wait."""
    for process in _STARTED:
        process.kill()


def group(module: str, words: Sequence[Any], ranks: int | None) -> list[Forked]:
    """Ranks of a process group that call a module's `main`; None is a process without a group."""
    if ranks is None:
        return [Forked(module, words)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
    return [Forked(module, words, {**shared, "RANK": str(rank)}) for rank in range(ranks)]


def finish(processes: Sequence[Forked]) -> list[int]:
    """Wait for processes; return their exit codes. What they said is shown if the test fails."""
    for process in processes:
        print(*process.communicate(timeout=240))
    return [process.wait() for process in processes]


def run(
    module: str, words: Sequence[Any], timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Call a module's `main` in a process, and wait for its end."""
    process = Forked(module, words)
    said, errors = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.wait(), said, errors)


def _begin() -> None:
    """Start the process that the others are forked from; once."""
    from multiprocessing import forkserver

    _CONTEXT.set_forkserver_preload(["preloaded"])
    before = dict(os.environ)
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    _become({**_ENVIRONMENT, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    try:
        forkserver.ensure_running()
    finally:
        _become(before)


def _become(environment: Mapping[str, str]) -> None:
    """Replace the variables of this process's environment."""
    os.environ.clear()
    os.environ.update(environment)


def _call(words: Sequence[str], environment: Mapping[str, str], paths: Sequence[str]) -> None:
    """In the new process: call `main` and exit with its code."""
    _become(environment)
    time.tzset()
    os.chdir(ROOT)
    np.random.seed()  # what nobody seeds differs between processes

    # Standard output and error go to the files, also for programs that this process starts.
    for stream, path in enumerate(paths, 1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), line_buffering=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True)
    # As `python -m cm3leon.run` does.
    guard()
    mask_tracebacks()

    # An error ends the process as it would end an interpreter: with a traceback and the code 1.
    module, *rest = words
    sys.argv = [module, *rest]
    try:
        code = importlib.import_module(module).main(rest)
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.exit(code)
