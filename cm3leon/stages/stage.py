"""What a stage is, and the record that it leaves.

Each stage writes into a folder of its name. `started.json` says from what it is being made, and
`stage.json`, written last, from what it was made and what its files are:

    {"fingerprint": "3f0c...", "version": 1,
     "needs": {"documents": "77ab..."},                  the stages it was made from, by their fingerprints
     "made_with": {"retriever/model.safetensors": "..."},   single files of stages, by their checksums
     "inputs": {"training": {"steps": 1000}},            what else its result depends on
     "settings": {"training": {"steps": 1000, ...}},     the sections of the experiment as they were, whole
     "made_by": "cm3leon 0.1.0",
     "seconds": 12.5, "files": {"model.safetensors": "9a1b..."}}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from cm3leon.config import choices
from cm3leon.io import read_json
from cm3leon.types import UserError

R = TypeVar("R")
Part = tuple[int, int]
"""(k, n): this worker is number k, from 0, of n that share a stage's shards."""

STARTED = "started.json"
"""Tells what is being made in a folder that has no `MARKER` yet."""


@dataclass(frozen=True)
class Stage(Generic[R]):
    """One step of a run; it writes into the folder of its name and nowhere else.

    `make(run, folder)` may find a part of its work there. `make_part(run, folder, part)` makes one
    worker's share of the shards, where the stage can be shared out; what is missing of a shared
    stage is made again shard by shard.
    """

    name: str
    version: int
    """Raised when its code starts to make something else of the same inputs."""
    inputs: Callable[[R], Any]
    """All that its result depends on besides other stages, and nothing else, as JSON."""
    make: Callable[[R, Path], None]
    make_part: Callable[[R, Path, Part], None] | None = None
    needs: tuple[str, ...] | None = None
    """Names of the stages it depends on, however these came to be; None = the one before it."""
    files: tuple[str, ...] = ()
    """Files of other stages that it depends on by what they hold, however they came to be."""
    settings: Callable[[R], Mapping[str, Any]] = lambda run: {}
    """The sections of the experiment that it reads, whole,
    so that it can be opened later as it was made."""
    results: tuple[str, ...] = ("*",)
    """Patterns of the files that make up its result; `*` stands for any text, also across folders.
    Logs, events, pages and checkpoints are none: whatever happens to them,
    the stage stays finished."""
    scratch: tuple[str, ...] = ()
    """Folders in its own that only serve stages behind it: they go when the result is set aside."""
    expensive: bool = False
    """Whether it trains, or takes hours on a large corpus:
    it is made anew only where `redo` asks for it."""
    trains: Callable[[R], bool] = lambda run: False
    """Whether these settings train it, so that without a checkpoint it can only be made again from
    the first step."""


@dataclass(frozen=True)
class StageRecord:
    """What `stage.json` or `started.json` says of a stage."""

    fingerprint: str
    version: int | None = None
    """None in records of earlier versions of the code,
    which did not say from what a stage was made."""
    needs: dict[str, str] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)
    inputs: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    made_by: str = ""
    """Name and version of the package; empty in records of versions that did not say it."""
    seconds: float = 0.0
    files: dict[str, str] = field(default_factory=dict)


RECORD = {
    "fingerprint": str,
    "version?": int,
    "needs?": {str: str},
    "made_with?": {str: str},
    "settings?": dict,
    "made_by?": str,
    "seconds?": (int, float),
    "files?": {str: str},
}


def read_record(file: Path) -> StageRecord | None:
    """The record of a stage, None where there is no such file.

    Raises:
        UserError: for a file that is no record, or names files outside the stage's folder.
        OSError: where the system refuses to read it.
    """
    if not file.exists():
        return None
    content = read_json(file, RECORD)
    # It becomes a part of a folder's name, where results are set aside.
    if not re.fullmatch(r"[0-9A-Za-z]{1,64}", content["fingerprint"]):
        raise UserError(f"{file}: fingerprint must be a checksum, of letters and digits")
    known = {name: content[name] for name in StageRecord.__dataclass_fields__ if name in content}
    record = StageRecord(**{name: value for name, value in known.items() if value is not None})
    for name in record.files:
        if not lies_inside(file.parent, name):
            raise UserError(f"{file} names {name!a}, which is not a file in the stage's folder")
    return record


def lies_inside(place: Path, name: str) -> bool:
    """Whether a name of a record is that of a file in the folder,
    also where a folder in it is a link."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        return False
    return (place / name).parent.resolve().is_relative_to(place.resolve())


def readable_record(file: Path) -> StageRecord | None:
    """The record in a file, None for one that is missing or damaged, which is as good as none."""
    try:
        return read_record(file)
    except UserError:
        return None


def number_of(stages: Sequence[Stage[R]], name: str, where: str) -> int:
    """The place of a stage in the table. Raises UserError, naming the option `where`,
    for an unknown name."""
    names = [stage.name for stage in stages]
    if name not in names:
        raise UserError(
            f"{where} is {name}, which is not a stage of this experiment; {choices(name, names)}"
        )
    return names.index(name)


def check_redo(stages: Sequence[Stage[R]], redo: Collection[str]) -> None:
    """Raises UserError for a name in `redo` that is no stage."""
    for name in redo:
        number_of(stages, name, "redo")


def redo_of(stages: Sequence[Stage[R]], redo: Collection[str]) -> list[str]:
    """The names in `redo` that are stages of these, where it is for several runs."""
    known = {stage.name for stage in stages}
    return [name for name in redo if name in known]


def depending_on(stages: Sequence[Stage[R]], names: Collection[str]) -> set[str]:
    """These stages and all that depend on one of them."""
    covered = set(names)
    for number, stage in enumerate(stages):
        if covered & set(sources_of(stages, number)):
            covered.add(stage.name)
    return covered


def sources_of(stages: Sequence[Stage[R]], number: int) -> list[str]:
    """The stages that a stage depends on directly."""
    stage = stages[number]
    before = [stages[number - 1].name] if number else []
    needs = before if stage.needs is None else stage.needs
    return [*needs, *(file.partition("/")[0] for file in stage.files)]
