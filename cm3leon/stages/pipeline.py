"""Stages that are skipped when nothing they depend on has changed, and go on where a kill stopped them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cm3leon.types import UserError

R = TypeVar("R")

MARKER = "stage.json"
"""Written last: a stage is finished when its folder has one. Before that, `STARTED` tells what is being made."""
STARTED = "started.json"
SUPERSEDED = "superseded"


@dataclass(frozen=True)
class Stage(Generic[R]):
    """One step of a run; it writes into the folder of its name and nowhere else.

    `inputs(run)` is all that its result depends on besides the stages before it, as JSON. `version` is raised when
    its code starts to make something else of the same inputs. `make(run, folder)` may find a part of its work there.
    """

    name: str
    version: int
    inputs: Callable[[R], Any]
    make: Callable[[R, Path], None]


def run_stages(stages: Sequence[Stage[R]], run: R, folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Brings every stage up to date. Returns the seconds that each took when it was made.

    Results made from other inputs are not deleted but moved to `superseded/`, and fetched from there when the inputs
    are as they were.

    Raises:
        UserError: if another process is working in the folder, or files of somebody else's stand where a stage writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with _lock(folder):
        before = ""
        for number, stage in enumerate(stages, 1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            fingerprint = _fingerprint([stage.name, stage.version, stage.inputs(run), before])
            place = folder / stage.name
            _make_room(place, fingerprint)
            damaged = _damaged(place)
            for name in damaged:
                (place / name).unlink(missing_ok=True)
            finished = _read(place / MARKER)
            if finished and not damaged:
                seconds[stage.name] = finished["seconds"]
                say(f"{title}: up to date")
            else:
                again = (
                    f"{damaged[0]} is missing or has changed, made again" if damaged else "going on where it stopped"
                )
                say(f"{title}: {again}" if (place / STARTED).is_file() else title)
                seconds[stage.name] = _make(stage, run, place, fingerprint)
                say(f"{title}: done in {seconds[stage.name]:.0f} s")
            before = fingerprint
    return seconds


def _damaged(place: Path) -> list[str]:
    """Files of a finished stage that are missing, or not as they were written."""
    files = _read(place / MARKER).get("files", {})
    return [name for name, digest in files.items() if not (place / name).is_file() or _digest(place / name) != digest]


def _read(marker: Path) -> dict[str, Any]:
    """The content of a marker; empty for one that is missing or damaged, which is as good as none."""
    try:
        content = json.loads(marker.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _make(stage: Stage[R], run: R, place: Path, fingerprint: str) -> float:
    place.mkdir(parents=True, exist_ok=True)
    (place / MARKER).unlink(missing_ok=True)
    write_json(place / STARTED, {"fingerprint": fingerprint})
    start = time.perf_counter()
    stage.make(run, place)
    seconds = time.perf_counter() - start
    files = {file.relative_to(place).as_posix(): _digest(file) for file in _results(place)}
    write_json(place / MARKER, {"fingerprint": fingerprint, "seconds": seconds, "files": files})
    return seconds


def _results(place: Path) -> Iterator[Path]:
    """The files that make up a result: not the markers, nor logs and checkpoints, which serve only while it is made."""
    for file in sorted(place.rglob("*")):
        inner = file.relative_to(place).parts[0]
        if file.is_file() and inner not in (MARKER, STARTED, "tensorboard") and not inner.startswith(("step_", ".")):
            yield file


def _make_room(place: Path, fingerprint: str) -> None:
    """Moves away what other inputs made, and back what these inputs made earlier."""
    made_from = _read(place / MARKER).get("fingerprint") or _read(place / STARTED).get("fingerprint")
    if made_from == fingerprint:
        return
    attic = place.parent / SUPERSEDED
    if made_from:
        attic.mkdir(exist_ok=True)
        old = attic / f"{place.name}-{made_from[:12]}"
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    elif place.exists() and any(not file.name.startswith(".") for file in place.iterdir()):
        raise UserError(f"run: {place} holds files that no stage has made; choose another run folder")
    else:
        shutil.rmtree(place, ignore_errors=True)
    earlier = attic / f"{place.name}-{fingerprint[:12]}"
    if earlier.is_dir():
        earlier.rename(place)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process at a time in a run folder; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"run: another process is working in {folder}; wait for it, or choose another run="
            ) from error
        yield


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Writes a JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2))
    os.replace(partial, path)
