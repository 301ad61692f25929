"""The world whose truth is known: scenes follow from seeds, and pictures are read back."""

from __future__ import annotations

import re
from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3leon.config import from_mapping
from cm3leon.data.source import Skipped
from cm3leon.plugins.scenes import language, render
from cm3leon.plugins.scenes.instructions import SceneInstructionsSource
from cm3leon.plugins.scenes.parse import cells_of, parse
from cm3leon.plugins.scenes.source import ScenesSource
from cm3leon.plugins.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    World,
    draw_scene,
    entity_look,
    entity_name,
    touches,
)
from cm3leon.types import Document, UserError

SMALL = World(
    colours=["red", "green", "blue", "yellow", "purple", "cyan"],
    shapes=["circle", "square", "triangle", "cross"],
    sizes=["small", "large"],
    textures=["plain"],
    things=[1, 2],
    jitter=0.3,
    overlap=0,
    words=0,
    figures=0,
)
ALL = World()
ENTITIES = World(entities=3000, entity_share=1.0)


def what(thing: Thing) -> tuple[Any, ...]:
    """All that a parser reads of a thing: the place that it is in, not the pixel it stands on."""
    looks = (
        thing.kind,
        thing.shape,
        thing.colour,
        thing.size,
        thing.texture,
        thing.word,
        thing.pose,
        thing.entity,
    )
    return (*looks, thing.place)


def one(shape: str = "circle", colour: str = "red", **fields: Any) -> Thing:
    usual = {"size": "large", "x": 0.5, "y": 0.5}
    return Thing(kind="shape", colour=colour, shape=shape, **(usual | fields))


# ------------------------------------------------------------------------------------------ drawing


@given(seed=st.integers(0, 10**6))
@settings(max_examples=50)
def test_scenes_depend_on_their_seed_alone_and_stay_inside(seed: int) -> None:
    scene = draw_scene(ALL, seed)
    assert scene == draw_scene(World(), seed)
    assert 1 <= len(scene.things) <= 4
    for thing in scene.things:
        assert SIZES[thing.size] / 2 - 1e-9 <= min(thing.x, thing.y)
        assert max(thing.x, thing.y) <= 1 - SIZES[thing.size] / 2 + 1e-9


def test_scenes_are_those_of_the_first_release() -> None:
    """What a seed gives must not change, or the figures of old runs cannot be made again."""
    thing = draw_scene(ALL, 0).things[0]
    assert (thing.kind, thing.colour, thing.shape, thing.texture, thing.size) == FIRST
    assert [entity_name(number) for number in range(3)] == ["nubaba", "miloka", "losipa"]


FIRST = ("shape", "green", "star", "checked", "large")


def test_every_kind_of_thing_occurs_about_as_often_as_asked() -> None:
    scenes = [draw_scene(ALL, seed) for seed in range(3000)]
    things = [thing for scene in scenes for thing in scene.things]
    kinds = Counter(thing.kind for thing in things)
    assert 0.08 < kinds["word"] / len(things) < 0.12
    assert 0.08 < kinds["figure"] / len(things) < 0.12

    # Every value of every attribute occurs, none much more seldom than the others.
    shapes = [thing for thing in things if thing.kind == "shape"]
    for values, attribute in (
        (SHAPES, "shape"),
        (COLOURS, "colour"),
        (TEXTURES, "texture"),
        (SIZES, "size"),
    ):
        counts = Counter(getattr(thing, attribute) for thing in shapes)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.8 * len(shapes) / len(values)

    assert Counter(len(scene.things) for scene in scenes).keys() == {1, 2, 3, 4}
    assert sum(touches(*scene.things[:2]) for scene in scenes if len(scene.things) > 1) > 150


def test_entities_are_long_tailed_and_look_different() -> None:
    drawn = Counter(draw_scene(ENTITIES, seed).things[0].entity for seed in range(4000))
    assert drawn[0] > 1.5 * drawn[1] > 1.5 * drawn[5]
    assert len(drawn) > 700
    assert len({entity_look(number) for number in range(3000)}) == 3000
    assert len({entity_name(number) for number in range(5000)}) == 5000


