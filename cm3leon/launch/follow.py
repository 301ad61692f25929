"""The state of jobs, for the commands status, cancel and logs.

It is read from the journals that jobs keep in the run folder, and from squeue and scontrol for jobs
that cannot report themselves; sacct is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from cm3leon.launch import cluster
from cm3leon.launch.jobs import Launch, Submitted, launches
from cm3leon.launch.journal import ENDED, Event, progress, read_events
from cm3leon.terminal import command_line
from cm3leon.types import UserError

WAITING = ("queued", "starting", "running", "ending")
"""States of commands that may still do something by themselves."""


@dataclass(frozen=True)
class State:
    """The state of a command: a word, and details."""

    word: str
    more: str = ""


def states(launch: Launch) -> list[tuple[Submitted, State]]:
    """The state of each command of a submission."""
    content = launch.read()
    submitted: list[Submitted] = content["submitted"]
    by_slurm = content["launcher"] == "slurm"
    known = cluster.states([each.id for each in submitted]) if by_slurm else None
    found = []
    for each in submitted:
        events = read_events(launch.journal(each.job, each.number))

        # The journal knows best how a command ended; otherwise ask where it runs.
        if events and events[-1]["event"] in ENDED:
            found.append((each, _ended(events[-1])))
            continue
        at = progress(content["commands"][each.job][each.number])
        if not by_slurm:
            state = _here(each, events, at, launch)
        elif known is None:
            state = State("unknown", f"SLURM does not answer; it came to {at}")
        else:
            after = content["after"][each.job]
            state = _by_slurm(known.get(each.id), events, at, after)
        found.append((each, state))
    return found


def _ended(event: Event) -> State:
    """The state of a command whose journal says how it ended."""
    if event["event"] == "unseen":
        return State(
            "failed",
            f"the run folder is not visible on all of {event['host']}; it has to be on a shared "
            "disk",
        )
    if event["event"] == "refused":
        return State("failed", "a mistake in its settings, which its log names")
    if event["event"] == "done":
        return State("done")
    return State("stopped", event["why"])


def _by_slurm(
    known: Mapping[str, str] | None, events: Sequence[Event], at: str, after: Sequence[str]
) -> State:
    """The state of a command whose journal has no end, by what SLURM knows of its job.

    Args:
        at: how far the command came.
        after: names of the jobs that it waits for.
    """
    last = events[-1] if events else None
    if known is None:
        if last is None:
            return State("unknown", "SLURM does not know it, and it never started")
        return State("gone", f"SLURM does not know it any more; it came to {at}")

    state, reason = known["state"], known["reason"]
    unmet = f"not started, as {' or '.join(after)} did not succeed"
    if state == "PENDING":
        if reason == "DependencyNeverSatisfied":
            return State("failed", unmet)
        return State("queued", _waiting_for(reason, last, after))
    if state in ("RUNNING", "CONFIGURING", "SUSPENDED"):
        if last:
            return State("running", f"{at}, on {known['nodes']}")
        return State("starting", f"on {known['nodes']}")
    if state in ("COMPLETING", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "SIGNALING", "STAGE_OUT"):
        return State("ending", at)
    if state == "CANCELLED":
        # SLURM also cancels jobs whose dependencies failed.
        if last is None and after:
            return State("failed", f"{unmet}, or it was cancelled")
        if last:
            return State("cancelled", f"it came to {at}; the same command continues from there")
        return State("cancelled")

    # Any other state is an end that the command could not report.
    if last is None:
        return State(
            "failed",
            f"{state} before its first line: see that {known['nodes']} can write into the run "
            "folder",
        )
    return State("failed", f"{state}, exit code {known['code']}, at {at}")


def _waiting_for(reason: str, last: Event | None, after: Sequence[str]) -> str:
    """What a queued command waits for, and how it ended before if it has run."""
    waits = f"after {', '.join(after)}" if reason == "Dependency" else reason
    if last is None:
        return waits
    words = []
    if last["event"] == "died":
        words.append(f"died at {last['at']}, exit code {last['code']}")
    return ", ".join([*words, f"again, {waits}"])


def _here(each: Submitted, events: Sequence[Event], at: str, launch: Launch) -> State:
    """The state of a command on this machine whose journal has no end."""
    alive = is_alive(int(each.id), launch)
    if not events:
        if alive:
            return State("queued")
        return State("failed", "not started, as a job before it did not succeed, or was cancelled")
    if events[-1]["event"] == "again":
        return State("cancelled", f"it came to {at}; the same command continues from there")
    if alive:
        return State("running", at)
    return State("gone", f"its process is not there any more; it came to {at}")


def is_alive(process: int, launch: Launch) -> bool:
    """Whether the process that runs a submission on this machine is there, and not another one that
    now has its id."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes()
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    # A process has no command line while it starts, and again after its end until its parent has
    # waited for it; the latter is a zombie (Z).
    return state not in "ZX" and (not words or str(launch.folder).encode() in words)


def refuse_twice(folder: Path) -> None:
    """Raise UserError if jobs of an earlier submission still wait or run in the run folder."""
    for launch in launches(folder.absolute())[-1:]:
        for each, state in states(launch):
            if state.word in WAITING:
                raise UserError(
                    f"run: job {each.job} ({each.id}) is {state.word} in {folder} already; follow "
                    f"it with `{command_line('status', f'run={folder}')}`, or end it first with "
                    f"`{command_line('cancel', f'run={folder}')}`"
                )


def as_text(found: Sequence[tuple[Submitted, State]]) -> Iterator[str]:
    """A line for each job; for an array, a line for its elements in each state."""
    for job, group in groupby(found, key=lambda pair: pair[0].job):
        members = list(group)
        for state in dict.fromkeys(state for _, state in members):
            alike = [each for each, its in members if its == state]
            which = f"{len(alike)} of {len(members)}"
            if len(alike) == 1:
                which = alike[0].id
            line = f"{job:<16} {which:<12} {state.word:<10} {state.more}"
            if alike[0].log and state.word not in ("queued", "starting"):
                line += f"  {alike[0].log}"
            yield line.rstrip()
