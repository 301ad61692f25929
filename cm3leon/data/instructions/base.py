"""What a source of instructions is: examples with slots, which templates turn into documents."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Annotated, Any

from cm3leon.config import Location, Seed
from cm3leon.data.ahead import MAX_AHEAD, worked_ahead
from cm3leon.data.file_source import (
    BadRecord,
    FilesConfig,
    FileSource,
    Record,
    caption_text,
    fingerprint,
    id_key,
    page_text,
)
from cm3leon.data.files import CUT_STREAM, Files
from cm3leon.data.images import UnusableImage
from cm3leon.data.instructions.templates import (
    ROLES,
    TABLE_5,
    check_templates,
    fill,
    picture_of,
)
from cm3leon.data.source import Skipped
from cm3leon.types import Document, UserError

CHUNK = 1000
"""Examples of a part."""


@dataclass(frozen=True, eq=False)
class Example:
    """Values of the slots of a task's templates: texts, and for images the functions that give
    their files."""

    id: str
    values: Mapping[str, Any]
    truth: tuple[str, ...] = ()
    """For evaluation: all answers or captions that people gave, or the options that there are."""
    group: str = ""
    """Examples of one group are asked about once; empty = alone."""


def _group(example: Example) -> str:
    return example.group or example.id


@dataclass(kw_only=True)
class InstructionConfig(FilesConfig):
    """What all sources of instructions have."""

    images: Annotated[str, Location()] = ""
    """Folder of the images, local or a URL; empty = beside the file."""
    templates: list[str] | None = None
    """One of them is drawn for each example; null = the paper's."""
    seed: Seed = 0
    """Seed of the draw of templates, and of what else is drawn."""


class InstructionSource(FileSource):
    """A published file, and the folder of its images, as documents by the templates of a task.

    A subclass lists its entries and makes the example of one; parts are a thousand entries each.
    """

    task: str
    """Which of `TABLE_5`."""
    suffixes = (".json",)
    images_apart = True
    more_files: tuple[str, ...] = ()
    """Fields of the config that name further files of what is listed."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.templates = list(TABLE_5[self.task] if config.templates is None else config.templates)
        check_templates(self.task, self.templates)
        self._images = Files(config.images, "data.images") if config.images else self.files
        self._entries: list[Any] | None = None

    @classmethod
    def task_of(cls, config: Any) -> str | None:
        return cls.task

    @abstractmethod
    def entries(self) -> list[Any]:
        """What the files list, in their order. Raises UserError for files of another form."""

    @abstractmethod
    def example(self, entry: Any, rng: Random) -> Example:
        """The example of an entry. Raises BadRecord for one that is not usable."""

    def parts(self) -> list[str]:
        if self._entries is None:
            self._entries = self.entries()
        if not self._entries:
            raise UserError(f"data.path: {self.config.path} lists no examples")
        return [str(number) for number in range(-(-len(self._entries) // CHUNK))]

    def fingerprint(self) -> str:
        held = [self.task, json.dumps(self.templates), super().fingerprint()]
        for name in self.more_files:
            if path := getattr(self.config, name):
                files = Files(path, f"data.{name}")
                held.append(fingerprint(files, files.list((".json", ".csv"))))
        return " ".join(held)

    def records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        for found in self._examples(int(part) * CHUNK, CHUNK):
            yield found if isinstance(found, Skipped) else found[0]

    def asked(self, *, size: int | None = None) -> Iterator[tuple[Document, Example] | Skipped]:
        """One document of each group, with its example: what an evaluation asks about.

        Images are brought to `size` as they are read, see `read_squared`; None leaves them in their
        own size.
        """
        self.parts()
        # The first example of a group is decoded ahead; the others are only if it turns out to be
        # unusable.
        begun: set[str] = set()

        def examples() -> Iterator[tuple[bool, tuple[Record, Example] | Skipped]]:
            for found in self._examples(0, len(self._entries or [])):
                key = "" if isinstance(found, Skipped) else _group(found[1])
                yield key not in begun, found
                begun.add(key)

        def decoded(given: tuple[bool, tuple[Record, Example] | Skipped]) -> Any:
            first, found = given
            if isinstance(found, Skipped):
                return found, None
            return found, self._decoded(found[0], size) if first else None

        known: set[str] = set()
        # Photographs that are not brought to a size are not held.
        for found, document in worked_ahead(examples(), decoded, most=MAX_AHEAD if size else 1):
            if isinstance(found, Skipped):
                yield found
                continue
            record, example = found
            if _group(example) in known:
                continue
            document = document or self._decoded(record, size)
            if isinstance(document, Document):
                known.add(_group(example))
            yield document if isinstance(document, Skipped) else (document, example)

    def _examples(self, first: int, count: int) -> Iterator[tuple[Record, Example] | Skipped]:
        self.parts()
        for number, entry in enumerate((self._entries or [])[first : first + count], first):
            rng = Random(f"{self.config.seed} {number}")
            try:
                example = self.example(entry, rng)
            except (BadRecord, UnusableImage) as error:
                yield Skipped(f"{self.config.path}:{number}", str(error))
                continue
            template = self.templates[int(rng.random() * len(self.templates))]
            segments = fill(template, example.values, ROLES[self.task])
            picture = picture_of(template, example.values)
            yield Record(example.id, segments, picture=picture), example

    # -------------------------------------------------------------------------------------------- parts

    def image(self, name: Any) -> Any:
        """The function that reads an image's file. Raises BadRecord for what is no name of one."""
        if not isinstance(name, str) or not name:
            raise BadRecord(f"no name of an image: {name!r}")
        return partial(self._images.image, name, self.config.max_file_bytes)

    def words(self, text: Any, what: str) -> str:
        """A text that is not empty, without spaces around it. Raises BadRecord for anything
        else."""
        return caption_text(page_text(text, what), self.config.max_caption_bytes).strip()


def read_json(files: Files, where: str) -> Any:
    """The content of the one JSON file at a path. Raises UserError for anything else."""
    listed = files.list((".json",))
    if len(listed) != 1:
        raise UserError(f"{where}: {files.path} is {len(listed)} files; give one JSON file")
    try:
        with files.open(listed[0].name) as file:
            return json.load(file)
    except (ValueError, RecursionError, *CUT_STREAM) as error:
        raise UserError(f"{where}: {files.path} is not usable JSON: {error}") from error


def listed(content: Any, key: str, path: str, what: str) -> list[Any]:
    """The list under a key of a JSON object. Raises UserError, naming what the file should be."""
    found = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(found, list):
        raise UserError(f"{path} has no list under {key}; give {what}")
    return found


def check_image_name(template: str, image_id: int | str) -> None:
    """Raises UserError for a template of images' names with other slots than {image_id}."""
    try:
        template.format(image_id=image_id)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"image_name is {template!r}; its only slot is {{image_id}}") from error


def integer(value: Any, what: str) -> int:
    """A whole number, which may be written as a text. Raises BadRecord for anything else."""
    number = id_key(value)
    if not isinstance(number, int):
        raise BadRecord(f"{what} is no whole number: {value!r}")
    return number