# ----------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("side", [24, 48, 64, 100, 256])
def test_a_shape_covers_what_its_formula_says(side: int) -> None:
    """Geometry gives the shares that shapes have of their squares, at every resolution."""
    areas = {
        "circle": np.pi / 4,
        "square": 0.88**2,
        "diamond": 0.5,
        "cross": 0.34 * 2 - 0.34**2,
        "ring": np.pi / 4 * (1 - 0.52**2),
        "triangle": 0.95 * 0.95 / 2,
    }
    ground, tone = np.array(BACKGROUNDS["black"]), np.array(COLOURS["red"])
    for shape, area in areas.items():
        pixels_HWC = render.picture(Scene("black", (one(shape),)), side).astype(float)
        # A pixel at the rim counts as far as its tone is that of the shape.
        cover = ((pixels_HWC - ground) @ (tone - ground) / ((tone - ground) ** 2).sum()).sum()
        assert cover == pytest.approx(area * round(SIZES["large"] * side) ** 2, rel=0.08), shape


def test_what_is_seen_agrees_with_the_picture() -> None:
    """Owners, boxes, depth, normals and edges of two things, one partly hidden by the other."""
    scene = Scene("white", (one("square"), one("circle", "blue", x=0.65, y=0.5)))
    side = 96
    pixels_HWC, owner_HW = render.picture(scene, side), render.owners(scene, side)
    for point, tone, owner in (
        ((48, 44), COLOURS["red"], 0),
        ((48, 60), COLOURS["blue"], 1),
        ((5, 5), BACKGROUNDS["white"], -1),
    ):
        assert (pixels_HWC[point] == tone).all()
        assert owner_HW[point] == owner

    # A box is that of the whole thing, hidden or not.
    for number, (left, top, right, bottom) in enumerate(render.boxes(scene, side)):
        alone_HW = render.owners(Scene("white", scene.things[number : number + 1]), side) == 0
        ys, xs = np.nonzero(alone_HW)
        assert (left, top, right, bottom) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)

    # The circle is in front of the square, and the background is the farthest.
    depth_HW = render.depth(scene, side)
    assert depth_HW[owner_HW == -1].max() == 0
    circle_N, square_N = depth_HW[owner_HW == 1], depth_HW[owner_HW == 0]
    assert circle_N.min() > square_N.max() > square_N.min() > 0

    normal_HWC = render.normals(scene, side)
    np.testing.assert_allclose(np.linalg.norm(normal_HWC, axis=-1), 1, atol=1e-5)
    assert (normal_HWC[owner_HW == -1] == (0, 0, 1)).all()
    # The circle bulges: its normals lean outwards on both sides.
    assert normal_HWC[48, 72, 0] > 0.5 > -0.2 > normal_HWC[48, 54, 0]

    edge_HW = render.edges(scene, side)
    assert not edge_HW[:10].any()
    assert 60 < edge_HW.sum() < 0.1 * edge_HW.size


def test_a_figures_limbs_are_where_its_pose_says() -> None:
    low, high = render.joints((20, 20, 20, 20)), render.joints((155, 20, 155, 20))
    # One arm is raised, the other one hangs.
    assert high["left arm"][1] < low["left arm"][1]
    assert high["right arm"] == low["right arm"]
    assert high["left leg"][0] < low["left leg"][0] < 0 < low["right leg"][0]


def test_things_at_the_rim_are_cut_off() -> None:
    whole = render.picture(Scene("black", (one(x=0.5, y=0.5),)), 64)
    cut = render.picture(Scene("black", (one(x=0.0, y=1.0),)), 64)
    seen = (cut != BACKGROUNDS["black"]).any(-1).sum()
    of_all = (whole != BACKGROUNDS["black"]).any(-1).sum()
    assert 0.2 < seen / of_all < 0.3


# --------------------------------------------------------------------------------------- the parser


@pytest.mark.parametrize(
    ("world", "side", "scenes", "at_least"),
    [(SMALL, 48, 400, 1.0), (ALL, 64, 150, 0.95), (ALL, 96, 100, 0.96), (ENTITIES, 32, 300, 1.0)],
    ids=["small world", "everything", "everything, larger", "entities"],
)
def test_true_pictures_are_read_back(world: World, side: int, scenes: int, at_least: float) -> None:
    right = 0
    for seed in range(scenes):
        scene = draw_scene(world, seed)
        found = parse(render.picture(scene, side), world)
        things_are_right = Counter(map(what, found.things)) == Counter(map(what, scene.things))
        right += found.background == scene.background and things_are_right
    assert right >= at_least * scenes


