"""Provenance of a run: version of the code, environment, and a copy of the code for later jobs.

A run folder has three files about its latest start:

    code.json          version, commit, and whether files differ from the commit
    code.diff          the difference, if there is one
    environment.json   Python, the machine, packages, variables
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cm3leon import __version__
from cm3leon.config import SHIPPED
from cm3leon.digests import path_digest
from cm3leon.io import digest_of, read_json, write_text
from cm3leon.permissions import use_umask
from cm3leon.secrets import masked, without_secrets
from cm3leon.types import UserError

CODE, DIFF, ENVIRONMENT = "code.json", "code.diff", "environment.json"

FOLDERS = ("cm3leon", "experiments", "experiments.yaml")
"""Folders and files of the code in a clone. An installed package has all of them in the first."""

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
"""Environment variables that are recorded; all others may hold secrets."""


def record(folder: Path) -> None:
    """Record the code's version and the environment in a run folder, replacing earlier records."""
    folder.mkdir(parents=True, exist_ok=True)
    write_code(folder)
    _write(folder / ENVIRONMENT, environment())


def write_code(folder: Path) -> None:
    """Write `code.json`, and `code.diff` beside it if files differ from the commit."""
    version, difference = code_version()
    _write(folder / CODE, version)
    (folder / DIFF).unlink(missing_ok=True)
    if difference:
        write_text(folder / DIFF, masked(difference))


def code_version() -> tuple[dict[str, Any], str]:
    """Return version, commit and new files of the running code, and its difference to the commit.

    A copy made by `snapshot` has those of its original.
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


def code_digest(plugins: Sequence[str] = ()) -> str:
    """A checksum of the running code: its version, commit, difference and new modules, and of
    plugins."""
    version, difference = code_version()
    new = [path_digest(SHIPPED / name) for name in version["new_files"] if name.endswith(".py")]
    parts = [json.dumps(version), difference, *new, *map(path_digest, plugins)]
    return digest_of("\n".join(parts))


def commit() -> str | None:
    """Return the running code's commit, with "-dirty" if files differ; None if it is unknown."""
    version, difference = code_version()
    if version["commit"] is None:
        return None
    return version["commit"][:12] + ("-dirty" if difference else "")


def _git(*words: str) -> str:
    """Return the output of a git command; "" if git is missing or refuses."""
    try:
        return subprocess.run(
            ["git", "-C", str(SHIPPED), *words], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment() -> dict[str, Any]:
    """Collect Python, the machine, versions of all packages, and `VARIABLES`."""
    # A distribution parses its metadata each time that its name or version is asked for.
    packages = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        if metadata["Name"]:
            packages[metadata["Name"]] = metadata["Version"]
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
    """Return a line for each machine and version that runs were made with, in the folders' order.

    Folders whose `environment.json` is missing or damaged are skipped.
    """
    lines = [line for folder in folders if (line := _machine(folder))]
    return list(dict.fromkeys(lines))


def _machine(folder: Path) -> str:
    """Return the line of one run; "" if it has none, so that a page is written without it."""
    shape = {"system": str, "python": str, "packages": {str: str}}
    try:
        found = read_json(folder / ENVIRONMENT, shape)
    except (OSError, UserError):
        return ""
    packages = found["packages"]
    versions = [f"{name} {packages[name]}" for name in ("torch", "cm3leon") if name in packages]
    return ", ".join([found["system"], f"Python {found['python']}", *versions])


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def snapshot(folder: Path) -> None:
    """Copy the running code into a folder, for a waiting job to run even if the original changes.

    The folder comes first on the path of the job's Python. Plugins elsewhere are not copied.
    """
    folder.mkdir(parents=True)
    write_code(folder)
    _copy_code(folder)
    use_umask(folder)


def _copy_code(folder: Path) -> None:
    """Copy the package, from a clone or from where it is installed."""
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
