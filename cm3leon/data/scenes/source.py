"""Scenes as a corpus of captioned pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Literal

from cm3leon.config import NonNegativeInt, PositiveInt
from cm3leon.data.scenes.language import caption, long_caption
from cm3leon.data.scenes.render import picture
from cm3leon.data.scenes.world import World, draw_scene
from cm3leon.data.source import Skipped, Source
from cm3leon.registry import SOURCES
from cm3leon.types import Document, ImageSegment, TextSegment, UserError

VERSION = 1
"""Raised when the same seed starts to give another picture or caption."""
CHUNK = 1000
"""Scenes of a part."""


@SOURCES.register("scenes")
class ScenesSource(Source):
    """Pictures of coloured shapes, words, figures and named entities, drawn by seed, with captions that are true.

    Scene n of a corpus is that of the seed `first` + n, whatever is drawn besides it.
    """

    @dataclass(kw_only=True)
    class Config:
        """Which scenes, and how they are captioned."""

        world: World = field(default_factory=World)
        """What scenes hold."""
        count: PositiveInt = 10_000
        """Scenes of the corpus."""
        first: NonNegativeInt = 0
        """Seed of the first one."""
        side: PositiveInt = 64
        """Pixels of a picture's side."""
        captions: Literal["short", "long", "both"] = "short"
        """short: what is there, a single thing with its place. long: everything. both: half each."""

        def check(self) -> None:
            self.world.check()
            if self.side < 24:
                raise UserError(f"side is {self.side}; things are told apart from 24 pixels on")

    config: Config

    def __init__(self, config: Config) -> None:
        self.config = config

    def parts(self) -> list[str]:
        return [str(start) for start in range(0, self.config.count, CHUNK)]

    def read(self, part: str, start: int = 0) -> Iterator[Document | Skipped]:
        first = int(part)
        for number in range(first + start, min(first + CHUNK, self.config.count)):
            yield self.document(self.config.first + number)

    def document(self, seed: int) -> Document:
        """The scene of a seed: its caption, then its picture."""
        scene, rng = draw_scene(self.config.world, seed), Random(f"caption {seed}")
        kind = self.config.captions
        is_long = kind == "long" or (kind == "both" and rng.random() < 0.5)
        text = long_caption(scene) if is_long else caption(scene, rng)
        return Document(f"scene-{seed:08d}", (TextSegment(text), ImageSegment(picture(scene, self.config.side))))

    def fingerprint(self) -> str:
        settings = json.dumps([VERSION, asdict(self.config)], sort_keys=True)
        return f"scenes {hashlib.sha256(settings.encode()).hexdigest()[:16]}"
