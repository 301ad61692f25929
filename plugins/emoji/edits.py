"""Edits with a known answer: two drawings, and the instruction that leads from the first to the
second."""

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
"""Share of the pairs of clock faces that are held out."""


@dataclass(frozen=True)
class EmojiEdit:
    """What is given and what is asked for, as numbers of drawings."""

    kind: EditKind
    before: int
    after: int
    instruction: str

    @property
    def id(self) -> str:
        """Unique among all edits."""
        return f"edit-{catalogue()[self.before].code}-{catalogue()[self.after].code}"


@cache
def edits(held_out: bool) -> tuple[EmojiEdit, ...]:
    """All edits that are trained on, or all that are not, in an order drawn by their ids.

    An edit is held out with the drawing that it leads to: a person in a tone, or of a gender, that
    was never seen; what is given was. Clock faces are all seen, and their pairs are held out.
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
    by_name: dict[str, list[int]] = defaultdict(list)
    by_subject: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
    clocks = []
    for number, emoji in enumerate(catalogue()):
        if emoji.kind == "clock":
            clocks.append(number)
        elif emoji.kind in ("person", "gesture") and emoji.has_tones:
            by_name[emoji.name].append(number)
            by_subject[emoji.subject, emoji.tones].append(number)

    for before, after in _pairs(by_name.values()):
        if tones := catalogue()[after].tones:
            yield EmojiEdit("tone", before, after, f"change the skin tone to {tones[0]}")
    for before, after in _pairs(by_subject.values()):
        if (gender := catalogue()[after].gender) in ("woman", "man"):
            yield EmojiEdit("gender", before, after, f"make it a {gender}")
    for before, after in _pairs([clocks]):
        yield EmojiEdit("time", before, after, f"set the clock to {catalogue()[after].name}")


def _pairs(groups: Iterable[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Ordered pairs of each group whose drawings differ."""
    for group in groups:
        for before in group:
            for after in group:
                if contents()[before] != contents()[after]:
                    yield before, after
