"""What became of a command, written down by the job itself,
so that nobody has to be asked who may have forgotten.

A journal is a file of JSON lines, one an event:

    started    on a host, at a step
    again      asked to make room: a checkpoint is written, and it is to be started again
    died       ended by an error or a kill, with an exit code, at a step
    refused    a user's mistake, which another start would not mend
    stopped    not started again: it reached its limit, or died at the same step, too many times
    unseen     a node does not see the run folder
    done       to its end
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cm3leon.io import read_log
from cm3leon.records import MARKER
from cm3leon.stages.folders import SUPERSEDED
from cm3leon.stages.stage import STARTED
from cm3leon.training.steps import checkpoints, step_of
from cm3leon.types import AGAIN, REFUSED

ENDED = ("done", "refused", "stopped", "unseen")
"""Events after which a command is not started again."""

Event = dict[str, Any]


def write_event(journal: Path, event: str, **details: Any) -> None:
    """Adds a line to a journal."""
    line = json.dumps(
        {"time": round(time.time()), "event": event, "host": socket.gethostname(), **details}
    )
    with journal.open("a") as lines:
        lines.write(line + "\n")


def read_events(journal: Path) -> list[Event]:
    """The events of a journal, none where there is no file;
    a line that a kill cut short is left out."""
    return read_log(journal, {"event": str, "time": (int, float), "at?": str})


def outcome(
    code: int, at: str, before: Sequence[Event], max_deaths: int
) -> tuple[str, dict[str, Any]]:
    """The event that an exit code stands for, with its details.

    Args:
        at: how far the command came.
        before: the events of its journal.
        max_deaths: deaths at the same place from which it is not started again.
    """
    if code == 0:
        return "done", {}
    if code == AGAIN:
        return "again", {"at": at}
    if code == REFUSED:
        return "refused", {"code": code}
    deaths = 1
    for event in reversed([event for event in before if event["event"] == "died"]):
        if event["at"] != at:
            break
        deaths += 1
    if deaths < max_deaths:
        return "died", {"code": code, "at": at}
    times = "once" if deaths == 1 else f"{deaths} times"
    return "stopped", {"code": code, "at": at, "why": f"it died {times} at {at}, exit code {code}"}


def progress(command: Sequence[str]) -> str:
    """How far a command has come: the stage that is being made in its run folder,
    and the step of its checkpoint."""
    words = dict(word.partition("=")[::2] for word in command if "=" in word)
    if command[0] == "part":
        return f"part {words.get('part')} of {words.get('stage') or 'the answers'}"
    folder = Path(words["run"])
    begun = [
        file.parent
        for pattern in (f"*/{STARTED}", f"*/*/{STARTED}")
        for file in folder.glob(pattern)
        if SUPERSEDED not in file.parts and not (file.parent / MARKER).is_file()
    ]
    if not begun:
        return "the beginning" if not list(folder.glob(f"*/{MARKER}")) else "a stage's beginning"
    place = max(begun, key=lambda place: (place / STARTED).stat().st_mtime)
    written = checkpoints(place)
    stage = place.relative_to(folder).as_posix()
    return f"{stage}, step {step_of(written[-1])}" if written else stage
