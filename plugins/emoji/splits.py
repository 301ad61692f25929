"""What is kept from training, by rules that anyone can work out from the names and the pixels
alone.

*Compositions.* A subject is drawn as woman and man, each in five tones. One tone of the woman,
another of the man, and a third of the person where that is a drawing of its own, are held out,
drawn by the subject's name: the model is asked for `woman firefighter: medium-dark skin tone` and
has seen her in four other tones, the man in four tones, medium-dark among them, and other people in
that tone. Of gestures, and of people whose name says no gender, one tone is held out.

*Objects.* Of things without skin that are no clocks, `OBJECTS` of all are held out whole, drawn by
their pixels.

Drawings that are equal pixel by pixel are on one side: `pilot: dark skin tone` is held out with the
man who is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Literal

from cm3leon.io import digest_of

from .catalogue import TONES, Emoji, Gender, catalogue
from .drawings import contents

Part = Literal["train", "compositions", "objects"]

OBJECTS = 0.06
"""Share of the things that are held out."""
_GENDERS: tuple[Gender, ...] = ("woman", "man", "person")


@cache
def parts() -> tuple[Part, ...]:
    """Which part each drawing of the catalogue belongs to."""
    compositions = {contents()[number] for number in _compositions()}
    found: list[Part] = []
    for emoji, content in zip(catalogue(), contents(), strict=True):
        is_thing = not (emoji.has_tones or emoji.gender or emoji.kind == "clock")
        if content in compositions:
            found.append("compositions")
        elif is_thing and share(f"object {content}") < OBJECTS:
            found.append("objects")
        else:
            found.append("train")
    return tuple(found)


def share(text: str) -> float:
    """A number in [0, 1) that is drawn by a text."""
    return int(digest_of(text)[:16], 16) / 2**64


def _compositions() -> Iterator[int]:
    """Numbers of the drawings that are held out for what they combine; their doubles are, too."""
    tones = tuple(TONES.values())
    single = {
        (emoji.subject, emoji.gender, emoji.tones[0]): number
        for number, emoji in enumerate(catalogue())
        if len(emoji.tones) == 1 and emoji.kind in ("person", "gesture")
    }
    for subject in sorted({subject for subject, *_ in single}):
        first = int(share(f"composition {subject}") * len(tones))
        taken: set[str] = set()
        for place, gender in enumerate(("", *_GENDERS)):
            if (subject, gender, tones[0]) not in single:
                continue
            # Where the person is drawn as the man is, his tone is held out, and no other.
            look = contents()[single[subject, gender, tones[0]]]
            if look not in taken:
                taken.add(look)
                yield single[subject, gender, tones[(first + 2 * place) % len(tones)]]


def shown_once(part: Part) -> list[Emoji]:
    """The emojis of a part, one of those that are equal: the one whose name says most of what it
    shows."""
    named: dict[str, Emoji] = {}
    for emoji, content, own in zip(catalogue(), contents(), parts(), strict=True):
        if own != part:
            continue
        other = named.get(content)
        if other is None or (other.gender == "person" and emoji.gender in ("woman", "man")):
            named[content] = emoji
    return sorted(named.values(), key=lambda emoji: emoji.code)
