"""The cluster of `cluster.sh`, for tests."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

CLUSTER = Path(__file__).parent / "cluster.sh"


def call(
    *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Run a command that has to succeed, and return its standard output."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
