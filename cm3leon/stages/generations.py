"""Whether the parts of a run folder belong together, and the settings each was made with.

`config.yaml` holds the settings that were last accepted, with which only some stages may have been
made: after a command with `until=`, or one that was stopped, later stages are still those of
earlier settings. So whoever opens a run takes the settings of finished stages from their records,
and refuses parts of different generations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from cm3leon.experiment import Experiment
from cm3leon.records import MARKER, STAGES
from cm3leon.stages.differences import changed_parts, differences
from cm3leon.stages.folders import SUPERSEDED
from cm3leon.stages.stage import StageRecord, read_record
from cm3leon.types import UserError

SHOWN = 3
"""Settings that a refusal names."""
OF_THIS_MACHINE = ("plugins", "launcher", "loggers", "until")
"""Sections that no result depends on."""


def finished_settings(folder: Path) -> dict[str, Any]:
    """Sections of the experiment with which the finished stages were made;
    later stages take precedence.

    Raises:
        UserError: for a record that cannot be read.
    """
    known = {field.name for field in fields(Experiment)} - set(OF_THIS_MACHINE)
    sections: dict[str, Any] = {}
    for name in STAGES:
        record = read_record(folder / name / MARKER)
        for section, content in record.settings.items() if record else ():
            if section in known:
                sections[section] = content
    return sections


def check_generations(folder: Path, needs: Collection[str] = (), where: str = "run") -> None:
    """Compare what the stages of a run were made from with what is in its folder now.

    Args:
        needs: the stages that will be used, including those they were made from; (): all up to
            pretraining.
        where: the setting that names the folder, for the message.

    Raises:
        UserError: if a stage was made with another part than the present one, naming both and what
            differs.
    """
    wanted = list(needs or STAGES[: STAGES.index("pretraining") + 1])
    checked: set[str] = set()
    while wanted:
        name = wanted.pop()
        record = read_record(folder / name / MARKER)
        if name in checked or record is None or (name == "reconstruction" and name not in needs):
            continue
        checked.add(name)
        for other, digest in _made_from(record):
            _check(folder, name, other, digest, where)
            wanted.append(other.partition("/")[0])


def _made_from(record: StageRecord) -> Iterator[tuple[str, str]]:
    """The stages, and files of stages, that a stage was made from,
    with fingerprints and checksums."""
    yield from record.needs.items()
    yield from record.made_with.items()


def _check(folder: Path, name: str, other: str, digest: str, where: str) -> None:
    """Raise UserError if a stage was made with another stage, or file of a stage,
    than the present one."""
    stage, _, file = other.partition("/")
    there = read_record(folder / stage / MARKER)
    if there is None or digest == (there.files.get(file) if file else there.fingerprint):
        return

    # If the earlier result was set aside, its record tells what differs.
    what = ""
    earlier = folder / SUPERSEDED / f"{stage}-{digest[:12]}" / MARKER
    before = read_record(earlier) if not file else None
    if before is not None:
        parts = [f"{part} is another" for part in changed_parts(before, there)]
        what = f" ({'; '.join([*differences(before, there), *parts][:SHOWN])})"
    raise UserError(
        f"{where}: {name} in {folder} was made with another {other} than the one there now{what}; "
        f"make it anew with redo={name}, or put the earlier {stage} back by running the command "
        "with its settings"
    )
