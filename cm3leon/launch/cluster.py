"""What a SLURM cluster says of itself and of jobs, through its own commands;
sacct is not needed."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from cm3leon.config import choices
from cm3leon.types import UserError


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike."""

    partition: str
    default: bool
    count: int
    gpus: int
    """GPUs of each node."""


def ask(*command: str) -> str:
    """The output of a command; "" if it fails or is not installed."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def check_commands() -> None:
    """Raise UserError if SLURM's commands are not on the PATH."""
    for name in ("sbatch", "srun"):
        if shutil.which(name) is None:
            raise UserError(
                f"launcher is slurm, and {name} is not on the PATH; start this on a login node of "
                "a cluster, or choose launcher=here, torchrun or local"
            )


def partitions() -> list[Nodes]:
    """All partitions with their kinds of nodes; [] if sinfo does not answer."""
    found = []
    for line in ask("sinfo", "-h", "-a", "-o", "%P|%D|%G").splitlines():
        name, count, resources = line.split("|")
        gpus = sum(int(number) for number in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", resources))
        found.append(Nodes(name.rstrip("*"), name.endswith("*"), int(count), gpus))
    return found


def check_fits(
    *, nodes: int, gpus_per_node: int, partition: str | None, known: Sequence[Nodes]
) -> None:
    """Raise UserError for an unknown partition, or one without so many nodes and GPUs."""
    if not known:
        return
    names = {each.partition for each in known}
    if partition and not names.issuperset(partition.split(",")):
        raise UserError(
            f"launcher.partition is {partition}, which the cluster does not have; "
            f"{choices(partition, names)}"
        )

    # Without a partition, SLURM takes the default one.
    wanted = [each.partition for each in known if each.default]
    if partition:
        wanted = partition.split(",")
    for name in wanted:
        there = [each for each in known if each.partition == name]
        most = max(each.gpus for each in there)
        fit = sum(each.count for each in there if each.gpus >= gpus_per_node)
        if most < gpus_per_node:
            has = f"{most} GPUs" if most else "no GPUs"
            raise UserError(
                f"launcher.gpus_per_node is {gpus_per_node}; nodes of partition {name} have {has}; "
                "lower it, or choose another launcher.partition"
            )
        if fit < nodes:
            such = f" with {gpus_per_node} GPUs" if gpus_per_node else ""
            raise UserError(
                f"launcher.nodes is {nodes}; partition {name} has only {fit} nodes{such}; lower "
                "it, or choose another launcher.partition"
            )


def check_account(account: str | None) -> None:
    """Raise UserError for an account that the cluster's accounting, if there is any, does not give
    the user."""
    if account is None:
        return
    answer = ask("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=account")
    known = set(answer.split())
    if known and account not in known:
        raise UserError(
            f"launcher.account is {account}, which is not one of yours; {choices(account, known)}"
        )


def states(ids: Sequence[str]) -> dict[str, dict[str, str]] | None:
    """What SLURM still knows of jobs: `state`, `reason`, `nodes` and `code` by id; elements of an
    array have their own ids.

    Ended jobs are known for a while (MinJobAge, 300 s by default) and then left out. None if SLURM
    does not answer.
    """
    found = {}
    for id_ in sorted({id_.partition("_")[0] for id_ in ids}):
        lines = ask("scontrol", "show", "job", "-o", id_).splitlines()
        if not lines and not ask("scontrol", "ping"):
            return None

        # One line describes a job, an element of an array, or a range of waiting elements.
        for line in lines:
            known = dict(re.findall(r"(\w+)=(\S*)", line))
            element = known.get("ArrayTaskId", "")
            about = {
                "state": known.get("JobState", ""),
                "reason": known.get("Reason", ""),
                "nodes": known.get("NodeList", ""),
                "code": known.get("ExitCode", ""),
            }
            for number in _numbers(element):
                found[id_ if number is None else f"{id_}_{number}"] = about
    return found


def _numbers(elements: str) -> list[int | None]:
    """The numbers in `3` or in `0-2,5%4`; [None] for ""."""
    if not elements:
        return [None]
    numbers: list[int | None] = []
    for part in elements.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended stay as they are."""
    if ids:
        ask("scancel", *ids)
