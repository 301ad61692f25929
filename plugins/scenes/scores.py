"""Answers about scenes compared with the truth: what is seen in an image, and what a text names.

All functions are pure. Images are read by `parse.parse` before.

    asked   red circle, blue square     as (colour, shape):  {(red, circle): 1, (blue, square): 1}
    found   red circle, red square                           {(red, circle): 1, (red, square): 1}
    right   no: the counts differ
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from .language import NUMBERS
from .world import COLOURS, SHAPES, SIZES, Scene, Thing, World, pick

Box = tuple[float, float, float, float]
"""(left, top, right, bottom)."""
Field = Literal["kind", "shape", "colour", "size", "texture", "word", "pose", "entity", "place"]


def counted(scene: Scene, fields: Sequence[Field]) -> Counter[tuple[object, ...]]:
    """Count a scene's things by the given fields, such as (colour, shape)."""
    counts: Counter[tuple[object, ...]] = Counter()
    for thing in scene.things:
        counts[tuple(getattr(thing, name) for name in fields)] += 1
    return counts


def shows(
    asked: Scene, found: Scene, fields: Sequence[Field] = ("colour", "shape", "place")
) -> bool:
    """Whether the scene that was found has exactly the things that were asked for, compared by the
    given fields."""
    return counted(asked, fields) == counted(found, fields)


def edited(
    after: Scene,
    found: Scene,
    fields: Sequence[Field] = ("kind", "shape", "word", "colour", "size", "place"),
) -> bool:
    """Whether the scene that was found is the one after an edit: what should change did, and all
    else stayed."""
    return found.background == after.background and shows(after, found, fields)


_NAMED = re.compile(
    rf"\b(?:(an?|{'|'.join(NUMBERS[1:])})\s+)?(?:(?:{'|'.join(SIZES)})\s+)?({'|'.join(COLOURS)})\s+"
    rf"(?:(?:striped|dotted|checked)\s+)?({'|'.join(SHAPES)})(?:es|s)?\b"
)


def things_named(text: str) -> Counter[tuple[str, str]]:
    """Count the (colour, shape) of the shapes that a text names: "two red circles" are two."""
    result: Counter[tuple[str, str]] = Counter()
    for number, colour, shape in _NAMED.findall(text.lower()):
        # The number is an article, or missing, for a single thing.
        result[colour, shape] += NUMBERS.index(number) if number in NUMBERS else 1
    return result


def caption_right(text: str, scene: Scene) -> bool:
    """Whether a caption names exactly the things of a scene of shapes, by colour and shape."""
    return things_named(text) == Counter((thing.colour, thing.shape) for thing in scene.things)


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes; 0 for boxes without an area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    union = sum(areas) - both
    return both / union if union > 0 else 0.0


def boxes_met(
    asked: Sequence[tuple[str, Box]], found: Sequence[tuple[str, Box]], at_least: float = 0.5
) -> list[bool]:
    """Whether each thing that was asked for is found in its box: a thing of the same name, with at
    least that intersection over union.

    A thing that was found counts only for one that was asked for; the closest pairs are matched
    first.
    """
    pairs: list[tuple[float, int, int]] = []
    for i, (name, box) in enumerate(asked):
        for j, (seen, other) in enumerate(found):
            if name == seen:
                pairs.append((iou(box, other), i, j))

    met, used = [False] * len(asked), set()
    for overlap, i, j in sorted(pairs, reverse=True):
        if overlap >= at_least and not met[i] and j not in used:
            met[i] = True
            used.add(j)
    return met


# ------------------------------------------------------------------------------------ composition

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
TAGS: tuple[Tag, ...] = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
)
"""GenEval's six kinds of prompts (Ghosh et al. 2023, arXiv 2310.11513)."""
_MARGIN = 0.1
"""Share of the picture's side by which one thing must be further than another."""


