"""Stages that are skipped when nothing they depend on has changed, and go on where a kill stopped them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cm3leon.config import choices
from cm3leon.locks import locked
from cm3leon.paths import make_folder, naming
from cm3leon.records import MARKER, changed, checksum
from cm3leon.training.steps import checkpoints, step_of
from cm3leon.types import UserError

R = TypeVar("R")
Part = tuple[int, int]
"""(k, n): this worker is number k, from 0, of n that share a stage's shards."""

STARTED = "started.json"
"""Tells what is being made in a folder that has no `MARKER` yet."""
SUPERSEDED = "superseded"


@dataclass(frozen=True)
class Stage(Generic[R]):
    """One step of a run; it writes into the folder of its name and nowhere else.

    `inputs(run)` is all that its result depends on besides other stages, as JSON; it is asked for when those before it
    are finished. `version` is raised when its code starts to make something else of the same inputs.
    `make(run, folder)` may find a part of its work there. `make_part(run, folder, part)` makes one worker's share of
    the shards, where the stage can be shared out. `needs` names the stages it depends on, None is the one before it;
    a stage that depends on files of others rather than on how they were made names none, and has their digests in its
    inputs. A `dear` one that has a checkpoint is not set aside for other inputs while it is unfinished.
    """

    name: str
    version: int
    inputs: Callable[[R], Any]
    make: Callable[[R, Path], None]
    make_part: Callable[[R, Path, Part], None] | None = None
    needs: tuple[str, ...] | None = None
    dear: bool = False


def run_stages(
    stages: Sequence[Stage[R]],
    run: R,
    folder: Path,
    say: Callable[[str], None],
    *,
    until: str | None = None,
) -> dict[str, float]:
    """Brings every stage up to date, to `until` if it is given. Returns the seconds that each took when it was made.

    Results made from other inputs are not deleted but moved to `superseded/`, and fetched from there when the inputs
    are as they were.

    Raises:
        UserError: if another process is working in the folder, files of somebody else's stand where a stage writes,
            or there is no stage `until`.
    """
    if until is not None:
        stages = stages[: number_of(stages, until, "until") + 1]
    make_folder(folder, "run")
    seconds: dict[str, float] = {}
    with locked(folder):
        made: dict[str, str] = {}
        for number, stage in enumerate(stages, 1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            fingerprint = made[stage.name] = _stage_fingerprint(stage, run, made)
            place = folder / stage.name
            if stage.dear:
                _refuse_other_inputs(stage, run, place, fingerprint)
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
                    f"{damaged[0]} is missing or has changed, made again"
                    if damaged
                    else "going on where it stopped"
                )
                say(f"{title}: {again}" if (place / STARTED).is_file() else title)
                seconds[stage.name] = _make(stage, run, place, fingerprint)
                say(f"{title}: done in {seconds[stage.name]:.0f} s")
    return seconds


def run_part(stages: Sequence[Stage[R]], name: str, run: R, folder: Path, part: Part) -> None:
    """Makes one worker's share of a stage. Any number of workers may do so at the same time, on any machines.

    The stage is not finished by it: `run_stages` finds the shards there, makes what is still missing, and finishes.

    Raises:
        UserError: for a stage that is unknown or cannot be shared out, or if a stage before it is not finished.
    """
    number = number_of(stages, name, "stage")
    stage, place = stages[number], folder / name
    if stage.make_part is None:
        shared = ", ".join(other.name for other in stages if other.make_part)
        raise UserError(
            f"stage is {name}, made in one piece; those that workers share are: {shared or 'none'}"
        )
    if not folder.is_dir():
        raise UserError(f"run: {folder} does not exist; make the stages before {name} first")
    with locked(folder, shared=True):
        missing, made = first_unfinished(stages[:number], run, folder)
        if missing:
            raise UserError(
                f"stage {name} needs {missing}, which is not finished in {folder} with these settings; "
                f"make it first, with until={stages[number - 1].name}"
            )
        fingerprint = _stage_fingerprint(stage, run, made)
        with locked(folder, ".room", wait=True):
            _make_room(place, fingerprint)
            if not _read(place / MARKER) and not _read(place / STARTED):
                place.mkdir(parents=True, exist_ok=True)
                write_json(place / STARTED, {"fingerprint": fingerprint})
        with naming(place):
            stage.make_part(run, place, part)


