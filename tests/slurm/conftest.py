"""The tests marked slurm speak to a real SLURM, brought up by `cluster.sh` unless it is up already."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from cluster import CLUSTER, call


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster that sbatch and the rest find in the environment; one that was up before stays up."""
    was_down = subprocess.run([CLUSTER, "status"], capture_output=True, check=False).returncode != 0
    call(CLUSTER, "start")
    name, _, value = call(CLUSTER, "env").strip().removeprefix("export ").partition("=")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(name, value)
        yield
    if was_down:
        call(CLUSTER, "stop")