@pytest.mark.parametrize("noise", [10, 25])
def test_noise_and_blur_are_borne(noise: int) -> None:
    from scipy.ndimage import gaussian_filter

    rng, right = np.random.default_rng(0), 0
    for seed in range(100):
        scene = draw_scene(SMALL, seed)
        pixels_HWC = gaussian_filter(render.picture(scene, 48).astype(float), (0.7, 0.7, 0))
        pixels_HWC += rng.normal(0, noise, pixels_HWC.shape)
        found = parse(np.clip(pixels_HWC, 0, 255).astype(np.uint8), SMALL)
        right += Counter(map(what, found.things)) == Counter(map(what, scene.things))
    assert right >= 95


def test_who_stands_in_front_is_read() -> None:
    right = seen = 0
    for seed in range(600):
        scene = draw_scene(World(words=0, figures=0, things=[2], overlap=1.0), seed)
        if touches(*scene.things):
            seen += 1
            found = parse(render.picture(scene, 64), ALL)
            right += list(map(what, found.things)) == list(map(what, scene.things))
        if seen == 60:
            break
    assert right >= 0.85 * seen


def test_anything_at_all_is_read_as_something() -> None:
    rng = np.random.default_rng(0)
    images = [
        np.zeros((48, 48, 3), np.uint8),
        np.full((48, 48, 3), 255, np.uint8),
        rng.integers(0, 256, (48, 48, 3), dtype=np.uint8),
    ]
    for image_HWC in images:
        for world in (SMALL, ENTITIES):
            assert parse(image_HWC, world).background in world.backgrounds
    assert parse(images[0], SMALL) == Scene("black", ())


def test_cells_of_an_entity_are_its_look() -> None:
    scene = draw_scene(ENTITIES, 3)
    colours = [*COLOURS, None]
    found = cells_of(render.picture(scene, 33).astype(np.float32), scene.background)
    assert tuple(colours[number] for number in found) == entity_look(scene.things[0].entity)


# ----------------------------------------------------------------------------------------- language


@given(seed=st.integers(0, 10**6))
@settings(max_examples=100)
def test_captions_name_what_is_there(seed: int) -> None:
    scene, rng = draw_scene(ALL, seed), Random(seed)
    short, long = language.caption(scene, rng), language.long_caption(scene)

    for text in (short, long):
        for thing in scene.things:
            assert thing.colour in text
            assert (thing.shape or thing.word or "figure") in text
    assert scene.background in long
    assert all(language.place_name(thing) in long for thing in scene.things)

    # No other colour is named, and the article fits the next word.
    named = set(re.findall(r"\w+", f"{short} {long}")) & set(COLOURS)
    assert named == {thing.colour for thing in scene.things}
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", f"{short} {long}")


@given(seed=st.integers(0, 10**6), world=st.sampled_from([ALL, SMALL]))
@settings(max_examples=100)
def test_answers_are_true(seed: int, world: World) -> None:
    """A second look at the scene answers each kind of question."""
    scene = draw_scene(world, seed)
    shapes = {(thing.colour, thing.shape) for thing in scene.things if thing.kind == "shape"}
    for question in language.questions(scene, world, Random(seed)):
        text, answer = question.text, question.answer
        if question.kind == "exists":
            # The question ends in a colour and a shape.
            colour, shape = text.rstrip("?").split()[-2:]
            assert ((colour, shape) in shapes) == (answer == "yes")
        elif question.kind == "count":
            # It may name one colour, or ask about all things.
            asked = [colour for colour in world.colours if f" {colour} " in text]
            number = sum(not asked or thing.colour == asked[0] for thing in scene.things)
            assert answer == language.NUMBERS[number]
        elif question.kind == "relation":
            match = re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", text)
            assert match
            first = next(t for t in scene.things if language.short_name(t) == match[1])
            second = next(t for t in scene.things if language.short_name(t) == match[3])
            holds = {
                "left of": first.x < second.x,
                "right of": first.x > second.x,
                "above": first.y < second.y,
                "below": first.y > second.y,
            }
            assert holds[match[2]] == (answer == "yes")
        elif question.kind == "background":
            assert answer == scene.background
        elif question.kind == "depth":
            # Things further in front come later in the scene.
            names = [language.short_name(thing) for thing in scene.things]
            behind = text.removeprefix("what is in front of the ").rstrip("?")
            assert names.index(behind) < names.index(answer)
        else:
            # What is asked about an attribute must be right of a thing that the text names.
            described = []
            for thing in scene.things:
                words = rf"\b({thing.colour}|{re.escape(language.noun(thing))})\b"
                if re.search(words, text):
                    described.append(thing)
            attribute = {"color": "colour"}.get(question.kind, question.kind)
            if question.kind == "place":
                found = {language.place_name(thing) for thing in described}
            else:
                found = {getattr(thing, attribute) for thing in described}
            assert answer in found


