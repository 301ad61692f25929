"""Answers about scenes score as right if they are true, and as wrong if one thing is changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3leon.plugins.scenes import language, render
from cm3leon.plugins.scenes.parse import parse
from cm3leon.plugins.scenes.scores import (
    TAGS,
    boxes_met,
    caption_right,
    composition_score,
    compositions,
    edited,
    iou,
    shows,
    things_named,
)
from cm3leon.plugins.scenes.world import Scene, Thing, World, draw_scene

SHAPES_ALONE = World(words=0, figures=0, overlap=0)


def thing(colour: str, shape: str, x: float = 0.5, y: float = 0.5) -> Thing:
    return Thing("shape", colour, "medium", x, y, shape)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60)
def test_true_captions_are_right_and_others_wrong(seed: int) -> None:
    scene, rng = draw_scene(SHAPES_ALONE, seed), Random(seed)
    for text in (language.caption(scene, rng), language.long_caption(scene)):
        assert things_named(text) == Counter((one.colour, one.shape) for one in scene.things)
        assert caption_right(text, scene)
        other = next(colour for colour in SHAPES_ALONE.colours if colour != scene.things[0].colour)
        assert not caption_right(text, scene.with_thing(0, colour=other))
        assert not caption_right(text, replace(scene, things=(*scene.things, thing("red", "star"))))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40)
def test_an_image_shows_its_scene_and_no_other(seed: int) -> None:
    scene = draw_scene(SHAPES_ALONE, seed)
    assert shows(scene, replace(scene, things=scene.things[::-1]))
    assert edited(scene, scene)
    for edit in language.edits(scene, SHAPES_ALONE, Random(seed)):
        assert not edited(edit.after, scene), edit
        assert edited(edit.after, edit.after)
        # An image need not have the scene's background to show its things.
        if edit.kind not in ("background",):
            assert not shows(edit.after, scene)


def test_overlap_of_boxes() -> None:
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0

    # By counting pixels of random boxes.
    rng = np.random.default_rng(0)
    for _ in range(50):
        masks, boxes = [], []
        for _ in range(2):
            left, right = np.sort(rng.choice(21, 2, False))
            top, bottom = np.sort(rng.choice(21, 2, False))
            mask = np.zeros((20, 20), bool)
            mask[top:bottom, left:right] = True
            masks.append(mask)
            boxes.append((float(left), float(top), float(right), float(bottom)))

        both, either = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
        assert iou(boxes[0], boxes[1]) == pytest.approx(both / either)


def test_a_found_box_counts_once() -> None:
    box, near = (0.0, 0.0, 10.0, 10.0), (1.0, 0.0, 11.0, 10.0)
    assert boxes_met([("a", box), ("a", near)], [("a", box)]) == [True, False]
    assert boxes_met([("a", box), ("a", near)], [("a", near), ("a", box)]) == [True, True]
    assert boxes_met([("a", box)], [("b", box)]) == [False]
    assert boxes_met([("a", box)], [("a", (8.0, 0.0, 18.0, 10.0))]) == [False]


def test_boxes_of_pictures_are_met_by_what_is_read_in_them() -> None:
    def named_boxes(scene: Scene) -> list[tuple[str, tuple[float, float, float, float]]]:
        names = [language.short_name(one) for one in scene.things]
        return list(zip(names, render.boxes(scene, 96), strict=True))

    met: list[bool] = []
    for seed in range(40):
        scene = draw_scene(SHAPES_ALONE, seed)
        found = parse(render.picture(scene, 96), SHAPES_ALONE)
        met += boxes_met(named_boxes(scene), named_boxes(found), 0.8)
    # The parser takes some sizes for others.
    assert np.mean(met) > 0.95


@pytest.mark.parametrize(
    ("tag", "scene", "wrong"),
    [
        ("single_object", [("red", "ring")], []),
        ("colors", [("red", "ring")], [("blue", "ring")]),
        ("color_attr", [("red", "ring"), ("blue", "star")], [("blue", "ring"), ("red", "star")]),
        ("two_object", [("red", "ring"), ("blue", "star")], [("red", "ring")]),
    ],
)
def test_compositions_are_judged(
    tag: str, scene: list[tuple[str, str]], wrong: list[tuple[str, str]]
) -> None:
    small = World(colours=["red", "blue"], shapes=["ring", "star"], words=0, figures=0)
    # Colours must be asked for as the scene has them; for the other tags any request will do.
    asked = list(compositions(small, tag, 40))  # type: ignore[arg-type]
    if tag not in ("single_object", "two_object"):
        asked = [each for each in asked if things_named(each.text) == Counter(scene)]

    chosen = next(each for each in asked if "ring" in each.text)
    assert chosen.right(Scene("white", tuple(thing(*each) for each in scene)))
    assert not chosen.right(Scene("white", tuple(thing(*each) for each in wrong)))


def test_counts_and_positions_are_judged() -> None:
    # A request for so many rings or stars is met by that number alone.
    small = World(shapes=["ring", "star"], things=[1, 2, 3], words=0, figures=0)
    for asked in compositions(small, "counting", 20):
        number = language.NUMBERS.index(asked.text.split()[0])
        shape = "ring" if "ring" in asked.text else "star"
        scenes = [Scene("white", (thing("red", shape),) * count) for count in range(5)]
        assert [asked.right(scene) for scene in scenes] == [count == number for count in range(5)]

    # The first thing of a request for a position stands on one side of the second, in the middle.
    places = {
        "left of": (0.2, 0.5),
        "right of": (0.8, 0.5),
        "above": (0.5, 0.2),
        "below": (0.5, 0.8),
    }
    for asked in compositions(small, "position", 20):
        first, second = ("ring", "star") if asked.text.startswith("a ring") else ("star", "ring")
        for relation, place in places.items():
            scene = Scene("white", (thing("red", first, *place), thing("blue", second)))
            assert asked.right(scene) == (relation in asked.text)


def test_the_score_is_the_mean_of_six() -> None:
    right = {tag: [True, number % 2 == 0] for number, tag in enumerate(TAGS)}
    assert composition_score(right) == pytest.approx((3 * 1 + 3 * 0.5) / 6)
    with pytest.raises(ValueError, match="no images of counting"):
        composition_score({tag: [True] for tag in TAGS if tag != "counting"})

    once, again = compositions(World(), "colors", 5), compositions(World(), "colors", 5)
    assert [each.text for each in once] == [each.text for each in again]
