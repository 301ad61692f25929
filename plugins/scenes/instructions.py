"""Every task of the paper's table on scenes, where the true answer is known.

The scene of a seed becomes the values of a template's slots, which fill it to a document:

    task vqa     question "what color is the circle?", answer "red", the picture
    document     "Question: what color is the circle? Answer: red." <break> picture
    kept         the scene itself, with which an answer or a generated picture is compared
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from cm3leon.data.instructions.grounded import objects_text
from cm3leon.data.instructions.reasoning import reasoning_slots
from cm3leon.data.instructions.templates import FEATURES, ROLES, TABLE_5, fill_with_pixels
from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES
from cm3leon.types import Document, ImageSegment, TextSegment, UserError

from . import language, render
from .source import DrawnConfig, DrawnSource, scene_name
from .world import BACKGROUNDS, COLOURS, ROWS, SIZES, Scene, World, draw_scene, pick

Values = dict[str, Any]


@dataclass(frozen=True, eq=False)
class SceneExample:
    """What a task asks about a scene."""

    table: str
    """The task whose templates are used; empty = none, just a caption and its image."""
    values: Values
    """The values of the template's slots."""
    shows: Scene
    """The scene that the generated image should show or, for tasks answered in text, that the given
    image shows."""
    kind: str = ""
    """The kind of the question or the edit."""


@SOURCES.register("scene_instructions")
class SceneInstructionsSource(DrawnSource):
    """Documents of one task about scenes drawn by seed. Scenes that do not suit the task are left
    out."""

    version = 1

    @dataclass(kw_only=True)
    class Config(DrawnConfig):
        """The task, and the scenes that it is about."""

        task: str
        """text_to_image, caption, paragraph, vqa, relation, relation_steps, reasoning, edit,
        grounded, write, or a kind of feature image."""

        def check(self) -> None:
            DrawnConfig.check(self)
            if self.task not in TASKS:
                raise UserError(f"task is {self.task}; it must be one of: {', '.join(TASKS)}")

    config: Config

    @classmethod
    def task_of(cls, config: Any) -> str | None:
        return str(config.task)

    def document(self, seed: int) -> Document | Skipped:
        """The document about the scene of a seed."""
        found = self.example(seed)
        return found if isinstance(found, Skipped) else found[0]

    def example(self, seed: int) -> tuple[Document, SceneExample] | Skipped:
        """The document about the scene of a seed, and what it asks."""
        config = self.config
        scene, rng = draw_scene(config.world, seed), Random(f"{config.task} {seed}")
        example = TASKS[config.task](scene, config.world, rng, config.side)
        id_ = f"{config.task}-{seed:08d}"
        if example is None:
            return Skipped(id_, f"a scene that {config.task} cannot be about")

        table, values = example.table, example.values
        # Without a template, it is a caption and its picture.
        if not table:
            segments = (TextSegment(values["caption"]), ImageSegment(values["image"]))
            return Document(id_, segments, group=scene_name(seed)), example

        filled = fill_with_pixels(pick(rng, TABLE_5[table]), values, ROLES[table])
        return Document(id_, filled, group=scene_name(seed)), example


# ------------------------------------------------------------------------------------------ tasks

# Each function makes what its task asks about a scene; None if the scene does not suit the task.


def _text_to_image(scene: Scene, world: World, rng: Random, side: int) -> SceneExample | None:
    return SceneExample(
        "", {"caption": language.caption(scene, rng), "image": render.picture(scene, side)}, scene
    )


def _caption(scene: Scene, world: World, rng: Random, side: int) -> SceneExample | None:
    return SceneExample(
        "caption",
        {"caption": language.caption(scene, rng), "image": render.picture(scene, side)},
        scene,
    )


def _paragraph(scene: Scene, world: World, rng: Random, side: int) -> SceneExample | None:
    return SceneExample(
        "paragraph",
        {"caption": language.long_caption(scene), "image": render.picture(scene, side)},
        scene,
    )


def _vqa(scene: Scene, world: World, rng: Random, side: int) -> SceneExample | None:
    asked = language.questions(scene, world, rng)
    # Each kind of question comes equally often, however many there are of it.
    kind = pick(rng, sorted({question.kind for question in asked}))
    question = pick(rng, [question for question in asked if question.kind == kind])
    return _asked(question, question.answer, scene, side)


def _relation(scene: Scene, world: World, rng: Random, side: int) -> SceneExample | None:
    """How two things stand to each other, answered by yes or no."""
    question = _about_relation(scene, world, rng)
    return _asked(question, question.answer, scene, side) if question else None


def _relation_steps(scene: Scene, world: World, rng: Random, side: int) -> SceneExample | None:
    """The same question, answered in steps: the two places, the relation, then yes or no."""
    question = _about_relation(scene, world, rng)
    if question is None:
        return None
    return _asked(question, f"{question.why}: {question.answer}", scene, side)


def _about_relation(scene: Scene, world: World, rng: Random) -> language.Question | None:
    asked = language.questions(scene, world, rng)
    relations = [question for question in asked if question.kind == "relation"]
    return pick(rng, relations) if relations else None


def _asked(question: language.Question, answer: str, scene: Scene, side: int) -> SceneExample:
    values = {"question": question.text, "answer": answer, "image": render.picture(scene, side)}
    return SceneExample("vqa", values, scene, question.kind)


def _reasoning(scene: Scene, world: World, rng: Random, side: int) -> SceneExample | None:
    asked = language.reasoning(scene, rng)
    if asked is None:
        return None
    slots = reasoning_slots(
        asked.text, asked.context, list(asked.options), asked.answer, asked.explanation
    )
    return SceneExample("reasoning", {**slots, "image": render.picture(scene, side)}, scene)


