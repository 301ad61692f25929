"""The journal of a command: what became of it, as its job recorded.

SLURM forgets jobs after a while; the journal does not. It is a file of JSON lines, one an event:

    started    on a host, at a step
    again      asked to make room: a checkpoint is written, and it is to be started again
    died       ended by an error or a kill, with an exit code, at a step
    refused    a user's mistake, which another start would not fix
    stopped    not started again: too many time limits, or too many deaths at one step
    unseen     a node does not see the run folder
    done       finished
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
    """Append an event to a journal."""
    line = json.dumps(
        {"time": round(time.time()), "event": event, "host": socket.gethostname(), **details}
    )
    with journal.open("a") as lines:
        lines.write(line + "\n")


def read_events(journal: Path) -> list[Event]:
    """The events of a journal; [] without a file. A line that a kill cut short is left out."""
    return read_log(journal, {"event": str, "time": (int, float), "at?": str})


def outcome(
    code: int, at: str, before: Sequence[Event], max_deaths: int
) -> tuple[str, dict[str, Any]]:
    """The event that an exit code stands for, with its details.

    Args:
        at: how far the command came.
        before: the events of its journal.
        max_deaths: after this many deaths at one point it is not started again.
    """
    if code == 0:
        return "done", {}
    if code == AGAIN:
        return "again", {"at": at}
    if code == REFUSED:
        return "refused", {"code": code}

    # Deaths in a row at the same point, this one included; progress in between resets the count.
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
    """How far a command has come: the stage being made in its run folder, and its last step."""
    words = dict(word.partition("=")[::2] for word in command if "=" in word)
    if command[0] == "part":
        return f"part {words.get('part')} of {words.get('stage') or 'the answers'}"

    # Stages that were started and are not finished, also those of runs inside a study's folder.
    folder = Path(words["run"])
    begun = []
    for file in (*folder.glob(f"*/{STARTED}"), *folder.glob(f"*/*/{STARTED}")):
        if SUPERSEDED not in file.parts and not (file.parent / MARKER).is_file():
            begun.append(file.parent)
    if not begun:
        return "a stage's beginning" if list(folder.glob(f"*/{MARKER}")) else "the beginning"

    newest = max(begun, key=lambda stage: (stage / STARTED).stat().st_mtime)
    name, written = newest.relative_to(folder).as_posix(), checkpoints(newest)
    return f"{name}, step {step_of(written[-1])}" if written else name