@given(seed=st.integers(0, 10**6))
@settings(max_examples=100)
def test_the_steps_to_a_relation_lead_to_its_answer(seed: int) -> None:
    """Whoever reads only the question and the two places comes to the same answer."""
    world = World(jitter=0.0, overlap=0.0, words=0.0, figures=0.0)
    plain, steps = (
        SceneInstructionsSource(SceneInstructionsSource.Config(task=task, world=world, side=24))
        for task in ("relation", "relation_steps")
    )
    found, explained = plain.example(seed), steps.example(seed)
    if isinstance(found, Skipped) or isinstance(explained, Skipped):
        assert isinstance(found, Skipped) == isinstance(explained, Skipped)
        return

    values = explained[1].values
    places = r"the (.+) is at the (.+), the (.+) at the (.+)"
    said = re.fullmatch(rf"{places}, so the (.+) is (.+) the (.+): (\w+)", values["answer"])
    asked = re.fullmatch(
        r"is the (.+) (left of|right of|above|below) the (.+)\?", values["question"]
    )
    assert said
    assert asked
    assert (said[1], said[3]) == (said[5], said[7]) == (asked[1], asked[3])
    first, second = language.place_of(said[2]), language.place_of(said[4])
    assert first
    assert second
    side = {name: number for number, name in enumerate((*ROWS, *COLUMNS))}
    axis = 0 if asked[2] in ("above", "below") else 1
    difference = side[first[axis]] - side[second[axis]]
    holds = difference < 0 if asked[2] in ("above", "left of") else difference > 0
    assert said[8] == ("yes" if holds else "no")
    assert (said[6] == asked[2]) == holds
    assert explained[1].kind == found[1].kind == "relation"


def test_every_kind_of_question_and_edit_occurs() -> None:
    kinds: Counter[str] = Counter()
    edits: Counter[str] = Counter()
    reasons = 0

    # Three hundred scenes are enough to meet even the rare kinds.
    for seed in range(300):
        scene, rng = draw_scene(ALL, seed), Random(seed)
        kinds.update(question.kind for question in language.questions(scene, ALL, rng))
        edits.update(edit.kind for edit in language.edits(scene, ALL, rng))
        reasons += language.reasoning(scene, rng) is not None

    assert kinds.keys() == {
        "color",
        "shape",
        "word",
        "place",
        "size",
        "texture",
        "background",
        "count",
        "exists",
        "relation",
        "depth",
    }
    assert edits.keys() == {"background", "add", "recolour", "move", "replace", "remove"}
    assert reasons > 100


