"""Protocols on scenes, where the true answer is known (docs/scenes.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from cm3leon.config import NonNegativeInt, PositiveInt, Seed
from cm3leon.data.instructions.templates import FEATURES
from cm3leon.data.source import Skipped
from cm3leon.evaluation.metrics import Measured, proportion
from cm3leon.evaluation.protocols.base import Answer, Item, Protocol
from cm3leon.registry import PROTOCOLS
from cm3leon.types import Document, TextSegment, UserError

from .instructions import SceneExample, SceneInstructionsSource
from .language import short_name
from .parse import parse
from .render import boxes
from .scores import (
    TAGS,
    boxes_met,
    caption_right,
    composition_score,
    compositions,
    edited,
    shows,
)
from .source import DrawnConfig, entity_document, entity_scene
from .world import BACKGROUNDS, Scene, World

FIRST = 100_000_000
"""Seed of the first scene that is asked about, far from the seeds of training."""
NUMBER = ("no object", "one object", "two objects", "three objects", "four objects")
TEXT_TASKS = {
    "caption": 64,
    "paragraph": 128,
    "vqa": 32,
    "relation": 32,
    "relation_steps": 64,
    "reasoning": 64,
}
"""Tasks that are answered in text, with the most tokens of an answer. With a tokenizer of 512
pieces, the longest true answers about 300 scenes of the whole world have 33, 100, 5 and 36 (caption,
paragraph, vqa, reasoning); about 600 of the small world, 39 in steps."""


@PROTOCOLS.register("scene_task")
class SceneTask(Protocol):
    """A task about scenes: the share of right answers, in all and by kind of question or scene, and
    of right steps if an answer has steps."""

    @dataclass(kw_only=True)
    class Config(DrawnConfig):
        """The task, and how many scenes it is asked about."""

        task: str
        """The task, as in the source scene_instructions."""
        count: PositiveInt = 500
        """Number of items."""
        first: NonNegativeInt = FIRST
        """Seed of the first scene."""

        def check(self) -> None:
            SceneInstructionsSource.Config(world=self.world, side=self.side, task=self.task).check()

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.answers_in = "text" if config.task in TEXT_TASKS else "image"
        self.max_tokens = TEXT_TASKS.get(config.task, Protocol.max_tokens)

    def items(self) -> list[Item]:
        config = self.config
        source = SceneInstructionsSource(
            SceneInstructionsSource.Config(world=config.world, side=config.side, task=config.task)
        )
        # Scenes that the task cannot be about are passed over, up to a limit: a world without words
        # would be searched forever for one to write.
        items: list[Item] = []
        for tried in count():
            if len(items) == config.count:
                return items
            if tried == 100 * config.count:
                raise UserError(
                    f"protocol.task is {config.task}, but almost no scene of this world fits it; "
                    "change protocol.world, or choose another task"
                )
            found = source.example(config.first + tried)
            if not isinstance(found, Skipped):
                document, example = found
                task = "instruction" if example.table else "text_to_image"
                kind = example.kind or NUMBER[min(len(example.shows.things), len(NUMBER) - 1)]
                items.append(Item(document.id, task, document, example, kind))
        raise AssertionError

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        right_B = np.array(
            [self.right(item, answer) for item, answer in zip(items, answers, strict=True)]
        )
        result = {"right": proportion(right_B)}

        # The steps that an answer gives, each by itself.
        if self.config.task == "relation_steps":
            right_B2 = np.zeros((len(items), 2), bool)
            for row, (item, answer) in enumerate(zip(items, answers, strict=True)):
                wanted, given = _steps(str(item.truth.values["answer"])), _steps(answer.text)
                right_B2[row] = np.equal(wanted, given)
            result["places"] = proportion(right_B2[:, 0])
            result["relation"] = proportion(right_B2[:, 1])

        # Figures of each kind, if there are several.
        kind_B = np.array([item.kind for item in items])
        kinds = sorted(set(kind_B.tolist()))
        if len(kinds) > 1:
            for kind in kinds:
                result[kind] = proportion(right_B[kind_B == kind])
        return result

    def right(self, item: Item, answer: Answer) -> bool:
        """Whether an answer is right."""
        example: SceneExample = item.truth
        if self.answers_in == "text":
            return self._text_right(example, answer.text)
        assert answer.image_HWC is not None
        found = parse(answer.image_HWC, self.config.world)
        return self._image_right(example, found, answer.image_HWC.shape[0])

    def _text_right(self, example: SceneExample, text: str) -> bool:
        """Whether a text is the right answer."""
        if self.config.task in ("caption", "paragraph"):
            return caption_right(text, example.shows)
        wanted = str(example.values["answer"])
        # Steps end in the answer, as in "the answer is (B)", or it stands alone.
        if self.config.task in ("reasoning", "relation_steps"):
            return text.rstrip(". ").split(" ")[-1] == wanted.rstrip(". ").split(" ")[-1]
        return text.strip(" .").lower() == wanted.lower()

    def _image_right(self, example: SceneExample, found: Scene, side: int) -> bool:
        """Whether the scene found in an image is the right one."""
        task, shown = self.config.task, example.shows
        if task == "edit":
            return edited(shown, found)
        if task == "write":
            words = [thing.word for thing in found.things if thing.kind == "word"]
            return words == example.values["text"].split()
        if task == "grounded":
            asked, seen = _boxes(shown, side), _boxes(found, side)
            return len(asked) == len(seen) and all(boxes_met(asked, seen))
        # A caption of several things does not say where each is; a feature image does.
        placed = task in FEATURES or len(shown.things) == 1
        return shows(shown, found, ("colour", "shape", "place") if placed else ("colour", "shape"))


def _steps(answer: str) -> tuple[str, str]:
    """The two places and the relation that an answer in steps says; empty if it says none."""
    places, _, rest = answer.strip().partition(", so ")
    relation, _, _ = rest.rpartition(": ")
    return places, relation


def _boxes(scene: Scene, side: int) -> list[tuple[str, tuple[float, float, float, float]]]:
    """The things of a scene with their names and boxes."""
    return [
        (short_name(thing), box)
        for thing, box in zip(scene.things, boxes(scene, side), strict=True)
    ]


@PROTOCOLS.register("scene_compositions")
class SceneCompositions(Protocol):
    """Prompts of GenEval's six kinds about shapes, and the mean over kinds of the share of right
    images."""

    answers_in = "image"
    has_truth = False

    @dataclass(kw_only=True)
    class Config:
        """The world, and the prompts."""

        world: World = field(default_factory=World)
        """What scenes hold."""
        count: PositiveInt = 100
        """Number of prompts of each kind."""
        seed: Seed = 0
        """Seed for drawing the prompts."""

    def items(self) -> list[Item]:
        config = self.config
        items: list[Item] = []
        for tag in TAGS:
            prompts = compositions(config.world, tag, config.count, config.seed)
            for number, prompt in enumerate(prompts):
                id_ = f"{tag}-{number}"
                document = Document(id_, (TextSegment(prompt.text),))
                items.append(Item(id_, "text_to_image", document, prompt.right, tag))
        return items

    def right(self, item: Item, answer: Answer) -> bool:
        """Whether an image shows what its prompt asks for."""
        ask: Callable[[Scene], bool] = item.truth
        assert answer.image_HWC is not None
        return ask(parse(answer.image_HWC, self.config.world))

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        right_B = np.array(
            [self.right(item, answer) for item, answer in zip(items, answers, strict=True)]
        )
        kind_B = np.array([item.kind for item in items])
        right_by_tag = {tag: right_B[kind_B == tag] for tag in TAGS}
        mean = composition_score({tag: list(right) for tag, right in right_by_tag.items()})

        # The six shares are independent and weigh the same, so the variance of their mean is a 36th
        # of the sum of theirs.
        variances = [right.var() / len(right) for right in right_by_tag.values()]
        half = 1.96 * float(np.sqrt(sum(variances))) / 6
        whole = Measured(mean, max(0.0, mean - half), min(1.0, mean + half), len(items))
        figures = {"mean of six kinds": whole}
        for tag, right in right_by_tag.items():
            figures[tag] = proportion(right)
        return figures


@PROTOCOLS.register("scene_entities")
class SceneEntities(Protocol):
    """Named entities, asked for on backgrounds: whether the image shows the entity that was
    named."""

    answers_in = "image"

    @dataclass(kw_only=True)
    class Config:
        """Which entities are asked for, and how."""

        first: NonNegativeInt = 0
        """Number of the first entity."""
        count: PositiveInt = 200
        """Number of entities, each asked for once."""
        known: PositiveInt
        """Number of entities in the whole world, among which the one in the image is looked for."""
        backgrounds: list[str] = field(default_factory=lambda: list(BACKGROUNDS))
        """Backgrounds on which they are asked for, in turn."""
        side: PositiveInt = 32
        """Side of a picture, in pixels."""

        def check(self) -> None:
            World(backgrounds=self.backgrounds).check()
            if self.first + self.count > self.known:
                raise UserError(
                    f"protocol.known is {self.known}; it must be at least first + count"
                )

    config: Config

    def items(self) -> list[Item]:
        config = self.config
        items = []
        for number in range(config.first, config.first + config.count):
            background = config.backgrounds[number % len(config.backgrounds)]
            document = entity_document(number, background, config.side)
            items.append(
                Item(document.id, "text_to_image", document, entity_scene(number, background))
            )
        return items

    def right(self, item: Item, answer: Answer) -> bool:
        """Whether an image shows the entity that was asked for; the background counts apart."""
        return self._found(answer).things == item.truth.things

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        recognised, background = [], []
        for item, answer in zip(items, answers, strict=True):
            asked: Scene = item.truth
            seen = self._found(answer)
            recognised.append(asked.things == seen.things)
            background.append(asked.background == seen.background)
        return {
            "recognised": proportion(np.array(recognised)),
            "background": proportion(np.array(background)),
        }

    def _found(self, answer: Answer) -> Scene:
        """The entity and the background that an image shows."""
        assert answer.image_HWC is not None
        return parse(answer.image_HWC, World(entities=self.config.known, entity_share=1.0))
