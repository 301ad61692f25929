"""Stages that are skipped when nothing they depend on has changed, and go on where a kill stopped them.

Each stage writes into a folder of its name. `started.json` says from what it is being made, and `stage.json`, written
last, from what it was made and what its files are:

    {"fingerprint": "3f0c...", "version": 1,
     "needs": {"documents": "77ab..."},                  the stages it was made from, by their fingerprints
     "made_with": {"retriever/model.safetensors": "..."},   single files of stages, by their checksums
     "inputs": {"training": {"steps": 1000}},            what else its result depends on
     "settings": {"training": {"steps": 1000, ...}},     the sections of the experiment as they were, whole
     "seconds": 12.5, "files": {"model.safetensors": "9a1b..."}}

A run is planned before anything in the folder is touched: what would be lost, or made anew at great expense, is said
and has to be asked for with `redo=`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, TypeVar

from cm3leon.config import choices
from cm3leon.io import digest_of, read_json, write_json
from cm3leon.locks import LOCK, locked
from cm3leon.paths import check_folder, make_folder, naming
from cm3leon.records import MARKER, changed, checksum
from cm3leon.training.steps import checkpoints, step_of
from cm3leon.types import UserError

R = TypeVar("R")
Part = tuple[int, int]
"""(k, n): this worker is number k, from 0, of n that share a stage's shards."""

STARTED = "started.json"
"""Tells what is being made in a folder that has no `MARKER` yet."""
SUPERSEDED = "superseded"
DIFFERENCES = 5
"""Settings that a refusal names, if more differ."""


@dataclass(frozen=True)
class Stage(Generic[R]):
    """One step of a run; it writes into the folder of its name and nowhere else.

    `make(run, folder)` may find a part of its work there. `make_part(run, folder, part)` makes one worker's share of
    the shards, where the stage can be shared out; what is missing of a shared stage is made again shard by shard.
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
    """The sections of the experiment that it reads, whole, so that it can be opened later as it was made."""
    results: tuple[str, ...] = ("*",)
    """Patterns of the files that make up its result; `*` stands for any text, also across folders. Logs, events, pages
    and checkpoints are none: whatever happens to them, the stage stays finished."""
    expensive: bool = False
    """Whether it trains, or takes hours on a large corpus: it is made anew only where `redo` asks for it."""
    trains: Callable[[R], bool] = lambda run: False
    """Whether these settings train it, so that without a checkpoint it can only be made again from the first step."""


@dataclass(frozen=True)
class StageRecord:
    """What `stage.json` or `started.json` says of a stage."""

    fingerprint: str
    version: int | None = None
    """None in records of earlier versions of the code, which did not say from what a stage was made."""
    needs: dict[str, str] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)
    inputs: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    files: dict[str, str] = field(default_factory=dict)


RECORD = {
    "fingerprint": str,
    "version?": int,
    "needs?": {str: str},
    "made_with?": {str: str},
    "settings?": dict,
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
        if not _lies_inside(file.parent, name):
            raise UserError(f"{file} names {name!a}, which is not a file in the stage's folder")
    return record


def _lies_inside(place: Path, name: str) -> bool:
    """Whether a name of a record is that of a file in the folder, also where a folder in it is a link."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        return False
    return (place / name).parent.resolve().is_relative_to(place.resolve())


# ------------------------------------------------------------------------------------------------ running


