"""Scenes as a corpus of pictures with captions."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Annotated, Any, Literal

from cm3leon.config import NonNegativeInt, PositiveInt, Range
from cm3leon.data.source import Skipped, Source
from cm3leon.io import digest_of
from cm3leon.registry import SOURCES
from cm3leon.types import Document, ImageSegment, TextSegment, UserError

from .language import caption, long_caption
from .render import picture
from .world import BACKGROUNDS, Scene, Thing, World, draw_scene

CHUNK = 1000
"""Scenes per part."""
ELSEWHERE = 2**40
"""What is added to a seed for the scene whose caption a picture wrongly has: more than any corpus
reaches."""


@dataclass(kw_only=True)
class DrawnConfig:
    """Which scenes a corpus is about."""

    world: World = field(default_factory=World)
    """What scenes hold."""
    count: PositiveInt = 10_000
    """Number of scenes."""
    first: NonNegativeInt = 0
    """Seed of the first scene."""
    side: PositiveInt = 64
    """Side of a picture, in pixels."""

    def check(self) -> None:
        self.world.check()
        if self.side < 24:
            raise UserError(
                f"side is {self.side}; it must be at least 24 pixels, or things cannot be told "
                "apart"
            )


class DrawnSource(Source):
    """Base of the sources about scenes: document n is about the scene of the seed `first` + n."""

    version: int
    """Increased whenever the same seed starts to give another document."""
    config: Any

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def document(self, seed: int) -> Document | Skipped:
        """The document about the scene of a seed."""

    def parts(self) -> list[str]:
        return [str(start) for start in range(0, self.config.count, CHUNK)]

    def read(self, part: str, start: int = 0) -> Iterator[Document | Skipped]:
        first = int(part)
        for number in range(first + start, min(first + CHUNK, self.config.count)):
            yield self.document(self.config.first + number)

    def fingerprint(self) -> str:
        return self._digest(asdict(self.config))

    def _digest(self, settings: dict[str, Any]) -> str:
        text = json.dumps([type(self).__name__, self.version, settings], sort_keys=True)
        return f"scenes {digest_of(text)[:16]}"


@SOURCES.register("scenes")
class ScenesSource(DrawnSource):
    """Pictures of coloured shapes, words, figures and named entities, drawn by seed, with
    captions."""

    version = 1

    @dataclass(kw_only=True)
    class Config(DrawnConfig):
        """Which scenes are drawn, and how they are captioned."""

        captions: Literal["short", "long", "both"] = "short"
        """short = what is there, and where a single thing is; long = everything; both = half of the
        captions each."""
        wrong: Annotated[float, Range(ge=0, le=1)] = 0.0
        """Share of pictures that have the caption of another scene, as some pictures on the web
        do."""

    config: Config

    def fingerprint(self) -> str:
        # With true captions, the fingerprint is the one from before captions could be wrong.
        settings = {name: value for name, value in asdict(self.config).items() if name != "wrong"}
        truth = f", {self.config.wrong} of the captions wrong" if self.config.wrong else ""
        return f"{self._digest(settings)}{truth}"

    def document(self, seed: int) -> Document:
        """The document about the scene of a seed: its caption, then its picture."""
        scene, rng = draw_scene(self.config.world, seed), Random(f"caption {seed}")
        described = scene
        if Random(f"wrong {seed}").random() < self.config.wrong:
            described = draw_scene(self.config.world, seed + ELSEWHERE)

        kind = self.config.captions
        is_long = kind == "long" or (kind == "both" and rng.random() < 0.5)
        text = long_caption(described) if is_long else caption(described, rng)
        return Document(
            scene_name(seed), (TextSegment(text), ImageSegment(picture(scene, self.config.side)))
        )


def scene_name(seed: int) -> str:
    """The name of a scene's picture; everything that is asked about the scene falls on the same
    side of a split."""
    return f"scene-{seed:08d}"


@SOURCES.register("scene_entities")
class SceneEntitiesSource(Source):
    """Every one of some named entities on every one of some backgrounds, once: a memory bank."""

    @dataclass(kw_only=True)
    class Config:
        """Which entities are shown, and on which backgrounds."""

        first: NonNegativeInt = 0
        """Number of the first entity."""
        count: PositiveInt = 1000
        """Number of entities."""
        backgrounds: list[str] = field(default_factory=lambda: list(BACKGROUNDS))
        """Backgrounds, on each of which every entity is shown."""
        side: PositiveInt = 32
        """Side of a picture, in pixels."""

        def check(self) -> None:
            World(backgrounds=self.backgrounds).check()

    config: Config

    def __init__(self, config: Config) -> None:
        self.config = config

    def parts(self) -> list[str]:
        return [str(start) for start in range(0, self._documents, CHUNK)]

    def read(self, part: str, start: int = 0) -> Iterator[Document | Skipped]:
        first, backgrounds = int(part), self.config.backgrounds
        for number in range(first + start, min(first + CHUNK, self._documents)):
            entity, background = divmod(number, len(backgrounds))
            yield entity_document(
                self.config.first + entity, backgrounds[background], self.config.side
            )

    def fingerprint(self) -> str:
        return f"scene_entities 1 {json.dumps(asdict(self.config), sort_keys=True)}"

    @property
    def _documents(self) -> int:
        return self.config.count * len(self.config.backgrounds)


def entity_scene(entity: int, background: str) -> Scene:
    """An entity alone on a background."""
    return Scene(background, (Thing("entity", "", "", 0.5, 0.5, entity=entity),))


def entity_document(entity: int, background: str, side: int) -> Document:
    """An entity on a background: its caption, then its picture."""
    scene = entity_scene(entity, background)
    text = caption(scene, Random(0))  # nothing of it is drawn
    return Document(
        f"entity-{entity}-{background}", (TextSegment(text), ImageSegment(picture(scene, side)))
    )
