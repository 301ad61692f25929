"""Where commands run: in this process, in several of this machine, in a job of this machine, or on a SLURM cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cm3leon.config import NonNegativeInt, PositiveFloat, PositiveInt, from_mapping, to_mapping
from cm3leon.launch.jobs import Job, Submitted
from cm3leon.registry import LAUNCHERS


class Launcher(Protocol):
    """What a registered launcher offers."""

    detached: bool
    """Whether `launch` returns at once, and the jobs go on without it."""

    @property
    def gpus(self) -> int:
        """GPUs of a training, on all nodes together; 1 where none are asked for."""

    def launch(self, jobs: Sequence[Job], folder: Path) -> list[Submitted]:
        """See `cm3leon.launch.submit`."""


@LAUNCHERS.register("here")
class Here:
    """In this process, or as a rank of torchrun or srun; several commands run one after the other."""

    detached = False

    @dataclass(kw_only=True)
    class Config:
        gpus: PositiveInt = 1
        """GPUs that `plan` counts with, on all nodes together; the training takes the ranks that it is started on."""
        gpus_per_node: PositiveInt = 8
        """GPUs of a node, in the files of older runs; nothing depends on it."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def gpus(self) -> int:
        return self.config.gpus

    def launch(self, jobs: Sequence[Job], folder: Path) -> list[Submitted]:
        raise NotImplementedError


@LAUNCHERS.register("torchrun")
class Torchrun:
    """On this machine, in several processes that torchrun starts; several commands run one after the other."""

    detached = False

    @dataclass(kw_only=True)
    class Config:
        processes: PositiveInt | None = None
        """Processes of a training; null = one a GPU, or a single one without a GPU."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def gpus(self) -> int:
        return self.config.processes or 1

    def launch(self, jobs: Sequence[Job], folder: Path) -> list[Submitted]:
        raise NotImplementedError


@LAUNCHERS.register("local")
class Local:
    """A job of this machine (submitit's local executor) that goes on when the terminal is closed."""

    detached = True

    @dataclass(kw_only=True)
    class Config:
        processes: PositiveInt | None = None
        """Processes of a training; null = one a GPU, or a single one without a GPU."""
        array_parallelism: PositiveInt = 1
        """Commands of a job that run at the same time, at most."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def gpus(self) -> int:
        return self.config.processes or 1

    def launch(self, jobs: Sequence[Job], folder: Path) -> list[Submitted]:
        raise NotImplementedError


@LAUNCHERS.register("slurm")
class Slurm:
    """Jobs of a SLURM cluster (submitit's Slurm executor), with dependencies and arrays; they requeue themselves."""

    detached = True

    @dataclass(kw_only=True)
    class Config:
        nodes: PositiveInt = 1
        """Nodes of a job."""
        gpus_per_node: NonNegativeInt = 0
        """GPUs of each node; 0 asks for none."""
        tasks_per_node: PositiveInt | None = None
        """Processes on each node; null = one a GPU, or a single one without GPUs."""
        cpus_per_task: PositiveInt | None = None
        """CPUs of each process; null = the cluster's default."""
        mem_gb: PositiveFloat | None = None
        """Memory of each node in GB; null = the cluster's default."""
        partition: str | None = None
        """Where the jobs queue; null = the cluster's default."""
        account: str | None = None
        """What is charged; null = the user's default."""
        qos: str | None = None
        """Quality of service; null = the default."""
        constraint: str | None = None
        """Features that the nodes must have; null = none."""
        timeout_min: PositiveInt = 1440
        """Time limit; a job that reaches it writes a checkpoint and queues itself again."""
        signal_delay_s: PositiveInt = 120
        """Seconds before the time limit at which it is asked to; longer than a step and a checkpoint take."""
        max_timeouts: NonNegativeInt = 100
        """Times that a job may reach its limit before it ends for good."""
        max_deaths: PositiveInt = 3
        """Times that a job may die at the same step before it ends for good; until then it is queued again."""
        array_parallelism: PositiveInt = 64
        """Elements of an array that run at the same time, at most."""
        parts: PositiveInt = 8
        """Elements of the arrays that make stages in shards, or a study's answers."""
        setup: list[str] = field(default_factory=list)
        """Shell lines at the beginning of each job: modules, environment variables."""
        sbatch: dict[str, Any] = field(default_factory=dict)
        """Further parameters of sbatch, without the dashes: {exclusive: true, reservation: name}."""
        stages: dict[str, dict[str, Any]] = field(default_factory=dict)
        """Settings of single jobs, by the name of the stage: {tokens: {parts: 256, gpus_per_node: 1}}."""

        def check(self) -> None:
            for name, given in self.stages.items():
                from_mapping(Slurm.Config, given, f"stages.{name}")

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def gpus(self) -> int:
        return self.config.nodes * max(1, self.config.gpus_per_node)

    def of(self, job: Job) -> Config:
        """The settings of one job."""
        given = {**to_mapping(self.config), "stages": {}, **job.resources}
        if not job.together:
            given |= {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": min(1, given["gpus_per_node"])}
        return from_mapping(Slurm.Config, {**given, **self.config.stages.get(job.name, {})}, "launcher")

    def launch(self, jobs: Sequence[Job], folder: Path) -> list[Submitted]:
        raise NotImplementedError
