"""Bring up a real SLURM by `cluster.sh` for the tests marked slurm, unless one is up already."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from cluster import CLUSTER, call


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster that sbatch and the other commands find by the environment.

    A cluster that was up before the tests stays up.
    """
    was_down = subprocess.run([CLUSTER, "status"], capture_output=True, check=False).returncode != 0
    call(CLUSTER, "start")
    name, _, value = call(CLUSTER, "env").strip().removeprefix("export ").partition("=")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(name, value)
        yield
    if was_down:
        call(CLUSTER, "stop")
