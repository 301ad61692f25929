"""Edits with a known answer: two drawings, and the instruction that turns the first into the
second.

    woman firefighter                     "change the skin tone to dark"
    woman firefighter: dark skin tone     "make it a man"
    one o'clock                           "set the clock to two o'clock"
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from cm3leon.io import digest_of

from .catalogue import catalogue
from .drawings import contents
from .splits import parts, share

EditKind = Literal["tone", "gender", "time"]

TIMES = 0.1
"""Share of the pairs of clock faces that is held out."""


@dataclass(frozen=True)
class EmojiEdit:
    """The drawing that is given and the one that is asked for, by their indices."""

    kind: EditKind
    before: int
    after: int
    instruction: str

    @property
    def id(self) -> str:
        """A name that no other edit has."""
        return f"edit-{catalogue()[self.before].code}-{catalogue()[self.after].code}"


@cache
def edits(held_out: bool) -> tuple[EmojiEdit, ...]:
    """All edits for training, or all that are held out, in an order drawn by their ids.

    An edit is held out if the drawing that it leads to is: a person in a tone, or of a gender, that
    was never seen, while the drawing that is given was. Clock faces are all seen, so their pairs
    are held out instead.
    """
    found = []
    for edit in _edits():
        if parts()[edit.before] != "train":
            continue
        kept_back = parts()[edit.after] != "train"
        if edit.kind == "time":
            kept_back = share(edit.id) < TIMES
        if kept_back == held_out:
            found.append(edit)
    return tuple(sorted(found, key=lambda edit: digest_of(edit.id)))


def _edits() -> Iterator[EmojiEdit]:
    """All edits between drawings of the same person, gesture, or of clocks."""
    by_name: dict[str, list[int]] = defaultdict(list)
    by_subject: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
    clocks = []
    for number, emoji in enumerate(catalogue()):
        if emoji.kind == "clock":
            clocks.append(number)
        elif emoji.kind in ("person", "gesture") and emoji.has_tones:
            by_name[emoji.name].append(number)
            by_subject[emoji.subject, emoji.tones].append(number)

    # The instruction names what the second drawing of a pair has. A tone or a gender that is left
    # open cannot be asked for.
    for before, after in _pairs(by_name.values()):
        if tones := catalogue()[after].tones:
            yield EmojiEdit("tone", before, after, f"change the skin tone to {tones[0]}")
    for before, after in _pairs(by_subject.values()):
        if (gender := catalogue()[after].gender) in ("woman", "man"):
            yield EmojiEdit("gender", before, after, f"make it a {gender}")
    for before, after in _pairs([clocks]):
        yield EmojiEdit("time", before, after, f"set the clock to {catalogue()[after].name}")


def _pairs(groups: Iterable[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """All ordered pairs within each group whose drawings differ."""
    for group in groups:
        for before in group:
            for after in group:
                if contents()[before] != contents()[after]:
                    yield before, after
