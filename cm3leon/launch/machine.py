"""Jobs on this machine, one after the other: commands as processes, watched until they end."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cm3leon.launch.jobs import Command, Job, Launch, Submitted
from cm3leon.launch.journal import outcome, progress, read_events, write_event


def gpus() -> tuple[str, ...]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return tuple(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
    import torch

    return tuple(map(str, range(torch.cuda.device_count())))


@dataclass
class LocalJobs:
    """Runs jobs to their end, each after those that it waits for.

    The `parallel` commands that run at a time share the `devices`. A training uses `processes`
    processes, or one for each of its devices. A command that dies is started again, until it has
    died `max_deaths` times at one point.
    """

    launch: Launch
    devices: tuple[str, ...] = ()
    processes: int | None = None
    parallel: int = 1
    max_deaths: int = 1
    to_terminal: bool = False
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    stopping: bool = False

    def run(self, jobs: Sequence[Job]) -> list[Submitted]:
        """Run jobs; return their commands with exit codes,
        without jobs whose predecessors failed."""
        ended: list[Submitted] = []
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.parallel):
            slots.put(slot)

        def watch(job: Job, number: int) -> Submitted:
            slot = slots.get()
            try:
                return self._watch(job, number, slot)
            finally:
                slots.put(slot)

        succeeded: set[str] = set()
        with ThreadPoolExecutor(self.parallel) as pool:
            for job in jobs:
                if self.stopping or not (job.always or succeeded.issuperset(job.after)):
                    continue
                done = list(pool.map(partial(watch, job), range(len(job.commands))))
                ended += done
                if all(each.code == 0 for each in done):
                    succeeded.add(job.name)
        return ended

    def run_detached(self, jobs: Sequence[Job]) -> list[Submitted]:
        """`run`, in a process that SIGTERM stops and a closed terminal does not."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self.stop)
        return self.run(jobs)

    def stop(self, *_: Any) -> None:
        """Ask running commands to write a checkpoint and end, and start no more."""
        self.stopping = True
        for process in list(self.running.values()):
            process.send_signal(signal.SIGTERM)

    def log(self, job: Job, number: int) -> Path | None:
        """The file of what a command prints; None if it prints to the terminal."""
        return None if self.to_terminal else self.launch.logs / f"{job.name}-{number}.log"

    def _watch(self, job: Job, number: int, slot: int) -> Submitted:
        """Run a command, again if it died, and keep its journal."""
        command, journal = job.commands[number], self.launch.journal(job.name, number)
        max_deaths = job.resources.get("max_deaths", self.max_deaths)
        log = self.log(job, number)
        title = f"{job.name} {number + 1}/{len(job.commands)}"
        if log:
            print(f"{title}: log {log}", flush=True)

        code, event = 0, "died"
        while event == "died" and not self.stopping:
            write_event(journal, "started", at=progress(command))
            code = self._call(command, log, slot, together=job.together)
            event, details = outcome(code, progress(command), read_events(journal), max_deaths)
            write_event(journal, event, **details)

        if log:
            print(f"{title}: {event}", flush=True)
        return Submitted(job.name, number, str(os.getpid()), log, code)

    def _call(self, command: Command, log: Path | None, slot: int, *, together: bool) -> int:
        """Run a command in its slot's share of the devices; return its exit code."""
        share = max(1, len(self.devices) // self.parallel)
        devices = []
        if self.devices:
            first = slot * share
            devices = [self.devices[(first + k) % len(self.devices)] for k in range(share)]
        count = (self.processes or len(devices) or 1) if together else 1
        module = ["cm3leon.launch.elastic", str(count)] if count > 1 else ["cm3leon.run"]

        # Relative paths need the working folder, but Python must not look for the code there.
        path = os.pathsep.join(filter(None, [str(self.launch.code), os.environ.get("PYTHONPATH")]))
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
        }
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)

        words = [sys.executable, "-m", *module, *command]
        if log is None:
            return self._wait(subprocess.Popen(words, env=environment))
        with log.open("ab") as output:
            process = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            return self._wait(process)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        self.running[process.pid] = process
        if self.stopping:
            process.send_signal(signal.SIGTERM)
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code  # a signal's number, as shells report it
        finally:
            del self.running[process.pid]
