"""What scenes hold, and how one is drawn from a seed.

    top left      top       top right       A scene has a background and up to nine things, each
    left          center    right           at one of nine places and shifted a little there. Later
    bottom left   bottom    bottom right    things are nearer, and may hide a part of earlier ones.

The numbers of `Random.random` are promised to stay the same in all versions of Python, so a seed
stands for the same scene everywhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from random import Random
from typing import Any, Literal, TypeVar

from cm3leon.config import NonNegativeInt, PositiveInt, Probability
from cm3leon.types import UserError

COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 143, 20),
    "yellow": (247, 222, 52),
    "green": (44, 160, 67),
    "cyan": (64, 208, 214),
    "blue": (38, 82, 214),
    "purple": (136, 56, 190),
    "pink": (250, 148, 196),
}
BACKGROUNDS = {"white": (246, 246, 246), "grey": (150, 150, 150), "black": (24, 24, 24)}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
SIZES = {"small": 0.19, "medium": 0.25, "large": 0.31}
"""The sides of things, as shares of the picture's side."""
TEXTURES = ("plain", "striped", "dotted", "checked")
WORDS = ("SUN", "CAT", "DOG", "TEA", "BUS", "MAP", "HAT", "ICE", "OWL", "JAM", "ZOO", "KEY")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
LIMBS = ("left arm", "right arm", "left leg", "right leg")
ANGLES = (20, 65, 110, 155)
"""The angles of limbs, in degrees outwards from straight down."""

Kind = Literal["shape", "word", "figure", "entity"]
T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """One thing of a scene. Fields that do not belong to its kind are empty."""

    kind: Kind
    colour: str
    size: str
    x: float
    y: float
    """The position of its middle, as shares of the picture's sides."""
    shape: str = ""
    texture: str = "plain"
    word: str = ""
    pose: tuple[int, ...] = ()
    """The angle of each of a figure's `LIMBS`."""
    entity: int = -1
    """The number of an entity."""

    @property
    def place(self) -> tuple[str, str]:
        """The row and column of the nine places that the thing is at."""
        return ROWS[min(int(3 * self.y), 2)], COLUMNS[min(int(3 * self.x), 2)]


@dataclass(frozen=True)
class Scene:
    """A background and things, from the farthest to the nearest."""

    background: str
    things: tuple[Thing, ...]

    def with_thing(self, number: int, **changes: Any) -> Scene:
        """The scene with some fields of one thing changed."""
        things = list(self.things)
        things[number] = replace(things[number], **changes)
        return replace(self, things=tuple(things))


@dataclass(kw_only=True)
class World:
    """Which scenes can be drawn. The defaults allow everything; the experiments use less."""

    colours: list[str] = field(default_factory=lambda: list(COLOURS))
    """Colours of things, from `COLOURS`."""
    shapes: list[str] = field(default_factory=lambda: list(SHAPES))
    """Shapes of things, from `SHAPES`."""
    sizes: list[str] = field(default_factory=lambda: list(SIZES))
    """Sizes of things, from `SIZES`."""
    textures: list[str] = field(default_factory=lambda: list(TEXTURES))
    """Textures of shapes, from `TEXTURES`."""
    backgrounds: list[str] = field(default_factory=lambda: list(BACKGROUNDS))
    """Colours of the background, from `BACKGROUNDS`."""
    things: list[PositiveInt] = field(default_factory=lambda: [1, 2, 3, 4])
    """Numbers of things that a scene may have, all equally likely."""
    jitter: Probability = 0.5
    """How far a thing may be from the middle of its place, as a share of the room there."""
    overlap: Probability = 0.2
    """Share of the scenes with several things in which one hides a part of another."""
    words: Probability = 0.1
    """Share of things that are written words."""
    figures: Probability = 0.1
    """Share of things that are stick figures."""
    entities: NonNegativeInt = 0
    """Number of named entities."""
    entity_share: Probability = 0.0
    """Share of scenes that show an entity and nothing else."""
    entity_tail: Probability = 1.0
    """Entity n is drawn with a probability proportional to 1 / (n + 1) to the power of this."""

    def check(self) -> None:
        """Check that all names are known and the numbers agree. Raises UserError if not."""
        # A list may leave out what could be drawn, but not all of it.
        known = {
            "colours": COLOURS,
            "shapes": SHAPES,
            "sizes": SIZES,
            "textures": TEXTURES,
            "backgrounds": BACKGROUNDS,
        }
        for name, allowed in known.items():
            chosen = getattr(self, name)
            wrong = [each for each in chosen if each not in allowed]
            if wrong or not chosen:
                what = f"holds {wrong[0]!r}" if wrong else "is empty"
                raise UserError(f"{name} {what}; it takes some of: {', '.join(allowed)}")

        if not self.things or max(self.things) > 9:
            raise UserError(
                f"things is {self.things}; it must be a list of at least one number from 1 to 9"
            )
        if self.entity_share and not self.entities:
            raise UserError("entity_share is above 0 while entities is 0; raise entities")

    @cached_property
    def entity_ends(self) -> list[float]:
        """The cumulative shares of the entities."""
        weights = [1 / (number + 1) ** self.entity_tail for number in range(self.entities)]
        total = sum(weights)
        return list(accumulate(weight / total for weight in weights))


