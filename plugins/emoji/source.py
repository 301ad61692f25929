"""Drawings as a corpus of pictures with captions, and as instructions to change one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Annotated, Any, get_args

from cm3leon.config import Location, NoEffect, PositiveInt, Range, choices, result_settings
from cm3leon.data.instructions.templates import ROLES, TABLE_5, fill_with_pixels
from cm3leon.data.source import Skipped, Source
from cm3leon.registry import SOURCES
from cm3leon.types import Document, ImageSegment, TextSegment, UserError

from .catalogue import Kind, catalogue
from .drawings import contents, drawings, made_with
from .edits import EmojiEdit, edits
from .splits import Part, groups, parts
from .styles import ATTRIBUTION, OPENMOJI, STYLES, Styles

CHUNK = 1000
"""Documents per part."""
KINDS: tuple[str, ...] = get_args(Kind)
VERSION = 1
"""Increased whenever the same packages and settings give other documents."""

IN_FINGERPRINT = NoEffect("which drawings they are is told by the fingerprint of their files")
"""Of settings that results record by the fingerprint alone, so that those made before there were
styles stay valid."""


def check_kinds(kinds: list[str]) -> None:
    """Check that all kinds exist. Raises UserError."""
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"kinds holds {kind}, which is not known; {choices(kind, KINDS)}")


@dataclass(kw_only=True)
class DrawnAt:
    """The size of the drawings."""

    side: Annotated[int, Range(ge=16, le=1024)] = 32
    """Side of a picture, in pixels."""


@dataclass(kw_only=True)
class DrawnInStyles(DrawnAt):
    """The styles of the drawings."""

    styles: Annotated[list[str], IN_FINGERPRINT] = field(default_factory=lambda: ["openmoji"])
    """Sets of drawings: openmoji, noto, twemoji, fluent. Of several, captions name the style, as in
    `fox, in Noto's style`."""
    node_modules: Annotated[str, Location(), IN_FINGERPRINT] | None = None
    """Folder of the npm packages of twemoji and fluent; null = those where Node looks for them."""
    noto_font: Annotated[str, Location(), IN_FINGERPRINT] | None = None
    """File of the font for noto; null = where Debian's package installs it."""

    def check(self) -> None:
        known = tuple(STYLES)
        for style in self.styles:
            if style not in known:
                raise UserError(
                    f"styles holds {style}, which is not known; {choices(style, known)}"
                )
        if not self.styles or len(set(self.styles)) < len(self.styles):
            raise UserError(
                "styles must name one set of drawings or several, each once, e.g. "
                "styles=[openmoji,noto]"
            )


def styles_of(config: DrawnInStyles) -> Styles:
    """The styles of these settings."""
    styles = Styles(tuple(config.styles), config.node_modules, config.noto_font)
    return styles if styles.are_said else styles.alone(*styles.names)


def attributions_of(config: DrawnInStyles | None) -> list[str]:
    """Whose drawings these are; those of all styles for settings that could not be read."""
    names = tuple(STYLES) if config is None else config.styles
    return [STYLES[name].attribution for name in names]


class EmojiDocuments(Source):
    """Base of the sources of drawings, whose documents are numbered."""

    styles: Styles = OPENMOJI

    def __init__(self, config: Any) -> None:
        self.config = config

    def parts(self) -> list[str]:
        return [str(first) for first in range(0, self.count(), CHUNK)]

    def read(self, part: str, start: int = 0) -> Iterator[Document | Skipped]:
        first = int(part)
        for number in range(first + start, min(first + CHUNK, self.count())):
            yield self.document(number)

    def fingerprint(self) -> str:
        settings = json.dumps(result_settings(self.config), sort_keys=True)
        return f"{type(self).__name__} {VERSION} {made_with(self.styles)} {settings}"

    def count(self) -> int:
        """The number of documents."""
        raise NotImplementedError

    def document(self, number: int) -> Document:
        """The document of a number."""
        raise NotImplementedError


@SOURCES.register("emoji")
class EmojiSource(EmojiDocuments):
    """Drawings of emojis, OpenMoji's by default, with their names as captions, without those that
    are held out (docs/emoji.md)."""

    @dataclass(kw_only=True)
    class Config(DrawnInStyles):
        """Which drawings are read, and how they are captioned."""

        kinds: list[str] = field(default_factory=lambda: list(KINDS))
        """Kinds of drawings: person, gesture, pair, face, clock, flag, sign, object."""
        part: Part = "train"
        """train = everything that is not held out; compositions, objects = what is held out by one
        of the rules in docs/emoji.md."""
        tags: bool = False
        """Whether a caption continues with the kind and other names, as in `thumbs up | gesture,
        +1, like`."""

        def check(self) -> None:
            super().check()
            check_kinds(self.kinds)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.styles = styles_of(config)
        self._numbers: list[int] = []
        of_each = zip(catalogue(self.styles), parts(self.styles), strict=True)
        for number, (emoji, part) in enumerate(of_each):
            if emoji.kind in config.kinds and part == config.part:
                self._numbers.append(number)

    @classmethod
    def attributions(cls, config: Any) -> Sequence[str]:
        return attributions_of(config)

    def count(self) -> int:
        return len(self._numbers)

    def document(self, number: int) -> Document:
        drawing = self._numbers[number]
        emoji = catalogue(self.styles)[drawing]
        caption = emoji.caption
        if self.config.tags:
            caption += f" | {', '.join((emoji.kind, *emoji.tags))}"
        image_HWC = drawings(self.config.side, self.styles)[drawing]
        segments = (TextSegment(caption), ImageSegment(image_HWC))
        return Document(emoji.id, segments, group=groups(self.styles)[emoji.code])


@SOURCES.register("emoji_edits")
class EmojiEditsSource(EmojiDocuments):
    """Instructions to change a drawing: to another skin tone, another gender, or another time on a
    clock face."""

    @dataclass(kw_only=True)
    class Config(DrawnAt):
        """How many edits, at which size."""

        count: PositiveInt | None = None
        """Number of edits, from an order drawn by hash; null = all."""

    config: Config

    @classmethod
    def task_of(cls, config: Any) -> str | None:
        return "edit"

    @classmethod
    def attributions(cls, config: Any) -> Sequence[str]:
        return [ATTRIBUTION]

    def count(self) -> int:
        there = len(edits(held_out=False))
        if self.config.count is None:
            return there
        return min(there, self.config.count)

    def document(self, number: int) -> Document:
        return edit_document(edits(held_out=False)[number], self.config.side)


def edit_document(edit: EmojiEdit, side: int) -> Document:
    """An edit in the paper's template: the drawing, the instruction, and the drawing that is asked
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
