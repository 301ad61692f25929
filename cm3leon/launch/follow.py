"""What became of jobs, for the commands status, cancel and logs.

Read from the journals that jobs keep in the run folder, and from squeue's and scontrol's word on
those that cannot speak; sacct is not needed.
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
"""Words for commands that may still do something by themselves."""


@dataclass(frozen=True)
class State:
    """Where a command stands: a word, and more about it."""

    word: str
    more: str = ""


def states(launch: Launch) -> list[tuple[Submitted, State]]:
    """Where each command of a submission stands."""
    content = launch.read()
    submitted: list[Submitted] = content["submitted"]
    by_slurm = content["launcher"] == "slurm"
    known = cluster.states([each.id for each in submitted]) if by_slurm else None
    found = []
    for each in submitted:
        events = read_events(launch.journal(each.job, each.number))
        state = _ended(events[-1]) if events and events[-1]["event"] in ENDED else None
        if state is None:
            at = progress(content["commands"][each.job][each.number])
            after = content["after"][each.job]
            if not by_slurm:
                state = _here(each, events, at, launch)
            elif known is None:
                state = State("unknown", f"SLURM does not answer; it came to {at}")
            else:
                state = _by_slurm(known.get(each.id), events, at, after)
        found.append((each, state))
    return found


def _ended(event: Event) -> State:
    if event["event"] == "unseen":
        return State(
            "failed",
            f"the run folder is not visible on all of {event['host']}; it has to be on a shared "
            "disk",
        )
    if event["event"] == "refused":
        return State("failed", "a mistake in its settings, which its log names")
    return State("done") if event["event"] == "done" else State("stopped", event["why"])


def _by_slurm(
    known: Mapping[str, str] | None, events: Sequence[Event], at: str, after: Sequence[str]
) -> State:
    """The state of a command that has not said that it ended, by what SLURM knows of its job."""
    last = events[-1] if events else None
    if known is None:
        if last is None:
            return State("unknown", "SLURM does not know it, and it never started")
        return State("gone", f"SLURM does not know it any more; it came to {at}")
    state, reason = known["state"], known["reason"]
    if state == "PENDING":
        if reason == "DependencyNeverSatisfied":
            return State("failed", f"not started, as {' or '.join(after)} did not succeed")
        died = (
            f"died at {last['at']}, exit code {last['code']}"
            if last and last["event"] == "died"
            else ""
        )
        waits = f"after {', '.join(after)}" if reason == "Dependency" else reason
        return State(
            "queued", ", ".join(filter(None, [died, f"again, {waits}" if last else waits]))
        )
    if state in ("RUNNING", "CONFIGURING", "SUSPENDED"):
        return (
            State("running", f"{at}, on {known['nodes']}")
            if last
            else State("starting", f"on {known['nodes']}")
        )
    if state in ("COMPLETING", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "SIGNALING", "STAGE_OUT"):
        return State("ending", at)
    if state == "CANCELLED":
        if last is None and after:
            return State(
                "failed",
                f"not started, as {' or '.join(after)} did not succeed, or it was cancelled",
            )
        return State(
            "cancelled", f"it came to {at}; the same command goes on from there" if last else ""
        )
    if last is None:
        return State(
            "failed",
            f"{state} before its first line: see that {known['nodes']} can write into the run "
            "folder",
        )
    return State("failed", f"{state}, exit code {known['code']}, at {at}")


def _here(each: Submitted, events: Sequence[Event], at: str, launch: Launch) -> State:
    """The state of a command of this machine that has not said that it ended."""
    alive = is_alive(int(each.id), launch)
    if not events:
        return (
            State("queued")
            if alive
            else State(
                "failed", "not started, as a job before it did not succeed, or was cancelled"
            )
        )
    if events[-1]["event"] == "again":
        return State("cancelled", f"it came to {at}; the same command goes on from there")
    return (
        State("running", at)
        if alive
        else State("gone", f"its process is not there any more; it came to {at}")
    )


def is_alive(process: int, launch: Launch) -> bool:
    """Whether the process that looks after a submission on this machine is there,
    and not another one of that id."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes()
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    # One that is only just being started has no words yet; nor has one that has ended,
    # and nobody has waited for.
    return state not in "ZX" and (not words or str(launch.folder).encode() in words)


def refuse_twice(folder: Path) -> None:
    """Raises UserError where jobs of an earlier submission still wait or run in the run folder."""
    for launch in launches(folder.absolute())[-1:]:
        for each, state in states(launch):
            if state.word in WAITING:
                raise UserError(
                    f"run: job {each.job} ({each.id}) is {state.word} in {folder} already; follow "
                    f"it with `{command_line('status', f'run={folder}')}`, or end it first with "
                    f"`{command_line('cancel', f'run={folder}')}`"
                )


def as_text(found: Sequence[tuple[Submitted, State]]) -> Iterator[str]:
    """A line for each job; of an array, one for those of its elements that stand alike."""
    for job, group in groupby(found, key=lambda pair: pair[0].job):
        members = list(group)
        for state in dict.fromkeys(state for _, state in members):
            alike = [each for each, its in members if its == state]
            which = f"{alike[0].id}" if len(alike) == 1 else f"{len(alike)} of {len(members)}"
            log = (
                f"  {alike[0].log}"
                if alike[0].log and state.word not in ("queued", "starting")
                else ""
            )
            yield f"{job:<16} {which:<12} {state.word:<10} {state.more}{log}".rstrip()