def draw_scene(world: World, seed: int) -> Scene:
    """Draw the scene of a seed."""
    rng = Random(seed)
    background = pick(rng, world.backgrounds)
    if rng.random() < world.entity_share:
        return Scene(
            background, (Thing("entity", "", "", 0.5, 0.5, entity=_below(rng, world.entity_ends)),)
        )

    # Each thing has a place of its own; only then may the second one move over the first.
    places = list(range(9))
    things: list[Thing] = []
    for _ in range(pick(rng, world.things)):
        place = places.pop(int(rng.random() * len(places)))
        things.append(draw_thing(world, rng, place))
    if len(things) > 1 and rng.random() < world.overlap:
        things[:2] = _overlapping(things[0], things[1], things[2:], rng)
    return Scene(background, tuple(things))


def draw_thing(world: World, rng: Random, place: int) -> Thing:
    """Draw a thing at one of the nine places."""
    kind = rng.random()
    is_figure = world.words <= kind < world.words + world.figures
    colour, size = pick(rng, world.colours), pick(rng, world.sizes)
    # Limbs are thin, so figures are drawn as large as possible.
    if is_figure:
        size = max(world.sizes, key=SIZES.__getitem__)

    # A thing may be anywhere in its place, as far as the jitter allows.
    room = (1 / 3 - SIZES[size]) * world.jitter
    x = (place % 3 + 0.5) / 3 + (rng.random() - 0.5) * room
    y = (place // 3 + 0.5) / 3 + (rng.random() - 0.5) * room

    if kind < world.words:
        return Thing("word", colour, size, x, y, word=pick(rng, WORDS))
    if is_figure:
        return Thing("figure", colour, size, x, y, pose=tuple(pick(rng, ANGLES) for _ in LIMBS))
    return Thing(
        "shape",
        colour,
        size,
        x,
        y,
        shape=pick(rng, world.shapes),
        texture=pick(rng, world.textures),
    )


def _overlapping(far: Thing, near: Thing, others: list[Thing], rng: Random) -> list[Thing]:
    """Move the near thing in front of the far one, unless it could then not be told from it or from
    others."""
    moved = _in_front_of(far, near, rng)
    apart = {far.kind, near.kind} == {"shape"} and far.colour != near.colour
    if apart and not any(touches(moved, other) for other in others):
        return [far, moved]
    return [far, near]


def touches(one: Thing, other: Thing) -> bool:
    """Whether the squares of two things overlap."""
    reach = (SIZES.get(one.size, 1.0) + SIZES.get(other.size, 1.0)) / 2
    return abs(one.x - other.x) < reach and abs(one.y - other.y) < reach


def _in_front_of(far: Thing, near: Thing, rng: Random) -> Thing:
    """Move the near thing so that it hides a part of the far one, but not its middle."""
    reach = 0.45 * (SIZES[far.size] + SIZES[near.size]) / 2 + 0.06
    dx, dy = pick(rng, ((1, 0.4), (-1, 0.4), (0.4, 1), (0.4, -1)))

    # It turns back where it would move out of the picture, and stays inside of it in any case.
    turn_x = 1 if far.x < 0.6 or dx < 0 else -1
    turn_y = 1 if far.y < 0.6 or dy < 0 else -1
    half = SIZES[near.size] / 2
    return replace(
        near,
        x=min(max(far.x + dx * reach * turn_x, half), 1 - half),
        y=min(max(far.y + dy * reach * turn_y, half), 1 - half),
    )


def pick(rng: Random, choices: Sequence[T]) -> T:
    """Draw one of the choices by `random()` alone, whose numbers are promised to stay the same."""
    return choices[int(rng.random() * len(choices))]


def _below(rng: Random, ends: Sequence[float]) -> int:
    """Draw an index by cumulative shares."""
    return min(bisect_right(ends, rng.random() * ends[-1]), len(ends) - 1)


# --------------------------------------------------------------------------------------- entities

CELLS = 4
"""Cells per side of the square that shows an entity, each of a colour or empty."""
_SYLLABLES = (
    "ba",
    "do",
    "fi",
    "gu",
    "ka",
    "lo",
    "mi",
    "nu",
    "pa",
    "ro",
    "si",
    "tu",
    "ve",
    "wo",
    "xa",
    "zi",
)


@lru_cache(maxsize=2**16)
def entity_look(number: int) -> tuple[str | None, ...]:
    """The colours of an entity's cells, row by row; None shows the background. The corners are
    always empty."""
    rng = Random(f"look {number}")
    corners = (0, CELLS - 1, CELLS * (CELLS - 1), CELLS**2 - 1)
    look: list[str | None] = []
    for cell in range(CELLS**2):
        colour = pick(rng, tuple(COLOURS))  # drawn for the corners, too
        look.append(None if cell in corners else colour)
    return tuple(look)


def entity_name(number: int) -> str:
    """The name of an entity: three syllables or more, different for each."""
    syllables: list[str] = []
    # Entities with neighbouring numbers get quite different names.
    number = (number * 1103 + 7) % 16**3 + number // 16**3 * 16**3
    while number or len(syllables) < 3:
        number, digit = divmod(number, 16)
        syllables.append(_SYLLABLES[digit])
    return "".join(syllables)
