"""The launchers: this process, several processes of this machine, a job of this machine,
or SLURM."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedSubmissionError, UncompletedJobError

from cm3leon.config import NonNegativeInt, PositiveFloat, PositiveInt, from_mapping, to_mapping
from cm3leon.launch import cluster
from cm3leon.launch.follow import refuse_twice
from cm3leon.launch.jobs import Job, Launch, Submitted, begin_launch
from cm3leon.launch.machine import LocalJobs, gpus
from cm3leon.launch.work import SlurmTask
from cm3leon.registry import LAUNCHERS
from cm3leon.terminal import is_printable, printable
from cm3leon.types import UserError

YEAR = 365 * 24 * 60
"""Minutes. Jobs of this machine have no time limit, but submitit needs one."""
UNSEEN = 66
"""Exit code of a job with a node that does not see the run folder (EX_NOINPUT of sysexits.h)."""


class Launcher:
    """Base of the launchers. Registered in `LAUNCHERS`, built as `cls(config)`."""

    detached: bool = False
    """Whether `launch` returns at once while the jobs continue."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def gpus(self) -> int:
        """GPUs of a training on all nodes; 1 if none are asked for."""
        return 1

    @property
    def nodes(self) -> int:
        """Nodes of a training."""
        return 1

    def processes(self, stage: str) -> int:
        """Processes that train a stage together, on all nodes."""
        return 1

    def parts(self, stage: str) -> int:
        """Number of commands that make a stage in shards, or a study's answers."""
        return 1

    def resources(self, stage: str) -> Mapping[str, Any]:
        """Settings that differ for the job of a stage."""
        return {}

    def launch(self, jobs: Sequence[Job], folder: Path) -> list[Submitted]:
        """See `cm3leon.launch.submit`."""
        raise NotImplementedError


