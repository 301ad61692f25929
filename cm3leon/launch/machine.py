"""Jobs on this machine, one after the other: commands as processes, looked after until they end."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
    """Runs jobs to their end, each after those that it depends on.

    `devices` are shared out among the `parallel` commands that run at a time; each trains in
    `processes` of them, one a GPU if that is None. A command that died is started again until it
    has died `max_deaths` times at one place.
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
        """The commands with their exit codes; those of jobs
        whose predecessors failed are left out."""
        ended: list[Submitted] = []
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.parallel):
            slots.put(slot)

        def look_after(job: Job, number: int) -> Submitted:
            slot = slots.get()
            try:
                return self._look_after(job, number, slot)
            finally:
                slots.put(slot)

        succeeded: set[str] = set()
        with ThreadPoolExecutor(self.parallel) as pool:
            for job in jobs:
                if self.stopping or not (job.always or succeeded.issuperset(job.after)):
                    continue
                done = list(
                    pool.map(look_after, [job] * len(job.commands), range(len(job.commands)))
                )
                ended += done
                if all(each.code == 0 for each in done):
                    succeeded.add(job.name)
        return ended

    def run_detached(self, jobs: Sequence[Job]) -> list[Submitted]:
        """`run`, as a job that SIGTERM stops and a closed terminal does not."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self.stop)
        return self.run(jobs)

    def stop(self, *_: Any) -> None:
        """Asks what runs to write a checkpoint and end; nothing is started any more."""
        self.stopping = True
        for process in list(self.running.values()):
            process.send_signal(signal.SIGTERM)

    def log(self, job: Job, number: int) -> Path | None:
        """What a command prints."""
        return None if self.to_terminal else self.launch.logs / f"{job.name}-{number}.log"

    def _look_after(self, job: Job, number: int, slot: int) -> Submitted:
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
        share = max(1, len(self.devices) // self.parallel)
        devices = [
            self.devices[(slot * share + place) % len(self.devices)]
            for place in range(share)
            if self.devices
        ]
        count = (self.processes or len(devices) or 1) if together else 1
        module = ["cm3leon.launch.elastic", str(count)] if count > 1 else ["cm3leon.run"]
        path = os.pathsep.join(filter(None, [str(self.launch.code), os.environ.get("PYTHONPATH")]))
        # The working folder stays as it is, for relative paths,
        # but is not where Python looks for the code.
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
            return self._wait(
                subprocess.Popen(
                    words,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        self.running[process.pid] = process
        if self.stopping:
            process.send_signal(signal.SIGTERM)
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code  # as a shell says it
        finally:
            del self.running[process.pid]