def _edit(scene: Scene, world: World, rng: Random, side: int) -> SceneExample | None:
    edits = language.edits(scene, world, rng)
    if not edits:
        return None
    edit = pick(rng, edits)
    before, after = render.picture(scene, side), render.picture(edit.after, side)
    values = {"instruction": edit.instruction, "image1": before, "image2": after}
    return SceneExample("edit", values, edit.after, edit.kind)


def _grounded(scene: Scene, world: World, rng: Random, side: int) -> SceneExample | None:
    names, objects = [], []
    for thing, box in zip(scene.things, render.boxes(scene, side), strict=True):
        name = language.short_name(thing)
        left, top, right, bottom = (edge / side for edge in box)
        names.append(name)
        objects.append((name, (left, top, right, bottom)))

    # Several things of one name are named once; their boxes say how many there are.
    caption = " and ".join(dict.fromkeys(names))
    return SceneExample(
        "grounded",
        {
            "caption": caption,
            "objects": objects_text(objects),
            "image": render.picture(scene, side),
        },
        scene,
    )


def _write(scene: Scene, world: World, rng: Random, side: int) -> SceneExample | None:
    words = [thing for thing in scene.things if thing.kind == "word"]
    if not words:
        return None
    in_order = sorted(words, key=lambda thing: (ROWS.index(thing.place[0]), thing.x))
    text = " ".join(thing.word for thing in in_order)
    return SceneExample("write", {"text": text, "image": render.picture(scene, side)}, scene)


def _feature(kind: str) -> Callable[[Scene, World, Random, int], SceneExample | None]:
    """The task of generating a scene's picture from features of one kind."""

    def make(scene: Scene, world: World, rng: Random, side: int) -> SceneExample | None:
        if kind == "pose" and not any(thing.kind == "figure" for thing in scene.things):
            return None
        values = {
            "feature": FEATURES[kind],
            "feature_image": feature_image(kind, scene, side, rng),
            "caption": language.caption(scene, rng),
            "image": render.picture(scene, side),
        }
        return SceneExample("features", values, scene)

    return make


TASKS: dict[str, Callable[[Scene, World, Random, int], SceneExample | None]] = {
    "text_to_image": _text_to_image,
    "caption": _caption,
    "paragraph": _paragraph,
    "vqa": _vqa,
    "relation": _relation,
    "relation_steps": _relation_steps,
    "reasoning": _reasoning,
    "edit": _edit,
    "grounded": _grounded,
    "write": _write,
    **{kind: _feature(kind) for kind in FEATURES},
}


def feature_image(kind: str, scene: Scene, side: int, rng: Random) -> np.ndarray:
    """The feature image (side, side, 3), uint8, that a perfect extractor of that kind would make of
    the scene's picture."""
    if kind == "segmentation":
        palette = np.array([*COLOURS.values(), BACKGROUNDS["black"]], np.uint8)
        return palette[render.owners(scene, side)]
    if kind == "depth":
        return _grey(255 * render.depth(scene, side))
    if kind == "normals":
        return ((render.normals(scene, side) + 1) * 127.5).round().astype(np.uint8)
    if kind == "pose":
        return _pose(scene, side)

    # All other features are made of edges.
    edge_HW = render.edges(scene, side)
    if kind == "hed":
        from scipy.ndimage import gaussian_filter

        soft_HW = gaussian_filter(edge_HW.astype(np.float32), side / 80)
        return _grey(255 * soft_HW / max(float(soft_HW.max()), 1e-6))
    if kind == "scribble":
        from scipy.ndimage import map_coordinates

        # The outlines of an unsteady hand: they are moved by a slow wave.
        y, x = np.indices((side, side)).astype(np.float32)
        phase = [rng.random() * 6.3 for _ in range(4)]
        shift_y = 0.015 * side * np.sin(9 * x / side + phase[0])
        shift_y = shift_y + 0.01 * side * np.sin(17 * y / side + phase[1])
        shift_x = 0.015 * side * np.sin(9 * y / side + phase[2])
        shift_x = shift_x + 0.01 * side * np.sin(17 * x / side + phase[3])
        moved = [y + shift_y, x + shift_x]
        return _grey(255 * map_coordinates(edge_HW.astype(np.float32), moved, order=1))
    return _grey(255 * edge_HW.astype(np.float32))


def _grey(values_HW: np.ndarray) -> np.ndarray:
    """Values from 0 to 255 as a grey image."""
    return np.repeat(values_HW.clip(0, 255).round().astype(np.uint8)[..., None], 3, -1)


def _pose(scene: Scene, side: int) -> np.ndarray:
    """Skeletons on black, each bone in a colour of its own, in the style of OpenPose."""
    colours = np.array(list(COLOURS.values()), np.uint8)
    result_HWC = np.zeros((side, side, 3), np.uint8)
    y, x = (np.indices((side, side), np.float32) + 0.5) / side
    for thing in scene.things:
        if thing.kind == "figure":
            half = SIZES[thing.size] / 2
            at = {}
            for name, (jx, jy) in render.joints(thing.pose).items():
                at[name] = (thing.x + jx * half, thing.y + jy * half)

            # However small the figure is, its bones are at least about a pixel wide.
            for number, (first, second) in enumerate((("head", "neck"), *render.BONES)):
                near_HW = render.segment_distance(x, y, at[first], at[second]) <= max(
                    0.05 * half, 0.6 / side
                )
                result_HWC[near_HW] = colours[number]
    return result_HWC
