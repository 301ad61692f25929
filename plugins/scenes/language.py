"""Words about scenes: captions, questions with answers, reasoning, and edits with their results.

A scene of a small red plain circle at the top left and a large blue striped square in the middle:

    caption      a red circle at the top left and a blue square at the center
    question     where is the red circle?                 top left
    reasoning    Which is larger? (A) red circle (B) blue square
    edit         remove the red circle                    the scene without it

Whatever is said of one thing names it by words that fit no other thing of the scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from random import Random

from .world import (
    COLUMNS,
    ROWS,
    SIZES,
    Scene,
    Thing,
    World,
    draw_thing,
    entity_name,
    pick,
    touches,
)

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Question:
    """A question about a scene that has exactly one right answer."""

    kind: str
    text: str
    answer: str
    why: str = ""
    """What the answer follows from; only questions about relations have it."""


@dataclass(frozen=True)
class Reasoning:
    """A question with options, as in ScienceQA: the answer is the letter of an option."""

    text: str
    context: str
    options: tuple[str, ...]
    answer: int
    explanation: str


@dataclass(frozen=True)
class Edit:
    """An instruction, and the scene after following it."""

    kind: str
    instruction: str
    after: Scene


# ------------------------------------------------------------------------------------------ names


def place_name(thing: Thing) -> str:
    """The name of a thing's place: "top left", "left", "center" ..."""
    row, column = thing.place
    if (row, column) == ("middle", "center"):
        return "center"
    return " ".join(word for word in (row, column) if word not in ("middle", "center"))


def noun(thing: Thing) -> str:
    """What a thing is: "circle", "word CAT", "figure", or an entity's name."""
    named = {"shape": thing.shape, "word": f"word {thing.word}", "figure": "figure"}
    return named.get(thing.kind) or entity_name(thing.entity)


def short_name(thing: Thing) -> str:
    """A thing's colour and noun: "red circle"."""
    return noun(thing) if thing.kind == "entity" else f"{thing.colour} {noun(thing)}"


def full_name(thing: Thing) -> str:
    """Everything that a thing is: "small red striped circle"."""
    if thing.kind == "word":
        return f"{thing.size} {short_name(thing)}"
    if thing.kind != "shape":
        return short_name(thing)
    words = [thing.size, thing.colour]
    if thing.texture != "plain":
        words.append(thing.texture)
    return " ".join([*words, thing.shape])


def _an(name: str) -> str:
    """A name with its article."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _listed(names: list[str]) -> str:
    """Names as a list in a sentence: "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --------------------------------------------------------------------------------------- captions


def caption(scene: Scene, rng: Random) -> str:
    """A short caption that names all things; a single thing with its place."""
    if scene.things[0].kind == "entity":
        return f"{noun(scene.things[0])} on {scene.background}"
    if len(scene.things) == 1:
        (thing,) = scene.things
        name, place = pick(rng, (short_name, full_name))(thing), place_name(thing)
        return pick(
            rng, (f"{_an(name)} at the {place}", f"{name}, {place}", f"at the {place}: {_an(name)}")
        )

    # Two things are often described by where one is from the other.
    if len(scene.things) == 2 and rng.random() < 0.5:
        relation = _relation(*scene.things)
        if relation:
            first, second = map(short_name, scene.things)
            return f"{_an(first)} {relation} {_an(second)}"

    # Several things are named with their places, or counted.
    if rng.random() < 0.5:
        placed = [f"{_an(short_name(each))} at the {place_name(each)}" for each in scene.things]
        return _listed(placed)
    return _listed(_counted(list(map(short_name, scene.things))))


def long_caption(scene: Scene) -> str:
    """A caption that says everything: the background, the number of things, and of each its size,
    texture, place and what it is in front of."""
    if scene.things[0].kind == "entity":
        return f"The picture shows {noun(scene.things[0])} on a {scene.background} background."
    count = len(scene.things)
    amount = "is one thing" if count == 1 else f"are {NUMBERS[count]} things"
    sentences = [f"There {amount} on a {scene.background} background."]

    for number, thing in enumerate(scene.things):
        # A thing may hide parts of those before it, which are farther away.
        behind = [short_name(other) for other in scene.things[:number] if touches(other, thing)]
        before = f", in front of the {_listed(behind)}" if behind else ""
        name = _an(full_name(thing)).replace("a", "A", 1)
        sentences.append(f"{name} is at the {place_name(thing)}{before}.")
    return " ".join(sentences)


def _counted(names: list[str]) -> list[str]:
    """Names with their numbers, such as "two red circles"."""
    counted = []
    for name in dict.fromkeys(names):
        count = names.count(name)
        if count == 1:
            counted.append(_an(name))
        else:
            counted.append(f"{NUMBERS[count]} {name}s")
    return counted


