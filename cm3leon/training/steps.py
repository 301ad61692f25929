"""Names of checkpoints: the one place that decides which folders of a training are checkpoints.

A checkpoint is called `step_` and digits, and ordered by its number: a training writes
`step_00000040`. Anything else beside it (`step_best`, `step_00000040-hf`, `step_00000040 copy`)
belongs to someone else: it is never read, counted or deleted.
"""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
"""Names and checksums of a checkpoint's files. Written last,
so a folder without it is incomplete."""

_NAME = re.compile(r"step_([0-9]+)")


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where a training in `folder` writes its checkpoint of a step."""
    return folder / f"step_{step:08d}"


def numbered(folder: Path) -> list[Path]:
    """Folders that are named like checkpoints, complete or not, by step.

    If two names give one step (`step_40` beside `step_00000040`), the one that a training writes
    counts.
    """
    found: dict[int, Path] = {}
    for path in folder.glob("step_*"):
        step = step_of(path)
        if step is not None and (step not in found or path == checkpoint_of(folder, step)):
            found[step] = path
    return [found[step] for step in sorted(found)]


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a training, the oldest first."""
    return [path for path in numbered(folder) if (path / MANIFEST).is_file()]
