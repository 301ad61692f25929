"""What ran, where and with what: version of the code, environment, and a copy of the code for jobs that start later.

A run folder holds `code.json` (version, commit and whether files differ from it), `code.diff` where they do, and
`environment.json` (Python, the machine, packages, variables), all of the latest start.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cm3leon import __version__
from cm3leon.config import SHIPPED
from cm3leon.io import read_json, write_text
from cm3leon.permissions import use_umask
from cm3leon.secrets import masked, without_secrets
from cm3leon.types import UserError

CODE, DIFF, ENVIRONMENT = "code.json", "code.diff", "environment.json"

FOLDERS = ("cm3leon", "experiments", "experiments.yaml")
"""What the code is made of in a clone; in an installed package all of it lies in the first."""

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "GOMP_SPINCOUNT",
    "LD_LIBRARY_PATH",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTHONPATH",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ACCOUNT",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_QOS",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
    "TORCH_CUDA_ARCH_LIST",
    "VIRTUAL_ENV",
    "WORLD_SIZE",
)
"""Environment variables that are written down; all others may hold secrets."""


def record(folder: Path) -> None:
    """Writes down the code's version and the environment in a run folder, over those of an earlier start."""
    folder.mkdir(parents=True, exist_ok=True)
    write_code(folder)
    _write(folder / ENVIRONMENT, environment())


def write_code(folder: Path) -> None:
    """Writes `code.json`: version, commit, whether files differ from it, and if so the difference beside it."""
    version, difference = code_version()
    _write(folder / CODE, version)
    (folder / DIFF).unlink(missing_ok=True)
    if difference:
        write_text(folder / DIFF, masked(difference))


def code_version() -> tuple[dict[str, Any], str]:
    """Version, commit and new files of the code that runs, and what its files differ by from that commit.

    A copy made by `snapshot` has what was true of the code that it is a copy of.
    """
    root = SHIPPED.parent if SHIPPED.name == "cm3leon" else SHIPPED
    if (root / CODE).is_file():
        difference = (root / DIFF).read_text() if (root / DIFF).is_file() else ""
        return read_json(root / CODE), difference
    commit, difference, new = None, "", []
    if (SHIPPED / ".git").exists():
        commit = _git("rev-parse", "HEAD").strip() or None
        difference = _git("diff", "HEAD")
        new = _git("ls-files", "--others", "--exclude-standard").splitlines()
    return {
        "version": __version__,
        "commit": commit,
        "differs": bool(difference or new),
        "new_files": new,
    }, difference


def commit() -> str | None:
    """The commit of the code that runs, with "-dirty" if files differ from it; None where it is not known."""
    version, difference = code_version()
    if version["commit"] is None:
        return None
    return version["commit"][:12] + ("-dirty" if difference else "")


def _git(*words: str) -> str:
    """What git says of the repository; nothing where there is no git, or none that may look."""
    try:
        return subprocess.run(
            ["git", "-C", str(SHIPPED), *words], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment() -> dict[str, Any]:
    """Python, the machine, versions of all packages, and the variables that matter to a training."""
    packages = {each.name: each.version for each in importlib.metadata.distributions() if each.name}
    packages["cm3leon"] = __version__  # also where it runs from a folder that is not installed
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "host": platform.node(),
        "command": without_secrets(sys.argv),
        "variables": {name: masked(os.environ[name]) for name in VARIABLES if name in os.environ},
        "packages": dict(sorted(packages.items(), key=lambda pair: pair[0].lower())),
    }


def machines(folders: Iterable[Path]) -> list[str]:
    """A line for each machine and version that runs were made with, in the order of the folders.

    Folders whose `environment.json` is missing or damaged are passed over.
    """
    lines = [line for folder in folders if (line := _machine(folder))]
    return list(dict.fromkeys(lines))


def _machine(folder: Path) -> str:
    """The line of one run; empty where it has none, as no page is given up for want of it."""
    shape = {"system": str, "python": str, "packages": {str: str}}
    try:
        found = read_json(folder / ENVIRONMENT, shape)
    except (OSError, UserError):
        return ""
    packages = found["packages"]
    versions = [f"{name} {packages[name]}" for name in ("torch", "cm3leon") if name in packages]
    return ", ".join([found["system"], f"Python {found['python']}", *versions])


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def snapshot(folder: Path) -> None:
    """Copies the code that runs into a folder, so that a job that waits runs it, whatever becomes of the original.

    The folder goes first on the path of the job's Python. Plugins elsewhere stay where they are.
    """
    folder.mkdir(parents=True)
    write_code(folder)
    _copy_code(folder)
    use_umask(folder)


def _copy_code(folder: Path) -> None:
    """Copies the package, from a clone or from where it is installed."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    if SHIPPED.name == "cm3leon":
        shutil.copytree(SHIPPED, folder / "cm3leon", ignore=ignore)
        return
    for name in FOLDERS:
        source = SHIPPED / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        elif source.is_file():
            shutil.copyfile(source, folder / name)


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
