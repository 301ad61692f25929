"""Drawings as a corpus of captioned pictures, and as instructions to change one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Annotated, Any, get_args

from cm3leon.config import PositiveInt, Range, choices
from cm3leon.data.instructions.templates import ROLES, TABLE_5, fill_with_pixels
from cm3leon.data.source import Skipped, Source
from cm3leon.registry import SOURCES
from cm3leon.types import Document, ImageSegment, TextSegment, UserError

from .catalogue import ATTRIBUTION, Kind, catalogue
from .drawings import contents, drawings, made_with
from .edits import EmojiEdit, edits
from .splits import Part, parts

CHUNK = 1000
"""Documents of a part."""
KINDS: tuple[str, ...] = get_args(Kind)
VERSION = 1
"""Raised when the same packages and settings give other documents."""


def check_kinds(kinds: list[str]) -> None:
    """Raise UserError for a kind that is none."""
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"kinds holds {kind}; {choices(kind, KINDS)}")


@dataclass(kw_only=True)
class DrawnAt:
    """How drawings are drawn."""

    side: Annotated[int, Range(ge=16, le=1024)] = 32
    """Pixels of a picture's side."""


class EmojiDocuments(Source):
    """Base of the sources of drawings: numbered documents."""

    attribution = ATTRIBUTION

    def __init__(self, config: Any) -> None:
        self.config = config

    def parts(self) -> list[str]:
        return [str(first) for first in range(0, self.count(), CHUNK)]

    def read(self, part: str, start: int = 0) -> Iterator[Document | Skipped]:
        first = int(part)
        for number in range(first + start, min(first + CHUNK, self.count())):
            yield self.document(number)

    def fingerprint(self) -> str:
        settings = json.dumps(asdict(self.config), sort_keys=True)
        return f"{type(self).__name__} {VERSION} {made_with()} {settings}"

    def count(self) -> int:
        """How many documents there are."""
        raise NotImplementedError

    def document(self, number: int) -> Document:
        """One of them."""
        raise NotImplementedError


@SOURCES.register("emoji")
class EmojiSource(EmojiDocuments):
    """OpenMoji's drawings with their names as captions, but for those that are held out
    (docs/emoji.md)."""

    @dataclass(kw_only=True)
    class Config(DrawnAt):
        """Which drawings, and how they are captioned."""

        kinds: list[str] = field(default_factory=lambda: list(KINDS))
        """person, gesture, pair, face, clock, flag, sign, object."""
        part: Part = "train"
        """train: all that is not held out. compositions, objects: what is, by the rules of the
        documentation."""
        tags: bool = False
        """Whether a caption goes on with the kind and other names: `thumbs up | gesture, +1,
        like`."""

        def check(self) -> None:
            check_kinds(self.kinds)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._numbers = [
            number
            for number, (emoji, part) in enumerate(zip(catalogue(), parts(), strict=True))
            if emoji.kind in config.kinds and part == config.part
        ]

    def count(self) -> int:
        return len(self._numbers)

    def document(self, number: int) -> Document:
        drawing = self._numbers[number]
        emoji = catalogue()[drawing]
        caption = emoji.caption
        if self.config.tags:
            caption += f" | {', '.join((emoji.kind, *emoji.tags))}"
        image_HWC = drawings(self.config.side)[drawing]
        return Document(
            emoji.code, (TextSegment(caption), ImageSegment(image_HWC)), group=contents()[drawing]
        )


@SOURCES.register("emoji_edits")
class EmojiEditsSource(EmojiDocuments):
    """Instructions to change a drawing: to another skin tone, another gender, another time on a
    clock face."""

    @dataclass(kw_only=True)
    class Config(DrawnAt):
        """How many of them."""

        count: PositiveInt | None = None
        """Edits, the first of an order drawn by hash; null = all."""

    config: Config

    @classmethod
    def task_of(cls, config: Any) -> str | None:
        return "edit"

    def count(self) -> int:
        there = len(edits(held_out=False))
        return there if self.config.count is None else min(there, self.config.count)

    def document(self, number: int) -> Document:
        return edit_document(edits(held_out=False)[number], self.config.side)


def edit_document(edit: EmojiEdit, side: int) -> Document:
    """An edit by a template of the paper's: the drawing, the instruction, the drawing that is asked
    for."""
    images_MHWC = drawings(side)
    values = {
        "instruction": edit.instruction,
        "image1": images_MHWC[edit.before],
        "image2": images_MHWC[edit.after],
    }
    template = Random(edit.id).choice(TABLE_5["edit"])
    return Document(
        edit.id, fill_with_pixels(template, values, ROLES["edit"]), group=contents()[edit.after]
    )