def first_unfinished(
    stages: Sequence[Stage[R]], run: R, folder: Path
) -> tuple[str | None, dict[str, str]]:
    """The first stage that is not finished in the folder with these settings, if any, and the fingerprints up to it."""
    made: dict[str, str] = {}
    for stage in stages:
        made[stage.name] = _stage_fingerprint(stage, run, made)
        if _read(folder / stage.name / MARKER).get("fingerprint") != made[stage.name]:
            return stage.name, made
    return None, made


def is_finished(stage: Stage[R], before: Sequence[Stage[R]], run: R, folder: Path) -> bool:
    """Whether a stage, with those before it finished, is up to date in the folder and its files as they were made."""
    missing, _ = first_unfinished([*before, stage], run, folder)
    return missing is None and not _damaged(folder / stage.name)


def number_of(stages: Sequence[Stage[R]], name: str, where: str) -> int:
    names = [stage.name for stage in stages]
    if name not in names:
        raise UserError(
            f"{where} is {name}, which is not a stage of this experiment; {choices(name, names)}"
        )
    return names.index(name)


def _damaged(place: Path) -> list[str]:
    """Files of a finished stage that are missing, or not as they were written."""
    return changed(place, _read(place / MARKER).get("files", {}))


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
    write_json(place / STARTED, {"fingerprint": fingerprint, "inputs": stage.inputs(run)})
    start = time.perf_counter()
    with naming(place):
        stage.make(run, place)
    seconds = time.perf_counter() - start
    files = {file.relative_to(place).as_posix(): checksum(file) for file in _results(place)}
    write_json(place / MARKER, {"fingerprint": fingerprint, "seconds": seconds, "files": files})
    return seconds


def _results(place: Path) -> Iterator[Path]:
    """The files that make up a result: not the markers, nor logs and checkpoints, which serve only while it is made."""
    for file in sorted(place.rglob("*")):
        inner = file.relative_to(place).parts[0]
        if (
            file.is_file()
            and inner not in (MARKER, STARTED, "tensorboard")
            and not inner.startswith(("step_", "."))
        ):
            yield file


def _refuse_other_inputs(stage: Stage[R], run: R, place: Path, fingerprint: str) -> None:
    """Raises UserError, naming what differs, where unfinished work with checkpoints was begun with other inputs."""
    begun = _read(place / STARTED)
    steps = checkpoints(place)
    if not steps or not begun or _read(place / MARKER) or begun["fingerprint"] == fingerprint:
        return
    before, now = _flat(begun.get("inputs")), _flat(json.loads(json.dumps(stage.inputs(run))))
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    what = [
        f"{key} was {json.dumps(before.get(key))}, is {json.dumps(now.get(key))}"
        for key in keys[:5]
    ]
    raise UserError(
        f"run: {place} has come to step {step_of(steps[-1])} with other settings "
        f"({'; '.join(what) or 'the stages before it were made anew'}); put them back, choose another run folder, "
        f"or delete {place} to begin anew"
    )


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping; numbers in lists do not show in the keys."""
    if isinstance(value, dict):
        return {
            k: v
            for name, inner in value.items()
            for k, v in _flat(inner, f"{key}.{name}".strip(".")).items()
        }
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        return {k: v for inner in value for k, v in _flat(inner, key).items()}
    return {key: value}


def _make_room(place: Path, fingerprint: str) -> None:
    """Moves away what other inputs made, and back what these inputs made earlier."""
    made_from = _read(place / MARKER).get("fingerprint") or _read(place / STARTED).get(
        "fingerprint"
    )
    if made_from == fingerprint:
        return
    attic = place.parent / SUPERSEDED
    if made_from:
        attic.mkdir(exist_ok=True)
        old = attic / f"{place.name}-{made_from[:12]}"
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    elif place.exists() and any(not file.name.startswith(".") for file in place.iterdir()):
        raise UserError(
            f"run: {place} holds files that no stage has made; choose another run folder"
        )
    else:
        shutil.rmtree(place, ignore_errors=True)
    earlier = attic / f"{place.name}-{fingerprint[:12]}"
    if earlier.is_dir():
        earlier.rename(place)


def _stage_fingerprint(stage: Stage[R], run: R, made: Mapping[str, str]) -> str:
    """Of everything the stage's result depends on; `made` has those of the stages before it, in order."""
    needs = list(made)[-1:] if stage.needs is None else stage.needs
    content = [stage.name, stage.version, stage.inputs(run), [made[name] for name in needs]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Writes a JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2))
    os.replace(partial, path)
