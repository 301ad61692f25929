"""What a stage is, and the record that it leaves.

Each stage writes into a folder of its name. `started.json` records what it is being made from.
`stage.json` is written last, and records what it was made from and its files:

    {"fingerprint": "3f0c...",                   digest of all that its result depends on:
     "version": 1,                               - the version of its code
     "needs": {"documents": "77ab..."},          - fingerprints of the stages it was made from
     "made_with": {"retriever/model.safetensors": "..."},   - checksums of single files of stages
     "inputs": {"training": {"steps": 1000}},    - settings, and what files outside the run hold
     "settings": {"training": {"steps": 1000, ...}},        the sections that it reads, whole
     "made_by": "cm3leon 0.1.0",
     "seconds": 12.5, "files": {"model.safetensors": "9a1b..."}}

If the digest of today's inputs equals the recorded fingerprint, the stage is up to date. A change
travels down the chain, since each fingerprint is an input of those behind it:

    documents 77ab -> retriever 10fe -> vectors c3d9 -> index 0b44
    a new seed:       retriever 9d21 -> vectors c3d9 -> ...

Here the vectors depend on the encoder's file (`files`), not on the retriever's fingerprint: if the
new seed gives the same weights, the vectors and all behind them stay.
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
"""(k, n): this worker is number k, from 0, of the n that share a stage's shards."""

STARTED = "started.json"
"""Records what is being made in a folder that has no `MARKER` yet."""


@dataclass(frozen=True)
class Stage(Generic[R]):
    """One step of a run; it writes into the folder of its name and nowhere else.

    `make(run, folder)` may find a part of its work already there. `make_part(run, folder, part)`
    makes one worker's share of the shards, if workers can share the stage; missing shards are made
    again one by one.
    """

    name: str
    version: int
    """Raise it when the code starts to make something else of the same inputs."""
    inputs: Callable[[R], Any]
    """All that its result depends on besides other stages, and nothing else, as JSON."""
    make: Callable[[R, Path], None]
    make_part: Callable[[R, Path, Part], None] | None = None
    needs: tuple[str, ...] | None = None
    """Names of the stages it depends on through their fingerprints; None: the stage before it."""
    files: tuple[str, ...] = ()
    """Files of other stages it depends on through their content, however they were made."""
    settings: Callable[[R], Mapping[str, Any]] = lambda run: {}
    """The whole sections of the experiment that it reads,
    so that it can be opened later as it was made."""
    results: tuple[str, ...] = ("*",)
    """Patterns of the files that make up its result; `*` also matches across folders. Logs, events,
    pages and checkpoints are not results: whatever happens to them, the stage stays finished."""
    scratch: tuple[str, ...] = ()
    """Folders inside its own that only later stages use;
    they are deleted when the result is set aside."""
    expensive: bool = False
    """Whether it trains, or takes hours on a large corpus;
    then it is made anew only if `redo` allows it."""
    trains: Callable[[R], bool] = lambda run: False
    """Whether these settings train it, so that without a checkpoint it must start
    from the first step."""


@dataclass(frozen=True)
class StageRecord:
    """The content of `stage.json` or `started.json`."""

    fingerprint: str
    version: int | None = None
    """None in records of earlier versions of the code,
    which do not say what a stage was made from."""
    needs: dict[str, str] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)
    inputs: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    made_by: str = ""
    """Name and version of the package; "" in records of versions that did not record it."""
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
    """The record of a stage; None without a file.

    Raises:
        UserError: for a file that is not a record, or names files outside the stage's folder.
        OSError: if the system refuses to read it.
    """
    if not file.exists():
        return None
    content = read_json(file, RECORD)

    # The fingerprint becomes part of a folder's name when a result is set aside.
    if not re.fullmatch(r"[0-9A-Za-z]{1,64}", content["fingerprint"]):
        raise UserError(f"{file}: fingerprint must be a checksum, of letters and digits")
    known = {}
    for name in StageRecord.__dataclass_fields__:
        if content.get(name) is not None:
            known[name] = content[name]
    record = StageRecord(**known)

    for name in record.files:
        if not lies_inside(file.parent, name):
            raise UserError(f"{file} names {name!a}, which is not a file in the stage's folder")
    return record


def lies_inside(place: Path, name: str) -> bool:
    """Whether a name in a record is that of a file in the folder,
    also if a folder in it is a link."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        return False
    return (place / name).parent.resolve().is_relative_to(place.resolve())


def readable_record(file: Path) -> StageRecord | None:
    """The record in a file; None for one that is missing or damaged."""
    try:
        return read_record(file)
    except UserError:
        return None


def number_of(stages: Sequence[Stage[R]], name: str, where: str) -> int:
    """The index of a stage in the table. Raises UserError for an unknown name;
    `where` is the option."""
    names = [stage.name for stage in stages]
    if name not in names:
        raise UserError(
            f"{where} is {name}, which is not a stage of this experiment; {choices(name, names)}"
        )
    return names.index(name)


def check_redo(stages: Sequence[Stage[R]], redo: Collection[str]) -> None:
    """Raise UserError for a name in `redo` that is not a stage."""
    for name in redo:
        number_of(stages, name, "redo")


def redo_of(stages: Sequence[Stage[R]], redo: Collection[str]) -> list[str]:
    """The names in `redo` that are stages of this run, as `redo` may be for several runs."""
    known = {stage.name for stage in stages}
    return [name for name in redo if name in known]


def depending_on(stages: Sequence[Stage[R]], names: Collection[str]) -> set[str]:
    """These stages, and all that depend on one of them."""
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
