"""What a run is about to do, found out before anything in its folder is changed.

What would be lost, or made anew at great expense, is refused unless `redo=` allows it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from cm3leon.io import digest_of
from cm3leon.records import MARKER
from cm3leon.stages.differences import DIFFERENCES, changed_parts, differences
from cm3leon.stages.folders import SUPERSEDED, attic, damaged_files, is_kept, refuse_foreign_files
from cm3leon.stages.stage import (
    STARTED,
    R,
    Stage,
    StageRecord,
    depending_on,
    read_record,
    readable_record,
    sources_of,
)
from cm3leon.training.steps import checkpoints, step_of
from cm3leon.types import UserError


@dataclass(frozen=True)
class PlannedStage(Generic[R]):
    """What a run is about to do with a stage."""

    stage: Stage[R]
    wanted: StageRecord | None
    """What it is to be made from; None if that depends on files that are still to be made."""
    standing: StageRecord | None = None
    """The record in its folder, whether the stage is finished or not."""
    finished: bool = False
    """Whether the stage in the folder is finished."""
    anew: bool = False
    """Whether the stage in the folder was made from something else."""
    kept: bool = False
    """Whether the wanted result is in `superseded`."""
    differences: tuple[str, ...] = ()
    """What differs, in words."""
    changed: tuple[str, ...] = ()
    """Stages before it, and files of stages, that have changed."""
    refusal: str = ""
    """Why it cannot be made again without `redo`, although it was made from what is wanted."""


def planned(stages: Sequence[Stage[R]], run: R, folder: Path) -> list[PlannedStage[R]]:
    """What to do for each stage, found out without changing anything."""
    steps: list[PlannedStage[R]] = []
    fingerprints: dict[str, str] = {}
    records: dict[str, StageRecord] = {}
    for number, stage in enumerate(stages):
        wanted = wanted_record(stage, run, fingerprints, records)

        # Stages before it that will be made anew, which change it too.
        others = [step.stage.name for step in steps if step.anew and not step.kept]
        changed = [name for name in sources_of(stages, number) if name in others]
        step = step_for(stage, run, folder, wanted, changed)
        steps.append(step)

        if wanted is not None:
            fingerprints[stage.name] = wanted.fingerprint
        record = _record_to_stand(step, folder)
        if record is not None:
            records[stage.name] = record
    return steps


def wanted_record(
    stage: Stage[R],
    run: R,
    fingerprints: Mapping[str, str],
    records: Mapping[str, StageRecord],
) -> StageRecord | None:
    """What a stage is to be made from; None if a stage before it has to be made to know that.

    Args:
        fingerprints: of the stages before it, in order, without unknown ones.
        records: of the stages before it whose files exist.
    """
    # A stage that does not say what it needs depends on the one before it.
    needs = list(fingerprints)[-1:] if stage.needs is None else list(stage.needs)
    if any(name not in fingerprints for name in needs):
        return None

    made_with = {}
    for file in stage.files:
        name, _, inner = file.partition("/")
        if name not in records or inner not in records[name].files:
            return None
        made_with[file] = records[name].files[inner]

    # Through JSON, so that a record compares equal after it was written and read.
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


def step_for(
    stage: Stage[R],
    run: R,
    folder: Path,
    wanted: StageRecord | None,
    changed: Sequence[str] = (),
) -> PlannedStage[R]:
    """What to do for a stage.

    Args:
        changed: stages it depends on that will change.
    """
    # A record that cannot be read is no error yet: whether anything is lost is decided below.
    place = folder / stage.name
    record, unreadable = None, ""
    try:
        record = read_record(place / MARKER)
    except UserError as error:
        unreadable = str(error)
    finished = record is not None
    standing = record or readable_record(place / STARTED)

    # A stage that the points of a sweep share: the link may be removed without losing anything.
    if place.is_symlink():
        if wanted is not None and record is not None and record.fingerprint == wanted.fingerprint:
            return PlannedStage(stage, wanted, standing, finished)
        return PlannedStage(stage, wanted)

    if standing is None:
        refuse_foreign_files(place)
        return PlannedStage(stage, wanted, kept=is_kept(place, wanted))
    if wanted is None:
        return PlannedStage(
            stage, wanted, standing, finished, anew=bool(changed), changed=tuple(changed)
        )
    if standing.fingerprint != wanted.fingerprint:
        return PlannedStage(
            stage,
            wanted,
            standing,
            finished,
            anew=True,
            kept=is_kept(place, wanted),
            differences=tuple(differences(standing, wanted)),
            changed=tuple(changed_parts(standing, wanted)),
        )

    # Made from the right inputs. If a trained stage lost files, its checkpoint must still be there.
    refusal = ""
    if stage.expensive and stage.trains(run) and not checkpoints(place):
        damaged = damaged_files(stage, place, record) if record else []
        if unreadable or damaged:
            what = unreadable or f"{place / damaged[0]} is missing or has changed"
            refusal = (
                f"{what}, and {place} has no checkpoint to make it of, so that {stage.name} would "
                "be trained again from the first step"
            )
    return PlannedStage(stage, wanted, standing, finished, refusal=refusal)


def _record_to_stand(step: PlannedStage[R], folder: Path) -> StageRecord | None:
    """The record that a stage will have after its turn, if that is known already."""
    if step.wanted is None:
        return None
    if step.kept:
        return readable_record(attic(folder / step.stage.name, step.wanted.fingerprint) / MARKER)
    if step.finished and not step.anew:
        return step.standing
    return None


def refuse_unasked(
    steps: Sequence[PlannedStage[R]], folder: Path, covered: Collection[str]
) -> None:
    """Raise UserError if an expensive stage would be made anew, or unfinished work set aside,
    without `redo`."""
    lost = [step for step in steps if step.stage.expensive and step.stage.name not in covered]
    for step in lost:
        place = folder / step.stage.name
        if step.refusal:
            raise UserError(
                f"run: {step.refusal}; put a copy of the file back, or say redo={step.stage.name} "
                "to make it anew"
            )
        if step.anew and not step.kept and not step.finished and checkpoints(place):
            at = step_of(checkpoints(place)[-1])
            raise UserError(
                f"run: {place} has come to step {at} with other settings ({causes(step, steps)}); "
                f"put them back, choose another run folder, or say redo={step.stage.name} to begin "
                "anew"
            )

    # Finished stages that would be made anew; the first of them is the cause of those behind it.
    anew = [step for step in lost if step.anew and not step.kept and step.finished]
    if not anew:
        return
    first = anew[0]
    names = [step.stage.name for step in anew]

    # `redo` covers what depends on the stages that it names, so only the others are asked for.
    dependent = depending_on([step.stage for step in steps], [first.stage.name])
    asked = [first.stage.name]
    for name in names[1:]:
        if name not in dependent:
            asked.append(name)
    also = f"; {_and(names[1:])} would follow" if names[1:] else ""
    raise UserError(
        f"run: {first.stage.name} in {folder} is finished, and these settings would make it anew "
        f"({causes(first, steps)}){also}; say redo={','.join(asked)} to do so, which keeps what is "
        f"there in {SUPERSEDED}, or put the settings back, or choose another run folder"
    )


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def causes(step: PlannedStage[R], steps: Sequence[PlannedStage[R]]) -> str:
    """Why a stage is to be made anew: what differs in its own inputs,
    and in changed stages before it."""
    by_name = {each.stage.name: each for each in steps}
    found: list[str] = []

    def add(step: PlannedStage[R]) -> None:
        found.extend(step.differences)
        for part in step.changed:
            before = by_name.get(part.partition("/")[0])
            if before is not None and before.anew:
                add(before)
            else:
                found.append(f"{part} is another")

    add(step)
    return "; ".join(list(dict.fromkeys(found))[: DIFFERENCES + 1])
