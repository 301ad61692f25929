"""Stages that are skipped if nothing they depend on has changed, and continued after a kill.

stage.py        what a stage is, and the record that it leaves
differences.py  two records compared, in words
folders.py      the folders that stages write into
plan.py         what to do for each stage, before anything is changed
pipeline.py     stages brought up to date, whole or in parts
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from cm3leon.io import write_json
from cm3leon.locks import locked
from cm3leon.paths import make_folder, naming
from cm3leon.records import MARKER
from cm3leon.secrets import without_secrets
from cm3leon.stages.folders import (
    SUPERSEDED,
    check_run_folder,
    damaged_files,
    make_result,
    make_room,
)
from cm3leon.stages.plan import (
    PlannedStage,
    causes,
    planned,
    refuse_unasked,
    step_for,
    wanted_record,
)
from cm3leon.stages.stage import (
    STARTED,
    Part,
    R,
    Stage,
    StageRecord,
    check_redo,
    depending_on,
    lies_inside,
    number_of,
    readable_record,
)
from cm3leon.types import UserError


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
    """Bring every stage up to date, until `until` if it is given.

    Results made from other inputs are not deleted but moved to `superseded/`, and moved back when
    the inputs are as they were.

    Args:
        redo: stages that may be made anew although they are expensive, with all that depend on
            them. Stages that are up to date stay, so that the same command continues after a kill.
        accepted: called once, before anything is made, when this process holds the folder and
            nothing is refused.

    Returns:
        the seconds that each stage took when it was made.

    Raises:
        UserError: if another process works in the folder, the folder is not a run's, other files
            are where a stage writes, an expensive stage would be made anew without `redo`, or there
            is no such stage.
    """
    check_redo(stages, redo)
    covered = depending_on(stages, redo)
    if until is not None:
        stages = stages[: number_of(stages, until, "until") + 1]
    check_run_folder(folder)
    make_folder(folder, "run")

    seconds: dict[str, float] = {}
    with locked(folder):
        steps = planned(stages, run, folder)
        refuse_unasked(steps, folder, covered)
        accepted()

        made: dict[str, StageRecord] = {}
        for number, stage in enumerate(stages, 1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            step = steps[number - 1]

            # It depends on files of a stage that did not exist when the plan was made.
            if step.wanted is None:
                fingerprints = {name: record.fingerprint for name, record in made.items()}
                wanted = wanted_record(stage, run, fingerprints, made)
                step = step_for(stage, run, folder, wanted)
                refuse_unasked([step], folder, covered)
            assert step.wanted is not None
            made[stage.name] = _bring_up_to_date(step, run, folder / stage.name, title, say)
            seconds[stage.name] = made[stage.name].seconds
    return seconds


def check_unasked(
    stages: Sequence[Stage[R]], run: R, folder: Path, redo: Collection[str] = ()
) -> None:
    """Raise UserError where `run_stages` would, for what must not be made anew; changes nothing."""
    refuse_unasked(planned(stages, run, folder), folder, depending_on(stages, redo))


def _bring_up_to_date(
    step: PlannedStage[R], run: R, place: Path, title: str, say: Callable[[str], None]
) -> StageRecord:
    """Make room for a stage's result, and the result if it is not there; return its record."""
    assert step.wanted is not None
    make_room(step.stage, place, step.wanted.fingerprint)

    # Finished and intact: nothing to do. Damaged files are deleted and made again.
    record = readable_record(place / MARKER)
    if record is not None:
        damaged = damaged_files(step.stage, place, record)
        if not damaged:
            back = "" if step.standing is None else ", fetched back from superseded"
            say(f"{title}: up to date{back if step.anew else ''}")
            return record
        for name in damaged:
            if lies_inside(place, name):
                (place / name).unlink(missing_ok=True)
        say(f"{title}: {damaged[0]} is missing or has changed, made again")
    elif (place / STARTED).is_file():
        say(f"{title}: going on where it stopped")
    elif step.anew:
        why = causes(step, [])
        say(f"{title}: made anew ({why}); the earlier result is kept in {SUPERSEDED}")
    else:
        say(title)

    record = make_result(step.stage, run, place, step.wanted)
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
    """Make one worker's share of a stage; any number of workers may do so at once, on any machines.

    This does not finish the stage: `run_stages` finds the shards, makes the missing ones,
    and finishes.

    Raises:
        UserError: for a stage that is unknown or that workers cannot share, if a stage before it is
            not finished, or if it is finished with other settings and `redo` does not allow it.
    """
    check_redo(stages, redo)
    number = number_of(stages, name, "stage")
    stage, place = stages[number], folder / name

    if stage.make_part is None:
        shared = ", ".join(other.name for other in stages if other.make_part)
        raise UserError(
            f"stage is {name}, which is made in one piece; workers share: {shared or 'no stage'}"
        )
    if not folder.is_dir():
        raise UserError(f"run: {folder} does not exist; make the stages before {name} first")

    # Workers hold the folder together; the lock .room lets one of them prepare the stage's folder.
    with locked(folder, shared=True):
        missing, records = _unfinished(stages[:number], run, folder)
        if missing:
            raise UserError(
                f"stage {name} needs {missing}, which is not finished in {folder} with these "
                f"settings; make it first, with until={stages[number - 1].name}"
            )
        made = {name: record.fingerprint for name, record in records.items()}
        wanted = wanted_record(stage, run, made, records)
        assert wanted is not None

        with locked(folder, ".room", wait=True):
            refuse_unasked(
                [step_for(stage, run, folder, wanted)], folder, depending_on(stages, redo)
            )
            make_room(stage, place, wanted.fingerprint)
            if not (place / MARKER).is_file() and not (place / STARTED).is_file():
                place.mkdir(parents=True, exist_ok=True)
                write_json(place / STARTED, without_secrets(asdict(wanted)))

        with naming(place):
            stage.make_part(run, place, part)


def first_unfinished(
    stages: Sequence[Stage[R]], run: R, folder: Path
) -> tuple[str | None, dict[str, str]]:
    """The first stage that is not finished with these settings, if any,
    and the fingerprints before it."""
    missing, records = _unfinished(stages, run, folder)
    return missing, {name: record.fingerprint for name, record in records.items()}


def _unfinished(
    stages: Sequence[Stage[R]], run: R, folder: Path
) -> tuple[str | None, dict[str, StageRecord]]:
    """The first stage that is not finished with these settings,
    and the records of those before it."""
    records: dict[str, StageRecord] = {}
    for stage in stages:
        made = {name: record.fingerprint for name, record in records.items()}
        wanted = wanted_record(stage, run, made, records)
        record = readable_record(folder / stage.name / MARKER)
        if wanted is None or record is None or record.fingerprint != wanted.fingerprint:
            return stage.name, records
        records[stage.name] = record
    return None, records


def is_finished(stage: Stage[R], before: Sequence[Stage[R]], run: R, folder: Path) -> bool:
    """Whether a stage is up to date with intact files, and those before it are finished."""
    missing, records = _unfinished([*before, stage], run, folder)
    return missing is None and not damaged_files(stage, folder / stage.name, records[stage.name])
