"""Names of checkpoints: which folders of a training count as one,
asked in one place by whoever looks for them.

A checkpoint is called `step_` and digits, and is ordered by its number: `step_00000040` is what a
training writes. Whatever else lies beside it (`step_best`, `step_00000040-hf`,
`step_00000040 copy`) belongs to somebody else: it is never read, counted or deleted.
"""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
"""Names and checksums of a checkpoint's files; written last,
so that a folder without one is not complete."""

_NAME = re.compile(r"step_([0-9]+)")


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's name gives; None for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where a training in `folder` writes its checkpoint of a step."""
    return folder / f"step_{step:08d}"


def numbered(folder: Path) -> list[Path]:
    """Whatever in a training's folder is called as a checkpoint is, complete or not, by its number.

    Where two names give one number (`step_40` beside `step_00000040`),
    the one that a training writes counts.
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
