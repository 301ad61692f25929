"""What is drawn: every emoji that has a name and a drawing, with what its name says about it.

    woman firefighter: dark skin tone                      one style
    woman firefighter: dark skin tone, in Noto's style     several styles

The names are Unicode's (CLDR), from the package `emoji`, which leaves out their punctuation:
`woman: dark skin tone, red hair` is `woman dark skin tone red hair` there. So tones are read from
the code points, and captions are composed anew: `woman with red hair: dark skin tone`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from .sets import folder, opened
from .styles import OPENMOJI, STYLES, Styles

Kind = Literal["person", "gesture", "pair", "face", "clock", "flag", "sign", "object"]
Gender = Literal["", "woman", "man", "person"]

TONES = {
    0x1F3FB: "light",
    0x1F3FC: "medium-light",
    0x1F3FD: "medium",
    0x1F3FE: "medium-dark",
    0x1F3FF: "dark",
}
"""Skin tones by their code points, type I-II of Fitzpatrick's scale first."""

_STYLE = re.compile(r", in (\w+)'s style$")
_TONE = re.compile(r" ?(?:medium-light|medium-dark|light|medium|dark) skin tone")
_PERSON = re.compile(r"(woman|women|man|men|person|people)( .+)?")
_GENDERS: dict[str, Gender] = {
    "woman": "woman", "women": "woman", "man": "man", "men": "man", "person": "person", "people": "person",
}  # fmt: skip
_HAIR = re.compile(r"(.+) ((?:blond|red|curly|white) hair|beard)")
_RELATED = re.compile(r"(family|kiss|couple with heart) (.+)")
_BODY = re.compile(
    r"\b(hands?|fist|fingers?|thumbs|palms?|biceps|ear|nose|foot|leg|salute|horns|gesture|handshake|selfie|nail|"
    r"pointing)\b"
)
_CLOCKS = range(0x1F550, 0x1F568)
_LETTERS = range(0x1F1E6, 0x1F200)
"""Regional indicators, two of which make a flag."""
_PICTOGRAPHS = 0x1F300
"""Code points below this mostly stand for signs, arrows, letters in squares and cards."""


@dataclass(frozen=True)
class Emoji:
    """A drawing, and what its name says about it."""

    code: str
    """Its code points, as in the name of the drawing's file: `1F469-1F3FF-200D-1F692`."""
    name: str
    """The name without tones: `woman firefighter`."""
    tones: tuple[str, ...]
    """Empty for the yellow default, and for everything without skin."""
    has_tones: bool
    """Whether it is drawn in several tones."""
    gender: Gender
    """Empty if the question does not arise: gestures, a baby, things."""
    subject: str
    """The name without a gender: `firefighter`; the whole name if it has none."""
    kind: Kind
    tags: tuple[str, ...]
    """Other names of it."""
    style: str = "openmoji"
    """The set of drawings that it is of."""
    style_is_said: bool = False
    """Whether its caption names the style."""

    @property
    def id(self) -> str:
        """A name that no other drawing has; OpenMoji's are their code points alone."""
        return self.code if self.style == "openmoji" else f"{self.style}-{self.code}"

    @property
    def caption(self) -> str:
        """The name, the tones, and the style if there are several: `woman firefighter: dark skin
        tone, in Noto's style`."""
        caption = self.name
        if self.tones:
            caption += f": {', '.join(f'{tone} skin tone' for tone in self.tones)}"
        if self.style_is_said:
            caption += f", in {STYLES[self.style].name}'s style"
        return caption


@dataclass(frozen=True)
class CaptionParts:
    """What a caption says, in lower case; "" where it says nothing."""

    name: str
    tones: str
    style: str


def read_caption(text: str) -> CaptionParts:
    """Take a caption apart: its name, its tones as they stand there, and its style.

    `Fox, in Noto's style` is `fox`, "" and `noto`.
    """
    said = text.partition(" | ")[0].strip().lower()
    style = ""
    if found := _STYLE.search(said):
        said, style = said[: found.start()], found[1]
    name, _, tones = said.partition(": ")
    return CaptionParts(name, tones, style)


@cache
def catalogue(styles: Styles = OPENMOJI) -> tuple[Emoji, ...]:
    """All drawings that have a name, style by style, in the order of their code points.

    Raises:
        UserError: if one of the packages is not installed.
    """
    found = []
    for style in styles.names:
        drawings = opened(styles.alone(style))
        for emoji in _named():
            # Names are those of OpenMoji's drawings, of which other sets lack some.
            if drawings.has(emoji.code):
                found.append(replace(emoji, style=style, style_is_said=styles.are_said))
    return tuple(found)