@LAUNCHERS.register("here")
class Here(Launcher):
    """In this process, or as a rank of torchrun or srun;
    several commands run one after the other."""

    @dataclass(kw_only=True)
    class Config:
        gpus: PositiveInt = 1
        """GPUs on all nodes that `plan` calculates with;
        a training uses the ranks that it is started on."""
        gpus_per_node: PositiveInt = 8
        """GPUs of a node that `plan` calculates with."""

    config: Config

    @property
    def gpus(self) -> int:
        return self.config.gpus

    @property
    def nodes(self) -> int:
        return -(-self.config.gpus // self.config.gpus_per_node)

    def launch(self, jobs: Sequence[Job], folder: Path) -> list[Submitted]:
        return _run_to_the_end("here", jobs, folder, devices=gpus(), processes=1)


@LAUNCHERS.register("torchrun")
class Torchrun(Launcher):
    """On this machine, in several processes that torchrun starts; several commands run one after
    the other."""

    @dataclass(kw_only=True)
    class Config:
        processes: PositiveInt | None = None
        """Processes of a training; null: one for each GPU, or a single one without GPUs."""

    config: Config

    @property
    def gpus(self) -> int:
        return self.config.processes or 1

    def processes(self, stage: str) -> int:
        return self.config.processes or len(gpus()) or 1

    def launch(self, jobs: Sequence[Job], folder: Path) -> list[Submitted]:
        return _run_to_the_end(
            "torchrun", jobs, folder, devices=gpus(), processes=self.config.processes
        )


@LAUNCHERS.register("local")
class Local(Launcher):
    """A job of this machine (submitit's local executor) that continues
    when the terminal is closed."""

    detached = True

    @dataclass(kw_only=True)
    class Config:
        processes: PositiveInt | None = None
        """Processes of a training; null: one for each GPU, or a single one without GPUs."""
        array_parallelism: PositiveInt = 1
        """Most commands of a job that run at the same time; they share the GPUs."""
        parts: PositiveInt = 1
        """Number of commands that make a stage in shards, or a study's answers."""
        max_deaths: PositiveInt = 3
        """A command that dies is started again,
        until it has died this many times at the same step."""

    config: Config

    @property
    def gpus(self) -> int:
        return self.config.processes or 1

    def processes(self, stage: str) -> int:
        return self.config.processes or len(gpus()) // self.config.array_parallelism or 1

    def parts(self, stage: str) -> int:
        return self.config.parts

    def launch(self, jobs: Sequence[Job], folder: Path) -> list[Submitted]:
        refuse_twice(folder)
        launch = begin_launch(folder)
        launch.write("local", jobs)
        parallel, deaths = self.config.array_parallelism, self.config.max_deaths
        machine = LocalJobs(launch, gpus(), self.config.processes, parallel, deaths)

        # One process, which outlives the terminal, runs all jobs.
        executor = submitit.LocalExecutor(launch.logs)
        executor.update_parameters(
            timeout_min=YEAR, gpus_per_node=len(machine.devices), stderr_to_stdout=True
        )
        with _detached():
            process = executor.submit(machine.run_detached, jobs).job_id

        submitted = []
        for job in jobs:
            for number in range(len(job.commands)):
                submitted.append(Submitted(job.name, number, process, machine.log(job, number)))
        launch.write("local", jobs, submitted)
        return submitted


@LAUNCHERS.register("slurm")
class Slurm(Launcher):
    """Jobs of a SLURM cluster (submitit's Slurm executor), with dependencies and arrays; they
    requeue themselves."""

    detached = True

    @dataclass(kw_only=True)
    class Config:
        nodes: PositiveInt = 1
        """Nodes of a job."""
        gpus_per_node: NonNegativeInt = 0
        """GPUs of each node; 0 asks for none."""
        tasks_per_node: PositiveInt | None = None
        """Processes on each node; null: one for each GPU, or a single one without GPUs."""
        cpus_per_task: PositiveInt | None = None
        """CPUs of each process; null: the cluster's default."""
        mem_gb: PositiveFloat | None = None
        """Memory of each node in GB; null: the cluster's default."""
        partition: str | None = None
        """Partition or partitions of the jobs; null: the cluster's default."""
        account: str | None = None
        """Account to charge; null: the user's default."""
        qos: str | None = None
        """Quality of service; null: the default."""
        constraint: str | None = None
        """Features that the nodes must have; null: none."""
        timeout_min: PositiveInt = 1440
        """Time limit in minutes; a job that reaches it writes a checkpoint and requeues itself."""
        signal_delay_s: PositiveInt = 120
        """Seconds before the time limit at which a job is asked to stop; longer than a step and a
        checkpoint take."""
        max_timeouts: NonNegativeInt = 100
        """Number of times that a job may reach its limit before it ends for good."""
        max_deaths: PositiveInt = 3
        """A job that dies is queued again, until it has died this many times at the same step."""
        array_parallelism: PositiveInt = 64
        """Most elements of an array that run at the same time."""
        parts: PositiveInt = 8
        """Elements of the arrays that make stages in shards, or a study's answers."""
        setup: list[str] = field(default_factory=list)
        """Shell lines at the start of each job: modules, environment variables."""
        sbatch: dict[str, Any] = field(default_factory=dict)
        """Further parameters of sbatch, without the dashes: {exclusive: true, reservation:
        name}."""
        stages: dict[str, dict[str, Any]] = field(default_factory=dict)
        """Settings of single jobs, by the name of the stage: {tokens: {parts: 256, gpus_per_node:
        1}}."""

        def check(self) -> None:
            for name, given in self.stages.items():
                from_mapping(Slurm.Config, given, f"stages.{name}")

            # Each of these texts becomes a line of the batch script; a line feed would end it.
            texts = {
                "partition": self.partition,
                "account": self.account,
                "qos": self.qos,
                "constraint": self.constraint,
            }
            for key, value in self.sbatch.items():
                if not re.fullmatch(r"[a-z][a-z0-9_-]*", key):
                    raise UserError(
                        f"sbatch.{printable(key)} is not an option of sbatch; write it in small "
                        "letters, without the dashes before it"
                    )
                texts[f"sbatch.{key}"] = str(value)
            for name, text in texts.items():
                if text is not None and not is_printable(text):
                    raise UserError(
                        f"{name} is {printable(text)}; it must not have control characters such as "
                        "line feeds"
                    )

    config: Config

    @property
    def gpus(self) -> int:
        return self.config.nodes * max(1, self.config.gpus_per_node)

    @property
    def nodes(self) -> int:
        return self.config.nodes

    def processes(self, stage: str) -> int:
        given = {**to_mapping(self.config), **self.resources(stage)}
        return given["nodes"] * (given["tasks_per_node"] or max(1, given["gpus_per_node"]))

    def parts(self, stage: str) -> int:
        return self.resources(stage).get("parts", self.config.parts)

    def resources(self, stage: str) -> Mapping[str, Any]:
        return self.config.stages.get(stage, {})

    def of(self, job: Job) -> Config:
        """The settings of one job."""
        given = {**to_mapping(self.config), "stages": {}, **job.resources}
        if not job.together:
            given |= {
                "nodes": 1,
                "tasks_per_node": 1,
                "gpus_per_node": min(1, given["gpus_per_node"]),
            }
        return from_mapping(Slurm.Config, given, "launcher")

    def launch(self, jobs: Sequence[Job], folder: Path) -> list[Submitted]:
        cluster.check_commands()
        if not is_printable(str(folder)):
            raise UserError(
                f"run is {printable(str(folder))}; for jobs of SLURM it must not have control "
                "characters such as line feeds"
            )

        # Refuse what the cluster does not have before anything is queued.
        settings = {job.name: self.of(job) for job in jobs}
        known = cluster.partitions()
        for each in settings.values():
            cluster.check_fits(
                nodes=each.nodes,
                gpus_per_node=each.gpus_per_node,
                partition=each.partition,
                known=known,
            )
        for account in dict.fromkeys(each.account for each in settings.values()):
            cluster.check_account(account)
        refuse_twice(folder)

        # Queue the jobs; if sbatch refuses one, cancel those before it.
        launch = begin_launch(folder)
        launch.write("slurm", jobs)
        ids: dict[str, str] = {}
        submitted: list[Submitted] = []
        for job in jobs:
            try:
                queued = _queue(job, settings[job.name], launch, [ids[name] for name in job.after])
            except (FailedSubmissionError, UncompletedJobError) as error:
                cluster.cancel(list(ids.values()))
                shutil.rmtree(launch.folder)
                said = str(error).strip().splitlines()[-1].removeprefix("sbatch: error: ")
                raise UserError(
                    f"sbatch refused the job {job.name}, and nothing is queued: {said}"
                ) from error
            ids[job.name] = queued[0].id.partition("_")[0]
            submitted += queued
        launch.write("slurm", jobs, submitted)
        return submitted


def _queue(job: Job, config: Slurm.Config, launch: Launch, after: Sequence[str]) -> list[Submitted]:
    """Give one job to sbatch.

    Args:
        after: ids of jobs that must succeed before it starts, or only end if `job.always`.
    """
    executor = submitit.SlurmExecutor(launch.logs, max_num_timeout=config.max_timeouts)
    executor.update_parameters(**_sbatch(job, config, launch, after))
    tasks = []
    for number, command in enumerate(job.commands):
        tasks.append(SlurmTask(command, launch.journal(job.name, number)))

    submitted = []
    for number, queued in enumerate(executor.submit_array(tasks)):
        submitted.append(Submitted(job.name, number, queued.job_id, queued.paths.stdout))
    return submitted


def _sbatch(job: Job, config: Slurm.Config, launch: Launch, after: Sequence[str]) -> dict[str, Any]:
    """The parameters of submitit's Slurm executor for a job."""
    # Settings that are left to the cluster where they are not given.
    given: dict[str, Any] = {
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "gpus_per_node": config.gpus_per_node or None,
        "cpus_per_task": config.cpus_per_task,
        "mem": config.mem_gb and f"{round(config.mem_gb * 1000)}M",
    }
    if after:
        kind = "afterany" if job.always else "afterok"
        given["dependency"] = f"{kind}:{':'.join(after)}"

    # Since SLURM 22.05, srun does not take the CPUs of a task from sbatch.
    srun = ["--kill-on-bad-exit=1"]
    if config.cpus_per_task:
        srun.append(f"--cpus-per-task={config.cpus_per_task}")

    return {
        **{name: value for name, value in given.items() if value is not None},
        # Only characters that sbatch takes as they are.
        "job_name": re.sub(r"[^\w.+-]+", "-", f"{launch.folder.parent.parent.name}.{job.name}"),
        "time": config.timeout_min,
        "nodes": config.nodes,
        "ntasks_per_node": config.tasks_per_node or max(1, config.gpus_per_node),
        "signal_delay_s": config.signal_delay_s,
        "array_parallelism": config.array_parallelism,
        "stderr_to_stdout": True,
        "srun_args": srun,
        "setup": [*config.setup, *_before(job, config, launch)],
        "teardown": _after(job, config, launch),
        "additional_parameters": {"requeue": True, "kill-on-invalid-dep": "yes", **config.sbatch},
    }


def _before(job: Job, config: Slurm.Config, launch: Launch) -> Iterator[str]:
    """Shell lines before the step: the copied code is used,
    and all nodes must see the run folder."""
    yield f"export PYTHONPATH={shlex.quote(str(launch.code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    # Relative paths need the working folder, but Python must not look for the code there.
    yield "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1"

    # A node that does not see the folder cannot report it: the batch script writes the event.
    if config.nodes > 1:
        journal = shlex.quote(str(launch.journal(job.name, "NUMBER"))).replace(
            "NUMBER", "${SLURM_ARRAY_TASK_ID:-0}"
        )
        event = """printf '{"time": %d, "event": "unseen", "host": "%s"}\\n' "$(date +%s)" "$SLURM_JOB_NODELIST\""""
        look = f"srun --nodes={config.nodes} --ntasks={config.nodes} --ntasks-per-node=1 test -d"
        yield f"{look} {shlex.quote(str(launch.code))} || {{ {event} >>{journal}; exit {UNSEEN}; }}"


def _after(job: Job, config: Slurm.Config, launch: Launch) -> list[str]:
    """Shell lines after the step, see `work.after_step`."""
    words = [sys.executable, "-m", "cm3leon.launch.work", str(launch.folder), job.name]
    after_step = f"{shlex.join(words)} ${{SLURM_ARRAY_TASK_ID:-0}} {config.max_deaths}"
    return ["code=$?", f"[ $code = 0 ] || exec {after_step} $code"]


def _run_to_the_end(
    name: str, jobs: Sequence[Job], folder: Path, *, devices: tuple[str, ...], processes: int | None
) -> list[Submitted]:
    """Run jobs in processes of this machine and wait; a single command prints to the terminal."""
    launch = begin_launch(folder)
    launch.write(name, jobs)
    alone = sum(len(job.commands) for job in jobs) == 1
    machine = LocalJobs(launch, devices, processes, to_terminal=alone)
    before = signal.signal(signal.SIGTERM, machine.stop)
    try:
        submitted = machine.run(jobs)
    finally:
        signal.signal(signal.SIGTERM, before)
    launch.write(name, jobs, submitted)
    return submitted


@contextmanager
def _detached() -> Iterator[None]:
    """What is started inside outlives the terminal, and keeps none of its files open."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in range(3)]
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        for number in range(3):
            os.dup2(nothing, number)
        yield
    finally:
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nothing)
        signal.signal(signal.SIGHUP, before)
