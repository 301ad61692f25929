"""Folders of runs and of their stages: which folders are runs,
how results are made and set aside."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from cm3leon import __version__
from cm3leon.io import write_json
from cm3leon.locks import LOCK
from cm3leon.paths import check_folder, naming
from cm3leon.records import MARKER, changed, checksum
from cm3leon.secrets import without_secrets
from cm3leon.stages.stage import STARTED, R, Stage, StageRecord, readable_record
from cm3leon.types import UserError

SUPERSEDED = "superseded"
"""Folder of a run with results that were made from other inputs than the present ones."""


RUN_FILES = (LOCK, "code.json", "sweep.yaml", "study.yaml", "point.yaml", "launch", SUPERSEDED)
"""Any of these identifies a folder as a run's,
as do a stage's record and an experiment's config.yaml."""


def check_run_folder(folder: Path) -> None:
    """Refuse a folder that is not a run's, before anything is written there.

    Raises:
        UserError: for the root of a file system, a home directory, or a folder with other files.
    """
    if folder.parent.resolve() == folder.resolve() or folder.resolve() == Path.home().resolve():
        raise UserError(
            f"run: {folder} cannot be a run folder; choose a folder of its own, such as runs/NAME"
        )

    check_folder(folder, "run")
    if not folder.is_dir():
        return

    # Hidden files, such as an editor's, do not count; the lock of a run does.
    entries = [entry for entry in os.listdir(folder) if entry == LOCK or not entry.startswith(".")]
    if not entries or any(name in entries for name in RUN_FILES) or _has_experiment(folder):
        return
    for name in entries:
        for file in (MARKER, STARTED):
            if (folder / name / file).is_file():
                return
    raise UserError(
        f"run: {folder} holds files that are not those of a run, for example "
        f"{folder / sorted(entries)[0]}; choose a new or empty folder"
    )


def _has_experiment(folder: Path) -> bool:
    """Whether the folder's config.yaml is that of an experiment, by its sections."""
    try:
        lines = (folder / "config.yaml").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False
    return {"data:", "objective:", "training:"} <= set(lines)


def damaged_files(stage: Stage[R], place: Path, record: StageRecord) -> list[str]:
    """Files of a finished stage that are missing, or not as they were written."""
    results = {name: digest for name, digest in record.files.items() if _is_result(stage, name)}
    # A record without files cannot vouch for any.
    return changed(place, results) if results else [MARKER]


def make_result(stage: Stage[R], run: R, place: Path, wanted: StageRecord) -> StageRecord:
    """Make a stage's result in its folder, and write its record last."""
    place.mkdir(parents=True, exist_ok=True)
    (place / MARKER).unlink(missing_ok=True)

    # After a kill this record tells which inputs the unfinished files are of.
    write_json(place / STARTED, without_secrets(asdict(wanted)))

    start = time.perf_counter()
    with naming(place):
        stage.make(run, place)
    seconds = time.perf_counter() - start

    files = {}
    for file in _results(stage, place):
        files[file.relative_to(place).as_posix()] = checksum(file)
    made = {"made_by": f"cm3leon {__version__}", "seconds": seconds, "files": files}
    record = StageRecord(**{**asdict(wanted), **made})
    write_json(place / MARKER, without_secrets(asdict(record)))
    return record


def _results(stage: Stage[R], place: Path) -> Iterator[Path]:
    """The files of a stage's result."""
    for file in sorted(place.rglob("*")):
        if file.is_file() and _is_result(stage, file.relative_to(place).as_posix()):
            yield file


def _is_result(stage: Stage[R], name: str) -> bool:
    """Whether a file belongs to a stage's result; records, logs and checkpoints do not."""
    inner = name.partition("/")[0]
    if inner in (MARKER, STARTED, "tensorboard", "pictures", "loggers") or inner.startswith(
        ("step_", ".")
    ):
        return False
    return any(fnmatchcase(name, pattern) for pattern in stage.results)


def refuse_foreign_files(place: Path) -> None:
    """Raise UserError if there are files where a stage writes that no stage has made."""
    if not place.is_dir() or all(file.name.startswith(".") for file in place.iterdir()):
        return
    if (place / MARKER).exists() or (place / STARTED).exists():
        raise UserError(
            f"run: neither {MARKER} nor {STARTED} of {place} can be read; move the folder away, or "
            "choose another run"
        )
    raise UserError(f"run: {place} holds files that no stage has made; choose another run folder")


def attic(place: Path, fingerprint: str) -> Path:
    """Where a result made from these inputs is kept while another one is in the stage's folder."""
    return place.parent / SUPERSEDED / f"{place.name}-{fingerprint[:12]}"


def is_kept(place: Path, wanted: StageRecord | None) -> bool:
    return wanted is not None and attic(place, wanted.fingerprint).is_dir()


def make_room(stage: Stage[R], place: Path, fingerprint: str) -> None:
    """Set aside what other inputs made, and restore what these inputs made earlier."""
    # A stage that the points of a sweep share: only the link is removed.
    if place.is_symlink():
        record = readable_record(place / MARKER)
        if record is not None and record.fingerprint == fingerprint:
            return
        place.unlink()

    standing = readable_record(place / MARKER) or readable_record(place / STARTED)
    if standing is not None and standing.fingerprint == fingerprint:
        return

    # Finished or not, what was made of other inputs is kept, without what only later stages use.
    if standing is not None:
        old = attic(place, standing.fingerprint)
        old.parent.mkdir(exist_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        for name in stage.scratch:
            shutil.rmtree(place / name, ignore_errors=True)
        place.rename(old)
    else:
        refuse_foreign_files(place)
        shutil.rmtree(place, ignore_errors=True)

    earlier = attic(place, fingerprint)
    if earlier.is_dir():
        earlier.rename(place)