@cache
def _named() -> tuple[Emoji, ...]:
    """All emojis with a name and a drawing of OpenMoji's, in the order of their code points."""
    drawn = {file.stem for file in folder().glob("*.svg")}
    from emoji import EMOJI_DATA, STATUS

    named: dict[str, tuple[str, tuple[str, ...]]] = {}
    for characters, about in EMOJI_DATA.items():
        if about["status"] not in (STATUS["fully_qualified"], STATUS["component"]):
            continue
        code = "-".join(f"{ord(character):04X}" for character in characters)
        if code not in drawn:
            code = code.replace("-FE0F", "")  # asks for a picture, not a letter
        if code in drawn:
            named[code] = _plain(about["en"]), tuple(map(_plain, about.get("alias", ())))

    # Names without tones, by which drawings of the same thing are found.
    names: dict[str, str] = {}
    toned: set[str] = set()
    for code, (name, _) in named.items():
        names[code] = _without_tones(code, name)
        if _tones(code):
            toned.add(names[code])

    # Whether a name leaves the gender open shows only beside all other names, see `_gender`.
    everyone = set(names.values())
    found = []
    for code in sorted(named):
        name = names[code]
        gender, subject = _gender(name, everyone)
        tones, has_tones = _tones(code), name in toned
        found.append(
            Emoji(
                code=code,
                name=_worded(code, name),
                tones=tones,
                has_tones=has_tones,
                gender=gender,
                subject=subject,
                kind=_kind(code, name, has_tones),
                tags=named[code][1],
            )
        )
    return tuple(found)


# -------------------------------------------------------------------------------- parts of a name


def _plain(name: str) -> str:
    """A name of the package `emoji`, in plain words."""
    return name.strip(":").replace("_", " ").replace("’", "'")


def _points(code: str) -> list[int]:
    """The code points of a drawing."""
    return [int(point, 16) for point in code.split("-")]


def _tones(code: str) -> tuple[str, ...]:
    """The tones of a drawing; the swatch of a tone alone has none."""
    points = _points(code)
    if len(points) <= 1:
        return ()
    return tuple(TONES[point] for point in points if point in TONES)


def _without_tones(code: str, name: str) -> str:
    """A name without its tones."""
    return _TONE.sub("", name) if _tones(code) else name


def _gender(name: str, everyone: set[str]) -> tuple[Gender, str]:
    """The gender that a name states, and the rest of the name, which is the subject: `woman
    firefighter` and `firefighter` have the same."""
    found = _PERSON.fullmatch(name)
    if found and not (found[2] or "").startswith(" and "):
        return _GENDERS[found[1]], (found[2] or "person").strip()
    # A profession's name alone leaves the gender open if there are a woman and a man of it.
    if f"woman {name}" in everyone and f"man {name}" in everyone:
        return "person", name
    return "", name


def _worded(code: str, name: str) -> str:
    """A name as people would say it."""
    if name.endswith(" bald"):
        return f"bald {name.removesuffix(' bald')}"
    if (hair := _HAIR.fullmatch(name)) and _PERSON.fullmatch(hair[1]):
        article = "a " if hair[2] == "beard" else ""
        return f"{hair[1]} with {article}{hair[2]}"
    if related := _RELATED.fullmatch(name):
        return f"{related[1]} of {', '.join(related[2].split())}"
    if _kind(code, name, False) == "flag" and "flag" not in name:
        return f"flag of {name}"
    return name


def _kind(code: str, name: str, has_tones: bool) -> Kind:
    """The kind of a drawing, by its code points and its name."""
    # Two letters are a country's flag; the flag of a part of a country ends in a mark of its own.
    points = _points(code)
    if len(points) > 1 and (points[0] in _LETTERS or 0xE007F in points):
        return "flag"
    if points[0] in _CLOCKS:
        return "clock"
    if _RELATED.match(name) or name in ("family", "kiss", "couple with heart", "handshake"):
        return "pair"
    if name.startswith(("men ", "women ", "people ", "woman and man ")):
        return "pair"
    # What has a skin is a person, or a part of one.
    if has_tones:
        if _BODY.search(name) and not _PERSON.fullmatch(name):
            return "gesture"
        return "person"
    if re.search(r"\bface\b", name):
        return "face"
    if _PERSON.fullmatch(name):
        return "person"
    return "sign" if points[0] < _PICTOGRAPHS or name.endswith("button") else "object"