def _side(thing: Thing) -> float:
    """The side of a thing's square, as a share of the picture's."""
    return SIZES.get(thing.size, 1.0)


def _relation(one: Thing, other: Thing) -> str:
    """Where a thing is as seen from another; empty if that is not clear."""
    dx, dy = one.x - other.x, one.y - other.y
    if max(abs(dx), abs(dy)) < 0.2 or 0.6 < abs(dx) / max(abs(dy), 1e-9) < 1.6:
        return ""
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _places(name: str, thing: Thing, other_name: str, other: Thing) -> str:
    """Where two things are, each called by its name."""
    return f"the {name} is at the {place_name(thing)}, the {other_name} at the {place_name(other)}"


# -------------------------------------------------------------------------------------- questions


def questions(scene: Scene, world: World, rng: Random) -> list[Question]:
    """All questions about a scene with exactly one right answer. Things that are asked about but
    are not there are drawn."""
    if scene.things[0].kind == "entity":
        return [
            Question("who", "who is this?", noun(scene.things[0])),
            Question("background", "what color is the background?", scene.background),
        ]
    found: list[Question] = []
    for ask in _ASKERS:
        found.extend(ask(scene, world, rng))
    return found


def _alone(scene: Scene, name: Callable[[Thing], str]) -> Iterator[tuple[str, Thing]]:
    """Yield the things that a name fits alone, each with that name."""
    names = [name(thing) for thing in scene.things]
    for each, thing in zip(names, scene.things, strict=True):
        if names.count(each) == 1:
            yield each, thing


def _about_one(scene: Scene, world: World, rng: Random) -> Iterator[Question]:
    """Questions about a thing that some words fit alone."""
    for name, thing in _alone(scene, noun):
        yield Question("color", f"what color is the {name}?", thing.colour)
    for colour, thing in _alone(scene, lambda thing: thing.colour):
        if thing.kind == "shape":
            yield Question("shape", f"what shape is the {colour} thing?", thing.shape)
        elif thing.kind == "word":
            yield Question("word", f"what is written in {colour}?", thing.word)
    for name, thing in _alone(scene, short_name):
        yield Question("place", f"where is the {name}?", place_name(thing))
        if thing.kind == "shape" and len(world.sizes) > 1:
            yield Question("size", f"how big is the {name}?", thing.size)
        if thing.kind == "shape" and len(world.textures) > 1:
            yield Question("texture", f"what pattern has the {name}?", thing.texture)


def _about_all(scene: Scene, world: World, rng: Random) -> Iterator[Question]:
    """Questions about the picture as a whole."""
    if len(world.backgrounds) > 1:
        yield Question("background", "what color is the background?", scene.background)
    if len(world.things) > 1:
        yield Question("count", "how many things are there?", NUMBERS[len(scene.things)])
        colours = [thing.colour for thing in scene.things]
        colour = pick(rng, colours)
        number = NUMBERS[colours.count(colour)]
        yield Question("count", f"how many {colour} things are there?", number)


def _about_existence(scene: Scene, world: World, rng: Random) -> Iterator[Question]:
    """A question about a thing that is there, and one about a thing that is not."""
    there = {(thing.colour, thing.shape) for thing in scene.things if thing.kind == "shape"}
    if there:
        yield Question("exists", f"is there {_an(' '.join(pick(rng, sorted(there))))}?", "yes")

    # Those near to what is there share a colour or a shape with one of the things, but not both.
    absent, near = [], []
    for colour, shape in product(world.colours, world.shapes):
        if (colour, shape) in there:
            continue
        absent.append((colour, shape))
        if any((colour == c) != (shape == s) for c, s in there):
            near.append((colour, shape))

    # Half of the time the absent thing is such a near one, which is harder.
    chosen = near if near and rng.random() < 0.5 else absent
    if chosen:
        yield Question("exists", f"is there {_an(' '.join(pick(rng, chosen)))}?", "no")


_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _about_two(scene: Scene, world: World, rng: Random) -> Iterator[Question]:
    """Questions about how two things stand to each other."""
    named = list(_alone(scene, short_name))
    for name, thing in named:
        for other_name, other in named:
            if thing is other:
                continue
            relation = _relation(thing, other)
            if relation:
                wrong, places = _OPPOSITES[relation], _places(name, thing, other_name, other)
                why = f"{places}, so the {name} is {relation} the {other_name}"
                for said, answer in ((relation, "yes"), (wrong, "no")):
                    text = f"is the {name} {said} the {other_name}?"
                    yield Question("relation", text, answer, why)

            # The nearer of two things comes later in the scene.
            before = scene.things.index(thing) > scene.things.index(other)
            if before and touches(thing, other):
                yield Question("depth", f"what is in front of the {other_name}?", name)


_ASKERS = (_about_one, _about_all, _about_existence, _about_two)