@given(seed=st.integers(0, 10**6), world=st.sampled_from([ALL, SMALL]))
@settings(max_examples=100)
def test_an_edit_changes_what_it_says_and_nothing_else(seed: int, world: World) -> None:
    scene = draw_scene(world, seed)
    for edit in language.edits(scene, world, Random(seed)):
        gone = Counter(map(what, scene.things)) - Counter(map(what, edit.after.things))
        new = Counter(map(what, edit.after.things)) - Counter(map(what, scene.things))

        # Only an edit of the background changes it; the others remove, add or change a thing.
        assert (edit.after.background != scene.background) == (edit.kind == "background")
        counts = {"background": (0, 0), "add": (0, 1), "remove": (1, 0)}.get(edit.kind, (1, 1))
        assert (sum(gone.values()), sum(new.values())) == counts, edit

        # A changed thing differs in one attribute, by its index in `what`.
        before, after = [*gone], [*new]
        if edit.kind in ("recolour", "replace", "move"):
            names = {"recolour": 2, "replace": 1, "move": 8}
            pairs = enumerate(zip(before[0], after[0], strict=True))
            differing = [index for index, (a, b) in pairs if a != b]
            assert differing == [names[edit.kind]]
        if edit.kind == "move":
            assert language.place_of(edit.instruction.split(" to the ")[1]) == after[0][8]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=50)
def test_reasoning_has_one_right_option(seed: int) -> None:
    scene = draw_scene(ALL, seed)
    asked = language.reasoning(scene, Random(seed))
    if asked is None:
        return

    def thing_of(option: str) -> Thing:
        return next(thing for thing in scene.things if language.short_name(thing) == option)

    right = thing_of(asked.options[asked.answer])
    wrong = thing_of(asked.options[1 - asked.answer])

    # What is asked holds of the right option and not of the other one.
    holds = {
        "Which is larger?": SIZES[right.size] > SIZES[wrong.size],
        "Which is higher?": right.y < wrong.y,
        "Which is further left?": right.x < wrong.x,
    }
    assert holds[asked.text]
    assert all(option in asked.explanation for option in asked.options)


def test_names_of_places_are_read_back() -> None:
    for row in ROWS:
        for column in COLUMNS:
            x = (("left", "center", "right").index(column) + 0.5) / 3
            y = (("top", "middle", "bottom").index(row) + 0.5) / 3
            assert language.place_of(language.place_name(one(x=x, y=y))) == (row, column)
    for wrong in ("", "top bottom", "nowhere", "left right"):
        assert language.place_of(wrong) is None


# --------------------------------------------------------------------------------------- the source


def source(**fields: Any) -> ScenesSource:
    return ScenesSource(from_mapping(ScenesSource.Config, fields))


def test_as_many_captions_are_wrong_as_asked_and_no_picture_changes() -> None:
    true = ScenesSource(ScenesSource.Config(count=1000, side=24, wrong=0.0))
    noisy = ScenesSource(ScenesSource.Config(count=1000, side=24, wrong=0.3))
    pairs = []
    for part in true.parts():
        for one, other in zip(true.read(part), noisy.read(part), strict=True):
            if isinstance(one, Document) and isinstance(other, Document):
                pairs.append((one, other))
    assert len(pairs) == 1000
    assert all(np.array_equal(one.image, other.image) for one, other in pairs)

    # Four standard deviations of 1,000 draws with 0.3 are 58, and the caption of another scene may
    # be the same.
    assert 0.24 < np.mean([one.text != other.text for one, other in pairs]) < 0.36

    unset = ScenesSource(ScenesSource.Config(count=1000, side=24))
    assert unset.fingerprint() == true.fingerprint()
    assert noisy.fingerprint() != true.fingerprint()


def test_a_corpus_has_its_scenes_in_parts_that_can_be_read_apart() -> None:
    scenes = source(count=2010, side=32, captions="both")
    assert scenes.parts() == ["0", "1000", "2000"]
    documents = [document for document in scenes.documents() if isinstance(document, Document)]
    assert len({document.id for document in documents}) == 2010

    # The second part can be read from its middle.
    later = next(scenes.read("1000", 17))
    assert isinstance(later, Document)
    assert (later.id, later.text) == (documents[1017].id, documents[1017].text)
    assert np.array_equal(later.images[0], documents[1017].images[0])

    assert {document.images[0].shape for document in documents} == {(32, 32, 3)}
    assert scenes.fingerprint() != source(count=2010, side=32).fingerprint()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"side": 8}, "side is 8"),
        ({"world": {"shapes": ["circel"]}}, "shapes holds 'circel'"),
        ({"world": {"colours": []}}, "colours is empty"),
        ({"world": {"things": [12]}}, "things is"),
        ({"world": {"entity_share": 0.5}}, "entities"),
    ],
)
def test_worlds_that_there_are_not(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(**fields)
