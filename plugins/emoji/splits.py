"""What is held out from training, by rules that follow from names and pixels alone.

*Compositions.* A subject is drawn as a woman and a man, each in five tones. One tone of the woman,
another one of the man, and a third one of the person, if that is a drawing of its own, are held
out, chosen by the subject's name:

                  light    medium-light    medium    medium-dark    dark
    woman         seen     seen            seen      held out       seen
    man           held out seen            seen      seen           seen

The model is asked for `woman firefighter: medium-dark skin tone`. It has seen her in four other
tones, the man in that tone among others, and other people in it. Of gestures, and of people whose
name leaves the gender open, one tone is held out.

*Objects.* Of things without skin, other than clocks, a share of `OBJECTS` is held out entirely,
chosen by their pixels.

Drawings that are equal pixel by pixel are on the same side: `pilot: dark skin tone` is held out if
the same drawing of a man is.
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
"""Share of the things that is held out."""
_GENDERS: tuple[Gender, ...] = ("woman", "man", "person")


@cache
def parts() -> tuple[Part, ...]:
    """The part that each drawing of the catalogue belongs to."""
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
    """A number in [0, 1) that follows from a text."""
    return int(digest_of(text)[:16], 16) / 2**64


def _compositions() -> Iterator[int]:
    """Yield the drawings that are held out for what they combine; drawings equal to them are held
    out too."""
    tones = tuple(TONES.values())
    single: dict[tuple[str, Gender, str], int] = {}
    for number, emoji in enumerate(catalogue()):
        if len(emoji.tones) == 1 and emoji.kind in ("person", "gesture"):
            single[emoji.subject, emoji.gender, emoji.tones[0]] = number
    for subject in sorted({subject for subject, *_ in single}):
        first = int(share(f"composition {subject}") * len(tones))
        taken: set[str] = set()

        # Each gender has a tone of its own held out, two further than the gender before.
        for place, gender in enumerate(("", *_GENDERS)):
            if (subject, gender, tones[0]) not in single:
                continue
            # If the person is drawn like the man, his tone is held out, and no other one.
            look = contents()[single[subject, gender, tones[0]]]
            if look not in taken:
                taken.add(look)
                yield single[subject, gender, tones[(first + 2 * place) % len(tones)]]


def shown_once(part: Part) -> list[Emoji]:
    """The emojis of a part; of those with equal drawings, the one whose name says most about what
    is shown."""
    named: dict[str, Emoji] = {}
    for emoji, content, own in zip(catalogue(), contents(), parts(), strict=True):
        if own != part:
            continue
        other = named.get(content)
        if other is None or (other.gender == "person" and emoji.gender in ("woman", "man")):
            named[content] = emoji
    return sorted(named.values(), key=lambda emoji: emoji.code)