def run_stages(
    stages: Sequence[Stage[R]],
    run: R,
    folder: Path,
    say: Callable[[str], None],
    *,
    until: str | None = None,
    redo: Collection[str] = (),
    accepted: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Bring every stage up to date, to `until` if it is given. Return the seconds that each took when it was made.

    Results made from other inputs are not deleted but moved to `superseded/`, and fetched from there when the inputs
    are as they were.

    Args:
        redo: stages that may be made anew although they are expensive, with all that depend on them. One that is up
            to date is not made anew for that, so that the same command goes on after a kill.
        accepted: called once, before anything is made, when the folder is this process's and nothing is refused.

    Raises:
        UserError: if another process is working in the folder, it is somebody else's, files of somebody else's stand
            where a stage writes, an expensive stage would be made anew unasked, or there is no such stage.
    """
    check_redo(stages, redo)
    covered = depending_on(stages, redo)
    if until is not None:
        stages = stages[: number_of(stages, until, "until") + 1]
    check_run_folder(folder)
    make_folder(folder, "run")
    seconds: dict[str, float] = {}
    with locked(folder):
        steps = _planned(stages, run, folder)
        _refuse_unasked(steps, folder, covered)
        accepted()

        made: dict[str, StageRecord] = {}
        for number, stage in enumerate(stages, 1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            step = steps[number - 1]
            if step.wanted is None:
                # It depends on files of a stage that has been made since the plan.
                wanted = _wanted(
                    stage, run, {name: r.fingerprint for name, r in made.items()}, made
                )
                step = _step(stage, run, folder, wanted)
                _refuse_unasked([step], folder, covered)
            assert step.wanted is not None
            made[stage.name] = _bring_up_to_date(step, run, folder / stage.name, title, say)
            seconds[stage.name] = made[stage.name].seconds
    return seconds


def check_unasked(
    stages: Sequence[Stage[R]], run: R, folder: Path, redo: Collection[str] = ()
) -> None:
    """Raises UserError where `run_stages` would, for what must not be made anew unasked; changes nothing."""
    _refuse_unasked(_planned(stages, run, folder), folder, depending_on(stages, redo))


def _bring_up_to_date(
    step: Step[R], run: R, place: Path, title: str, say: Callable[[str], None]
) -> StageRecord:
    """Make the room for a stage's result, and the result where it is not there. Return its record."""
    assert step.wanted is not None
    _make_room(place, step.wanted.fingerprint)
    record = _readable(place / MARKER)
    if record is not None:
        damaged = _damaged(step.stage, place, record)
        if not damaged:
            back = "" if step.standing is None else ", fetched back from superseded"
            say(f"{title}: up to date{back if step.anew else ''}")
            return record
        for name in damaged:
            if _lies_inside(place, name):
                (place / name).unlink(missing_ok=True)
        say(f"{title}: {damaged[0]} is missing or has changed, made again")
    elif (place / STARTED).is_file():
        say(f"{title}: going on where it stopped")
    elif step.anew:
        why = _causes(step, [])
        say(f"{title}: made anew ({why}); what was there is in {SUPERSEDED}")
    else:
        say(title)
    record = _make(step.stage, run, place, step.wanted)
    say(f"{title}: done in {record.seconds:.0f} s")
    return record


def run_part(
    stages: Sequence[Stage[R]],
    name: str,
    run: R,
    folder: Path,
    part: Part,
    *,
    redo: Collection[str] = (),
) -> None:
    """Make one worker's share of a stage. Any number of workers may do so at the same time, on any machines.

    The stage is not finished by it: `run_stages` finds the shards there, makes what is still missing, and finishes.

    Raises:
        UserError: for a stage that is unknown or cannot be shared out, if a stage before it is not finished, or if it
            is finished with other settings and not among those that may be made anew.
    """
    check_redo(stages, redo)
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
        missing, records = _unfinished(stages[:number], run, folder)
        if missing:
            raise UserError(
                f"stage {name} needs {missing}, which is not finished in {folder} with these settings; "
                f"make it first, with until={stages[number - 1].name}"
            )
        made = {name: record.fingerprint for name, record in records.items()}
        wanted = _wanted(stage, run, made, records)
        assert wanted is not None
        with locked(folder, ".room", wait=True):
            _refuse_unasked([_step(stage, run, folder, wanted)], folder, depending_on(stages, redo))
            _make_room(place, wanted.fingerprint)
            if not (place / MARKER).is_file() and not (place / STARTED).is_file():
                place.mkdir(parents=True, exist_ok=True)
                write_json(place / STARTED, asdict(wanted))
        with naming(place):
            stage.make_part(run, place, part)


def first_unfinished(
    stages: Sequence[Stage[R]], run: R, folder: Path
) -> tuple[str | None, dict[str, str]]:
    """The first stage that is not finished in the folder with these settings, if any, and the fingerprints up to it."""
    missing, records = _unfinished(stages, run, folder)
    return missing, {name: record.fingerprint for name, record in records.items()}


def _unfinished(
    stages: Sequence[Stage[R]], run: R, folder: Path
) -> tuple[str | None, dict[str, StageRecord]]:
    """The first stage that is not finished with these settings, and the records of those before it."""
    records: dict[str, StageRecord] = {}
    for stage in stages:
        made = {name: record.fingerprint for name, record in records.items()}
        wanted = _wanted(stage, run, made, records)
        record = _readable(folder / stage.name / MARKER)
        if wanted is None or record is None or record.fingerprint != wanted.fingerprint:
            return stage.name, records
        records[stage.name] = record
    return None, records


def is_finished(stage: Stage[R], before: Sequence[Stage[R]], run: R, folder: Path) -> bool:
    """Whether a stage, with those before it finished, is up to date in the folder and its files as they were made."""
    missing, records = _unfinished([*before, stage], run, folder)
    return missing is None and not _damaged(stage, folder / stage.name, records[stage.name])


def number_of(stages: Sequence[Stage[R]], name: str, where: str) -> int:
    """The place of a stage in the table. Raises UserError, naming the option `where`, for an unknown name."""
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


def depending_on(stages: Sequence[Stage[R]], names: Collection[str]) -> set[str]:
    """These stages and all that depend on one of them."""
    covered = set(names)
    for number, stage in enumerate(stages):
        if covered & set(_sources(stages, number)):
            covered.add(stage.name)
    return covered


def _sources(stages: Sequence[Stage[R]], number: int) -> list[str]:
    """The stages that a stage depends on directly."""
    stage = stages[number]
    before = [stages[number - 1].name] if number else []
    needs = before if stage.needs is None else stage.needs
    return [*needs, *(file.partition("/")[0] for file in stage.files)]


# ------------------------------------------------------------------------------------------------ planning


@dataclass(frozen=True)
class Step(Generic[R]):
    """What a run is about to do with a stage."""

    stage: Stage[R]
    wanted: StageRecord | None
    """What it is to be made from; None where that depends on files that are still to be made."""
    standing: StageRecord | None = None
    """The record of what stands in its folder, finished or not."""
    finished: bool = False
    """Whether what stands there is finished."""
    anew: bool = False
    """Whether what stands there was made from something else."""
    kept: bool = False
    """Whether what is wanted lies in `superseded`."""
    differences: tuple[str, ...] = ()
    """What differs, in words."""
    changed: tuple[str, ...] = ()
    """Stages before it, and files of such, that are others now."""
    refusal: str = ""
    """Why it cannot be made again unasked, although it was made from what is wanted."""


def _planned(stages: Sequence[Stage[R]], run: R, folder: Path) -> list[Step[R]]:
    """What has to be done for each stage, found out without changing anything."""
    steps: list[Step[R]] = []
    fingerprints: dict[str, str] = {}
    records: dict[str, StageRecord] = {}
    for number, stage in enumerate(stages):
        wanted = _wanted(stage, run, fingerprints, records)
        others = [step.stage.name for step in steps if step.anew and not step.kept]
        changed = [name for name in _sources(stages, number) if name in others]
        step = _step(stage, run, folder, wanted, changed)
        steps.append(step)
        if wanted is not None:
            fingerprints[stage.name] = wanted.fingerprint
        record = _record_to_stand(step, folder)
        if record is not None:
            records[stage.name] = record
    return steps


def _wanted(
    stage: Stage[R],
    run: R,
    fingerprints: Mapping[str, str],
    records: Mapping[str, StageRecord],
) -> StageRecord | None:
    """What a stage is to be made from, None where a stage before it has still to be made for that.

    Args:
        fingerprints: of the stages before it, in order; those that are not known yet are left out.
        records: of the stages before it whose files are there.
    """
    needs = list(fingerprints)[-1:] if stage.needs is None else list(stage.needs)
    if any(name not in fingerprints for name in needs):
        return None
    made_with = {}
    for file in stage.files:
        name, _, inner = file.partition("/")
        if name not in records or inner not in records[name].files:
            return None
        made_with[file] = records[name].files[inner]
    inputs = json.loads(json.dumps(stage.inputs(run)))
    needed = {name: fingerprints[name] for name in needs}
    content = [stage.name, stage.version, inputs, needed, made_with]
    return StageRecord(
        fingerprint=digest_of(json.dumps(content, sort_keys=True)),
        version=stage.version,
        needs=needed,
        made_with=made_with,
        inputs=inputs,
        settings=json.loads(json.dumps(stage.settings(run))),
    )


def _step(
    stage: Stage[R],
    run: R,
    folder: Path,
    wanted: StageRecord | None,
    changed: Sequence[str] = (),
) -> Step[R]:
    """What has to be done for a stage; `changed` are stages that it depends on and that will be others."""
    place = folder / stage.name
    record, unreadable = None, ""
    try:
        record = read_record(place / MARKER)
    except UserError as error:
        unreadable = str(error)
    finished = record is not None
    standing = record or _readable(place / STARTED)
    if place.is_symlink():
        # A sweep's shared stage. The link may go: what it leads to stays where it is.
        same = (
            wanted is not None and record is not None and record.fingerprint == wanted.fingerprint
        )
        return Step(stage, wanted, standing if same else None, finished and same)
    if standing is None:
        _refuse_foreign_files(place)
        return Step(stage, wanted, kept=_is_kept(place, wanted))
    if wanted is None:
        return Step(stage, wanted, standing, finished, anew=bool(changed), changed=tuple(changed))
    if standing.fingerprint != wanted.fingerprint:
        return Step(
            stage,
            wanted,
            standing,
            finished,
            anew=True,
            kept=_is_kept(place, wanted),
            differences=tuple(differences(standing, wanted)),
            changed=tuple(changed_parts(standing, wanted)),
        )

    refusal = ""
    if stage.expensive and stage.trains(run) and not checkpoints(place):
        damaged = _damaged(stage, place, record) if record else []
        if unreadable or damaged:
            what = unreadable or f"{place / damaged[0]} is missing or has changed"
            refusal = (
                f"{what}, and {place} has no checkpoint to make it of, so that {stage.name} would be trained again "
                "from the first step"
            )
    return Step(stage, wanted, standing, finished, refusal=refusal)


def _record_to_stand(step: Step[R], folder: Path) -> StageRecord | None:
    """The record that a stage will have when its turn is over, where that is known beforehand."""
    if step.kept and step.wanted is not None:
        return _readable(_attic(folder / step.stage.name, step.wanted.fingerprint) / MARKER)
    same = step.standing is not None and step.wanted is not None and not step.anew
    return step.standing if same and step.finished else None


def _refuse_unasked(steps: Sequence[Step[R]], folder: Path, covered: Collection[str]) -> None:
    """Raises UserError if an expensive stage would be made anew, or unfinished work set aside, without `redo`."""
    lost = [step for step in steps if step.stage.expensive and step.stage.name not in covered]
    for step in lost:
        place = folder / step.stage.name
        if step.refusal:
            raise UserError(
                f"run: {step.refusal}; put a copy of the file back, or say redo={step.stage.name} to make it anew"
            )
        if step.anew and not step.kept and not step.finished and checkpoints(place):
            at = step_of(checkpoints(place)[-1])
            raise UserError(
                f"run: {place} has come to step {at} with other settings ({_causes(step, steps)}); put them "
                f"back, choose another run folder, or say redo={step.stage.name} to begin anew"
            )

    anew = [step for step in lost if step.anew and not step.kept and step.finished]
    if not anew:
        return
    first = anew[0]
    names = [step.stage.name for step in anew]
    every = [step.stage for step in steps]
    following = [name for name in names if name in depending_on(every, [first.stage.name])][1:]
    asked = [first.stage.name, *(name for name in names[1:] if name not in following)]
    also = f"; {_and(names[1:])} would follow" if names[1:] else ""
    raise UserError(
        f"run: {first.stage.name} in {folder} is finished, and these settings would make it anew "
        f"({_causes(first, steps)}){also}; say redo={','.join(asked)} to do so, which keeps what is there in "
        f"{SUPERSEDED}, or put the settings back, or choose another run folder"
    )


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _causes(step: Step[R], steps: Sequence[Step[R]]) -> str:
    """Why a stage is to be made anew: what differs of its own, and of the stages before it that are others."""
    by_name = {each.stage.name: each for each in steps}
    found: list[str] = []

    def add(step: Step[R]) -> None:
        found.extend(step.differences)
        for part in step.changed:
            before = by_name.get(part.partition("/")[0])
            if before is not None and before.anew:
                add(before)
            else:
                found.append(f"{part} is another")

    add(step)
    return "; ".join(list(dict.fromkeys(found))[: DIFFERENCES + 1])


def differences(before: StageRecord, now: StageRecord) -> list[str]:
    """What differs between what a stage was made from and what it is to be made from, in words."""
    if before.version is None:
        return [
            "it was made by an earlier version of CM3Leon, whose record does not say from which settings"
        ]
    was, is_ = _flat(before.inputs), _flat(now.inputs)
    keys = [key for key in dict.fromkeys([*was, *is_]) if was.get(key) != is_.get(key)]
    found = [
        f"{key or 'its input'} was {_short(was.get(key))}, is {_short(is_.get(key))}"
        for key in keys[:DIFFERENCES]
    ]
    if len(keys) > DIFFERENCES:
        found.append(f"{len(keys) - DIFFERENCES} more settings differ")
    if before.version != now.version:
        found.append(f"its code is of version {now.version}, it was of version {before.version}")
    return found


def changed_parts(before: StageRecord, now: StageRecord) -> list[str]:
    """The stages, and files of stages, that were others when a stage was made."""
    pairs = ((before.needs, now.needs), (before.made_with, now.made_with))
    return [name for old, new in pairs for name in new if old.get(name) != new[name]]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if re.fullmatch(r'"[0-9a-f]{64}"', text):  # a checksum, of which the beginning says enough
        return text[1:13]
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of such, as one mapping with dotted keys."""
    if isinstance(value, dict) and value:
        entries = value.items()
    elif isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        entries = {str(number): inner for number, inner in enumerate(value)}.items()
    else:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, inner in entries:
        flat |= _flat(inner, f"{key}.{name}".strip("."))
    return flat


# ------------------------------------------------------------------------------------------------ folders


RUN_FILES = (LOCK, "code.json", "sweep.yaml", "study.yaml", "point.yaml", "launch", SUPERSEDED)
"""By any of these a folder is known as a run's, besides a stage's record and a `config.yaml` of an experiment."""


def check_run_folder(folder: Path) -> None:
    """Refuse a folder that is no run's, before anything is written there.

    Raises:
        UserError: for the root of a file system, a home, or a folder with files that are not those of a run.
    """
    if folder.parent.resolve() == folder.resolve() or folder.resolve() == Path.home().resolve():
        raise UserError(
            f"run: {folder} is no place for a run; choose a folder of its own, such as runs/NAME"
        )
    check_folder(folder, "run")
    if not folder.is_dir():
        return
    entries = [entry for entry in os.listdir(folder) if entry == LOCK or not entry.startswith(".")]
    if not entries or any(name in entries for name in RUN_FILES) or _has_experiment(folder):
        return
    if any((folder / name / file).is_file() for name in entries for file in (MARKER, STARTED)):
        return
    raise UserError(
        f"run: {folder} holds files that are not those of a run, for example {folder / sorted(entries)[0]}; choose a "
        "new or empty folder"
    )


def _has_experiment(folder: Path) -> bool:
    """Whether the folder's config.yaml is that of an experiment, by its sections."""
    try:
        lines = (folder / "config.yaml").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False
    return {"data:", "objective:", "training:"} <= set(lines)


def _readable(file: Path) -> StageRecord | None:
    """The record in a file, None for one that is missing or damaged, which is as good as none."""
    try:
        return read_record(file)
    except UserError:
        return None


def _damaged(stage: Stage[R], place: Path, record: StageRecord) -> list[str]:
    """Files of a finished stage that are missing, or not as they were written."""
    results = {name: digest for name, digest in record.files.items() if _is_result(stage, name)}
    # A record that names no file says nothing about them.
    return changed(place, results) if results else [MARKER]


def _make(stage: Stage[R], run: R, place: Path, wanted: StageRecord) -> StageRecord:
    place.mkdir(parents=True, exist_ok=True)
    (place / MARKER).unlink(missing_ok=True)
    write_json(place / STARTED, asdict(wanted))
    start = time.perf_counter()
    with naming(place):
        stage.make(run, place)
    seconds = time.perf_counter() - start
    files = {file.relative_to(place).as_posix(): checksum(file) for file in _results(stage, place)}
    record = StageRecord(**{**asdict(wanted), "seconds": seconds, "files": files})
    write_json(place / MARKER, asdict(record))
    return record


def _results(stage: Stage[R], place: Path) -> Iterator[Path]:
    """The files that make up a result."""
    for file in sorted(place.rglob("*")):
        if file.is_file() and _is_result(stage, file.relative_to(place).as_posix()):
            yield file


def _is_result(stage: Stage[R], name: str) -> bool:
    """Whether a file belongs to a stage's result: no marker, no log or checkpoint, which serve while it is made."""
    inner = name.partition("/")[0]
    if inner in (MARKER, STARTED, "tensorboard") or inner.startswith(("step_", ".")):
        return False
    return any(fnmatchcase(name, pattern) for pattern in stage.results)


def _refuse_foreign_files(place: Path) -> None:
    """Raises UserError if files that no stage has made stand where a stage writes."""
    if not place.is_dir() or all(file.name.startswith(".") for file in place.iterdir()):
        return
    if (place / MARKER).exists() or (place / STARTED).exists():
        raise UserError(
            f"run: neither {MARKER} nor {STARTED} of {place} can be read; move the folder away, or choose another run"
        )
    raise UserError(f"run: {place} holds files that no stage has made; choose another run folder")


def _attic(place: Path, fingerprint: str) -> Path:
    """Where a result that was made from these inputs is kept while another one stands in the stage's folder."""
    return place.parent / SUPERSEDED / f"{place.name}-{fingerprint[:12]}"


def _is_kept(place: Path, wanted: StageRecord | None) -> bool:
    return wanted is not None and _attic(place, wanted.fingerprint).is_dir()


def _make_room(place: Path, fingerprint: str) -> None:
    """Move away what other inputs made, and back what these inputs made earlier."""
    if place.is_symlink():
        record = _readable(place / MARKER)
        if record is not None and record.fingerprint == fingerprint:
            return
        place.unlink()
    standing = _readable(place / MARKER) or _readable(place / STARTED)
    if standing is not None and standing.fingerprint == fingerprint:
        return
    if standing is not None:
        old = _attic(place, standing.fingerprint)
        old.parent.mkdir(exist_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    else:
        _refuse_foreign_files(place)
        shutil.rmtree(place, ignore_errors=True)
    earlier = _attic(place, fingerprint)
    if earlier.is_dir():
        earlier.rename(place)