@dataclass(frozen=True)
class Composition:
    """A prompt about shapes of one of GenEval's kinds, and what its image must show."""

    tag: Tag
    text: str
    right: Callable[[Scene], bool]


def compositions(world: World, tag: Tag, count: int, seed: int = 0) -> list[Composition]:
    """Draw prompts of one kind by seed."""
    rng = Random(f"{tag} {seed}")
    make = {
        "single_object": _single,
        "two_object": _two,
        "counting": _counting,
        "colors": _colors,
        "position": _position,
        "color_attr": _attribution,
    }[tag]
    return [make(world, rng) for _ in range(count)]


def composition_score(right_by_tag: dict[Tag, Sequence[bool]]) -> float:
    """The mean over the six kinds of the share of right images. Raises ValueError if a kind is
    missing."""
    missing = [tag for tag in TAGS if not right_by_tag.get(tag)]
    if missing:
        raise ValueError(f"no images of {missing[0]}")
    return sum(sum(right_by_tag[tag]) / len(right_by_tag[tag]) for tag in TAGS) / len(TAGS)


def _of(scene: Scene, shape: str, colour: str | None = None) -> list[Thing]:
    """The things of a scene with that shape and, if given, that colour."""
    return [
        thing for thing in scene.things if thing.shape == shape and colour in (None, thing.colour)
    ]


def _article(colour: str) -> str:
    """The article before a colour: "an" orange circle, "a" red one."""
    return "an" if colour[0] in "aeiou" else "a"


def _two_shapes(world: World, rng: Random) -> tuple[str, str]:
    """Draw two different shapes."""
    first = pick(rng, world.shapes)
    return first, pick(rng, [shape for shape in world.shapes if shape != first])


# Each of these functions draws a prompt of one kind.


def _single(world: World, rng: Random) -> Composition:
    shape = pick(rng, world.shapes)
    return Composition("single_object", f"a {shape}", lambda scene: bool(_of(scene, shape)))


def _two(world: World, rng: Random) -> Composition:
    one, other = _two_shapes(world, rng)
    return Composition(
        "two_object",
        f"a {one} and a {other}",
        lambda scene: bool(_of(scene, one) and _of(scene, other)),
    )


def _counting(world: World, rng: Random) -> Composition:
    shape = pick(rng, world.shapes)
    number = pick(rng, [each for each in world.things if each > 1] or [2])
    plural = f"{shape}es" if shape.endswith("s") else f"{shape}s"
    return Composition(
        "counting", f"{NUMBERS[number]} {plural}", lambda scene: len(_of(scene, shape)) == number
    )


def _colors(world: World, rng: Random) -> Composition:
    colour, shape = pick(rng, world.colours), pick(rng, world.shapes)
    text = f"{_article(colour)} {colour} {shape}"
    return Composition("colors", text, lambda scene: bool(_of(scene, shape, colour)))


def _position(world: World, rng: Random) -> Composition:
    one, other = _two_shapes(world, rng)
    relation = pick(rng, ("left of", "right of", "above", "below"))

    def right(scene: Scene) -> bool:
        return any(_stands(a, b, relation) for a in _of(scene, one) for b in _of(scene, other))

    return Composition("position", f"a {one} {relation} a {other}", right)


def _stands(one: Thing, other: Thing, relation: str) -> bool:
    """Whether a thing is clearly in that direction from another."""
    further = {
        "left of": other.x - one.x,
        "right of": one.x - other.x,
        "above": other.y - one.y,
        "below": one.y - other.y,
    }
    return further[relation] > _MARGIN


def _attribution(world: World, rng: Random) -> Composition:
    one, other = _two_shapes(world, rng)
    first = pick(rng, world.colours)
    second = pick(rng, [colour for colour in world.colours if colour != first])
    return Composition(
        "color_attr",
        f"{_article(first)} {first} {one} and {_article(second)} {second} {other}",
        lambda scene: bool(_of(scene, one, first) and _of(scene, other, second)),
    )
