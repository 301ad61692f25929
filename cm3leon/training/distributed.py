"""The processes of a training: found in torchrun's or SLURM's environment, joined,
and asked for sums."""

from __future__ import annotations

import functools
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cm3leon.data.ahead import share_processors, usable_processors
from cm3leon.training.device import best_device
from cm3leon.types import Again, UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Rank:
    """A process's rank among all and on its node, and the address where the first rank listens."""

    number: int
    count: int
    local_number: int
    address: str
    port: int


def current_rank(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """This process's rank by the variables of torchrun, or of a SLURM step with several tasks; None
    for a process alone.

    A batch script or shell of SLURM is one process, however many tasks its job has: only `srun`
    starts a step.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Rank(
            number=int(environment["RANK"]),
            count=int(environment["WORLD_SIZE"]),
            local_number=int(environment.get("LOCAL_RANK", 0)),
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environment.get("MASTER_PORT", 29500)),
        )
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return Rank(
            number=int(environment["SLURM_PROCID"]),
            count=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_number=int(environment["SLURM_LOCALID"]),
            address=environment.get("MASTER_ADDR")
            or _first_host(environment["SLURM_STEP_NODELIST"]),
            port=int(environment.get("MASTER_PORT", 0)) or _port(environment),
        )
    return None


def _first_host(nodes: str) -> str:
    """The first name of SLURM's compressed list of nodes, `gpu[03-06,9]` -> `gpu03`."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    answer = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    )
    return answer.stdout.split()[0]


def _port(environment: Mapping[str, str]) -> int:
    """A port that all tasks of a step agree on, and other jobs of the node hardly ever share."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", 0))
    return 20_000 + (job * 31 + step) % 20_000


@dataclass(frozen=True)
class Ranks:
    """The processes that train together; by default a single one.

    All methods but `tensor` and `mesh` wait for all ranks.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    joined: bool = False
    """Whether there is a process group, even of one rank."""

    @property
    def first(self) -> bool:
        """Whether this rank writes logs and results."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks in float64, the same on all."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def tensor(self, values: Sequence[float]) -> Tensor:
        """The values on this rank's device as float64, without waiting for it."""
        if self.device.type != "cuda":
            return torch.tensor(values, dtype=torch.float64, device=self.device)
        there = torch.tensor(values, dtype=torch.float64, pin_memory=True)
        return there.to(self.device, non_blocking=True)

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over the ranks in place, on the device and without waiting for it."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def any(self, value: bool) -> bool:
        """Whether the value is true on any rank."""
        return self.sum([float(value)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in order, on each of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])

    def nodes(self) -> int:
        """Number of machines that the ranks are on."""
        return len(set(self.gather(socket.gethostname())))

    def on_same_processors(self) -> int:
        """Number of ranks that may use some of this rank's processors, itself included.

        torchrun leaves all processors of a node to each of its ranks;
        SLURM may give every task its own.
        """
        own = (socket.gethostname(), usable_processors())
        return sum(host == own[0] and bool(used & own[1]) for host, used in self.gather(own))

    def mesh(self, replicas: int) -> DeviceMesh | None:
        """The ranks as a mesh to shard over, (replicas, shards) for hybrid sharding; None without a
        process group.

        Raises:
            UserError: for replicas that the ranks cannot be divided into.
        """
        if self.count % replicas:
            raise UserError(
                f"training.replicas is {replicas}; it must divide the {self.count} ranks"
            )
        if not self.joined:
            return None
        shards = self.count // replicas
        if replicas == 1:
            return init_device_mesh(self.device.type, (shards,), mesh_dim_names=("shard",))
        return init_device_mesh(
            self.device.type, (replicas, shards), mesh_dim_names=("replicate", "shard")
        )


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a share of one that several ranks have (FSDP2)."""
    # The class takes more than a second to import; until somebody does, nothing is of it.
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(tensor, getattr(module, "DTensor", ()))


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@contextmanager
def joined(
    rank: Rank | None, timeout_seconds: int, *, before: Callable[[], None] | None = None
) -> Iterator[Ranks]:
    """The ranks of this training, with a process group inside the context if there are several.

    The first of several ranks calls `before` without a process group, while the others wait. Inside
    the context, ranks on the same processors share them for decoding.

    Collectives on CPU tensors use gloo, on GPUs NCCL. A rank that waits longer than the timeout
    raises, and so does one whose peer has died: the job ends instead of hanging.

    Raises:
        UserError: if a rank has no GPU of its own on a machine with GPUs.
        UserError, Again: on all ranks, if `before` raises it.
    """
    device = best_device()
    if rank is None:
        yield Ranks(device)
        return
    if device.type == "cuda":
        if rank.local_number >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank.number} is number {rank.local_number} on its node, which has "
                f"{torch.cuda.device_count()} GPUs; start one process per GPU"
            )
        device = torch.device("cuda", rank.local_number)
        torch.cuda.set_device(device)

    # A process may join the others several times; each time has its own names in the store.
    store = dist.PrefixStore(f"joined {next(_times)}", _store(rank))
    if before:
        _first_alone(store, rank, before)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(
        backend, store=store, rank=rank.number, world_size=rank.count, timeout=timeout
    )

    ranks = Ranks(device, rank.number, rank.count, joined=True)
    try:
        share_processors(ranks.on_same_processors())
        yield ranks
    finally:
        share_processors(1)
        dist.destroy_process_group()


_times = itertools.count()


@functools.cache
def _store(rank: Rank) -> dist.Store:
    """Where the ranks find each other. It lives as long as the process, as the first rank serves
    it."""
    url = "env://"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        url = f"tcp://{rank.address}:{rank.port}"
    return next(dist.rendezvous(url, rank.number, rank.count))[0]


def _first_alone(store: dist.Store, rank: Rank, action: Callable[[], None]) -> None:
    """Let the first rank act while the others wait, for a week at most;
    its error is raised on all."""
    kinds = {kind.__name__: kind for kind in (UserError, Again)}
    if rank.number == 0:
        try:
            action()
        except (UserError, Again) as error:
            kind = "Again" if isinstance(error, Again) else "UserError"
            store.set("first", f"{kind}:{error}")
            store.wait([f"heard {other}" for other in range(1, rank.count)], timedelta(seconds=30))
            raise
        store.set("first", "")
        return
    store.wait(["first"], timedelta(days=7))
    name, _, sentence = store.get("first").decode().partition(":")
    store.set(f"heard {rank.number}", "")
    if name:
        raise kinds[name](sentence)
