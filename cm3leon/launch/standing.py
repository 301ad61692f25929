"""The state of a run that was made without jobs, from what its stages left in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm3leon.config import load_yaml
from cm3leon.io import read_log
from cm3leon.locks import locked
from cm3leon.records import KINDS, MARKER, STAGES
from cm3leon.stages.stage import STARTED
from cm3leon.training.steps import numbered, step_of
from cm3leon.types import UserError

TRAINED = {
    "image_tokenizer": "image_tokenizer_training",
    "retriever": "retriever_training",
    "pretraining": "training",
}
"""Stages that train, and the section that sets the number of their steps."""


def standing(folder: Path) -> list[str]:
    """A line for each stage that was started, or for each run of a sweep or study;
    [] for other folders."""
    inner = [file.parent for file in sorted(folder.glob(f"*/{KINDS['run']}"))]
    if inner and any((folder / KINDS[kind]).is_file() for kind in ("sweep", "study")):
        return [f"{run.name}: {_summary(run)}" for run in inner]
    lines = [f"{name:<16} {words}" for name, words in _stages(folder)]
    if lines and not _is_working(folder):
        lines.append(
            "nothing runs here now; the command of the run, given again, continues from there"
        )
    return lines


def _summary(run: Path) -> str:
    """The stage that a run has reached, on one line."""
    *_, (name, words) = [("not begun", ""), *_stages(run)]
    return f"{name} {words}".strip()


def _stages(folder: Path) -> Iterator[tuple[str, str]]:
    for name in STAGES:
        place = folder / name
        finished, begun = _json(place / MARKER), (place / STARTED).is_file()
        if finished:
            yield name, f"done in {_duration(float(finished.get('seconds', 0)))}"
        elif begun:
            yield name, _under_way(folder, name)


def _under_way(folder: Path, name: str) -> str:
    """What is known of an unfinished stage: if it trains, its step, loss and remaining time."""
    place = folder / name
    records = _records(place / "log.jsonl")
    if not records:
        return "begun"
    last = records[-1]
    steps = _steps(folder, name)
    said = [f"step {last['step']:,} of {steps:,}" if steps else f"step {last['step']:,}"]
    if isinstance(last.get("loss"), float):
        said.append(f"loss {last['loss']:.3f}")
    each = _seconds_a_step(place, last["step"])
    if steps and each and _is_working(folder):
        said.append(f"about {_duration(each * (steps - last['step']))} left")
    return ", ".join(said)


def _seconds_a_step(place: Path, step: int) -> float | None:
    """Seconds a step since this process started, by the times of its files;
    None if they do not tell."""
    began = (place / STARTED).stat().st_mtime
    before = [path for path in numbered(place) if path.stat().st_mtime <= began]
    done = step - max((step_of(path) or 0 for path in before), default=0)
    taken = (place / "log.jsonl").stat().st_mtime - began
    return taken / done if done > 0 and taken > 0 else None


def _steps(folder: Path, name: str) -> int | None:
    try:
        section = load_yaml(folder / KINDS["run"]).get(TRAINED.get(name, ""), {})
    except UserError:
        return None
    steps = section.get("steps") if isinstance(section, dict) else None
    return steps if isinstance(steps, int) else None


def _is_working(folder: Path) -> bool:
    """Whether a process holds the folder's lock; False if that cannot be found out."""
    try:
        with locked(folder, shared=True):
            return False
    except UserError:
        return True
    except OSError:
        return False


def _records(file: Path) -> list[dict[str, Any]]:
    """The records of a log that have a step, without a last line that is still being written."""
    return [record for record in read_log(file) if isinstance(record.get("step"), int)]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
