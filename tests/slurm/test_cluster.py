"""`cluster.sh` starts a cluster once, and stops only its own.

A second start changes nothing, and a stop takes down only what the same folder's start brought up.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cluster import CLUSTER, call

pytestmark = pytest.mark.slurm


def daemons() -> dict[str, str]:
    """Names and process ids of the cluster's daemons that are alive."""
    files = (Path(os.environ["SLURM_CONF"]).parent / "run").glob("*.pid")
    found = {file.stem: file.read_text().strip() for file in files}
    return {name: process for name, process in found.items() if Path("/proc", process).is_dir()}


def port(settings: Path) -> str:
    """The line of a cluster's settings that names its controller's port."""
    lines = settings.read_text().splitlines()
    return next(line for line in lines if line.startswith("SlurmctldPort="))


def test_a_second_start_changes_nothing() -> None:
    before = daemons()
    call(CLUSTER, "start")
    assert sorted(before) == ["munged", "slurmctld", "slurmd-node1", "slurmd-node2"]
    assert daemons() == before


def test_a_job_runs_on_every_node_and_sees_its_gpus() -> None:
    show = "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    output = call("srun", "--nodes=2", "--ntasks=2", "--gpus-per-node=2", "bash", "-c", show)
    assert sorted(output.splitlines()) == ["node1 0,1", "node2 0,1"]


def test_stop_ends_its_own_cluster_and_no_other(tmp_path: Path) -> None:
    folder, hosts, before = tmp_path / "c", Path("/etc/hosts"), daemons()
    other = {**os.environ, "CLUSTER": str(folder), "NODES": "3"}

    call(CLUSTER, "start", env=other)
    assert call(CLUSTER, "status", env=other).count("node[1-3]") == 4
    assert hosts.read_text().count(str(folder)) == 3
    assert port(folder / "slurm.conf") != port(Path(os.environ["SLURM_CONF"]))

    call(CLUSTER, "stop", env=other)
    assert str(folder) not in hosts.read_text()
    assert daemons() == before
    assert call(CLUSTER, "status").count("node[1-2]") == 4
