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

*Styles.* OpenMoji's drawings decide for all styles: what is held out of them is held out of every
other style, so that it does not depend on which styles there are. A drawing of another style that
is equal to one that is held out is left out: Noto's snowboarders are the same in all tones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Literal

from cm3leon.io import digest_of

from .catalogue import TONES, Emoji, Gender, catalogue
from .drawings import contents
from .styles import OPENMOJI, Styles

Part = Literal["train", "compositions", "objects"]

OBJECTS = 0.06
"""Share of the things that is held out."""
_GENDERS: tuple[Gender, ...] = ("woman", "man", "person")


@cache
def parts(styles: Styles = OPENMOJI) -> tuple[Part | None, ...]:
    """The part that each drawing of the catalogue belongs to; None if it is left out of all."""
    part_of = _part_of_each()
    held_out = set()
    for emoji, content in zip(catalogue(styles), contents(styles), strict=True):
        if part_of[emoji.code] != "train":
            held_out.add(content)

    found: list[Part | None] = []
    for emoji, content in zip(catalogue(styles), contents(styles), strict=True):
        part = part_of[emoji.code]
        found.append(None if part == "train" and content in held_out else part)
    return tuple(found)


@cache
def _part_of_each() -> Mapping[str, Part]:
    """The part of each emoji by its code points, as OpenMoji's drawings decide it."""
    compositions = {contents()[number] for number in _compositions()}
    found: dict[str, Part] = {}
    for emoji, content in zip(catalogue(), contents(), strict=True):
        is_thing = not (emoji.has_tones or emoji.gender or emoji.kind == "clock")
        if content in compositions:
            found[emoji.code] = "compositions"
        elif is_thing and share(f"object {content}") < OBJECTS:
            found[emoji.code] = "objects"
        else:
            found[emoji.code] = "train"
    return found


@cache
def groups(styles: Styles = OPENMOJI) -> Mapping[str, str]:
    """A key for each emoji by its code points, the same for those that are drawn alike in one of
    the styles. All their drawings stay on one side when a run splits its corpus."""
    leaders: dict[str, str] = {}

    def leader(name: str) -> str:
        while leaders.setdefault(name, name) != name:
            name = leaders[name]
        return name

    # Each emoji is joined to what its drawings show, and so to all emojis that are drawn alike.
    drawn = list(zip(catalogue(), contents(), strict=True))
    if styles != OPENMOJI:
        drawn += zip(catalogue(styles), contents(styles), strict=True)
    for emoji, content in drawn:
        leaders[leader(emoji.code)] = leader(content)

    # A group is known by one of OpenMoji's drawings, whatever other styles there are.
    keys: dict[str, str] = {}
    for content in contents():
        keys[leader(content)] = min(content, keys.get(leader(content), content))
    return {emoji.code: keys[leader(emoji.code)] for emoji in catalogue()}


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


def shown_once(part: Part, styles: Styles = OPENMOJI) -> list[Emoji]:
    """The drawings of a part; of those that are equal, the one whose name says most about what is
    shown."""
    named: dict[str, Emoji] = {}
    of_each = zip(catalogue(styles), contents(styles), parts(styles), strict=True)
    for emoji, content, own in of_each:
        if own != part:
            continue
        other = named.get(content)
        if other is None or (other.gender == "person" and emoji.gender in ("woman", "man")):
            named[content] = emoji
    return sorted(named.values(), key=lambda emoji: emoji.id)