def reasoning(scene: Scene, rng: Random) -> Reasoning | None:
    """Ask which of two things is larger, higher or further left; None if nothing can be asked."""
    named = [(name, thing) for name, thing in _alone(scene, short_name) if thing.kind == "shape"]
    asked: list[tuple[str, str, str, str]] = []
    for name, thing in named:
        for other_name, other in named:
            # This explains the answer to a question about places.
            places = f"T{_places(name, thing, other_name, other)[1:]}."
            if SIZES[thing.size] > SIZES[other.size]:
                sizes = f"The {name} is {thing.size}, the {other_name} {other.size}."
                asked.append(("larger", name, other_name, sizes))
            if ROWS.index(thing.place[0]) < ROWS.index(other.place[0]):
                asked.append(("higher", name, other_name, places))
            if COLUMNS.index(thing.place[1]) < COLUMNS.index(other.place[1]):
                asked.append(("further left", name, other_name, places))
    if not asked:
        return None

    # The right option comes first as often as second.
    what, right, wrong, why = pick(rng, asked)
    options = (right, wrong) if rng.random() < 0.5 else (wrong, right)
    number = NUMBERS[len(scene.things)]
    context = (
        f"The picture shows {number} thing{'s' * (len(scene.things) > 1)} on {scene.background}."
    )
    return Reasoning(f"Which is {what}?", context, options, options.index(right), why)


# ------------------------------------------------------------------------------------------ edits


def edits(scene: Scene, world: World, rng: Random) -> list[Edit]:
    """One edit of each kind that a scene allows, each of a thing that its words fit alone."""
    named = []
    for name, thing in _alone(scene, short_name):
        if thing.kind != "entity":
            named.append((name, scene.things.index(thing)))

    # Edits of the scene as a whole.
    result: list[Edit] = []
    others = [background for background in world.backgrounds if background != scene.background]
    if others:
        new = pick(rng, others)
        result.append(
            Edit("background", f"change the background to {new}", replace(scene, background=new))
        )

    free = _free_places(scene)
    if free and scene.things[0].kind != "entity" and len(scene.things) < max(world.things):
        thing = draw_thing(world, rng, pick(rng, free))
        result.append(
            Edit(
                "add",
                f"add {_an(full_name(thing))} at the {place_name(thing)}",
                replace(scene, things=(*scene.things, thing)),
            )
        )
    if not named:
        return result

    # Edits of one thing, which is the same for all of them.
    name, number = pick(rng, named)
    thing = scene.things[number]
    colours = [colour for colour in world.colours if colour != thing.colour]
    if colours:
        new = pick(rng, colours)
        result.append(
            Edit("recolour", f"make the {name} {new}", scene.with_thing(number, colour=new))
        )

    if free:
        moved = _moved(thing, pick(rng, free), world, rng)
        after = scene.with_thing(number, x=moved.x, y=moved.y)
        result.append(Edit("move", f"move the {name} to the {place_name(moved)}", after))

    shapes = [shape for shape in world.shapes if shape != thing.shape]
    if thing.kind == "shape" and shapes:
        new = pick(rng, shapes)
        result.append(
            Edit("replace", f"turn the {name} into a {new}", scene.with_thing(number, shape=new))
        )

    if len(scene.things) > 1:
        kept = tuple(other for other in scene.things if other is not thing)
        result.append(Edit("remove", f"remove the {name}", replace(scene, things=kept)))
    return result


def _moved(thing: Thing, place: int, world: World, rng: Random) -> Thing:
    """A thing moved to one of the nine places, and shifted there at random."""
    room = (1 / 3 - SIZES[thing.size]) * world.jitter
    return replace(
        thing,
        x=(place % 3 + 0.5) / 3 + (rng.random() - 0.5) * room,
        y=(place // 3 + 0.5) / 3 + (rng.random() - 0.5) * room,
    )


def _free_places(scene: Scene) -> list[int]:
    """The indices of the places that no thing reaches into."""
    result = []
    for place in range(9):
        x, y = (place % 3 + 0.5) / 3, (place // 3 + 0.5) / 3
        is_free = True
        for thing in scene.things:
            # Squares may touch at their edges; without the spare 0.005, rounding could forbid it.
            reach = (_side(thing) + 1 / 3) / 2 - 0.005
            if abs(thing.x - x) < reach and abs(thing.y - y) < reach:
                is_free = False
        if is_free:
            result.append(place)
    return result


def place_of(name: str) -> tuple[str, str] | None:
    """The row and column that a place's name stands for; None for any other text."""
    words = name.split()
    rows = [word for word in words if word in ROWS]
    columns = [word for word in words if word in COLUMNS]
    if not words or len(rows) + len(columns) != len(words) or len(rows) > 1 or len(columns) > 1:
        return None
    return (rows or ["middle"])[0], (columns or ["center"])[0]
