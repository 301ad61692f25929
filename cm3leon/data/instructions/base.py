"""The base of sources of instructions: examples with slots, which templates turn into documents.

    an entry of the file    {"question": "What is it?", "answer": "a dog", "image_id": 7}
    its example             question = "What is it?", answer = "a dog", image = <reads 7.jpg>
    a template, drawn       "Question: {question} Answer: {answer}. | {image}"
    the document            "Question: What is it? Answer: a dog." <break> 7.jpg

A subclass only reads the entries and makes the example of one.
"""

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
"""Examples per part."""


@dataclass(frozen=True, eq=False)
class Example:
    """The values of the slots of a task's templates: texts, and for images the functions that read
    their files."""

    id: str
    values: Mapping[str, Any]
    truth: tuple[str, ...] = ()
    """For evaluation: all answers or captions given by people, or the options of a question."""
    group: str = ""
    """Of the examples of a group only one is asked about; empty = a group of its own."""


def _group(example: Example) -> str:
    """The name of an example's group."""
    return example.group or example.id


@dataclass(kw_only=True)
class InstructionConfig(FilesConfig):
    """The settings of all sources of instructions."""

    images: Annotated[str, Location()] = ""
    """Folder of the images, local or a URL; empty = the folder of the file."""
    templates: list[str] | None = None
    """Templates, of which one is drawn for each example; null = the paper's."""
    seed: Seed = 0
    """Seed for drawing templates, and whatever else is drawn."""


class InstructionSource(FileSource):
    """A published file and the folder of its images, as documents by the templates of a task.

    A subclass lists the file's entries and makes the example of one. A part is a thousand entries.
    """

    task: str
    """The task, a key of `TABLE_5`."""
    suffixes = (".json",)
    images_apart = True
    more_files: tuple[str, ...] = ()
    """Settings that name further files, which count in the fingerprint."""

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
        """List the files' entries, in order. Raises UserError for files of another format."""

    @abstractmethod
    def example(self, entry: Any, rng: Random) -> Example:
        """Make the example of an entry. Raises BadRecord for an unusable one."""

    def parts(self) -> list[str]:
        if self._entries is None:
            self._entries = self.entries()
        if not self._entries:
            raise UserError(
                f"data.path: {self.config.path} has no entries; give the file of the data set, "
                "with at least one"
            )
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
            if isinstance(found, Skipped):
                yield found
            else:
                yield found[0]

    def asked(self, *, size: int | None = None) -> Iterator[tuple[Document, Example] | Skipped]:
        """Yield one document of each group with its example: what an evaluation asks about.

        Images are brought to `size` as they are read (see `read_squared`); None leaves them in
        their own size.
        """
        self.parts()
        # Only the first example of each group is decoded ahead. Another one is needed only if the
        # first turns out to be unusable.
        begun: set[str] = set()

        def examples() -> Iterator[tuple[bool, tuple[Record, Example] | Skipped]]:
            for found in self._examples(0, len(self._entries or [])):
                key = ""
                if not isinstance(found, Skipped):
                    key = _group(found[1])
                yield key not in begun, found
                begun.add(key)

        def decoded(given: tuple[bool, tuple[Record, Example] | Skipped]) -> Any:
            first, found = given
            if isinstance(found, Skipped):
                return found, None
            return found, self._decoded(found[0], size) if first else None

        known: set[str] = set()
        # Photographs in their own size are large, so that only one is decoded ahead.
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
                yield document, example
            else:
                yield document

    def _examples(self, first: int, count: int) -> Iterator[tuple[Record, Example] | Skipped]:
        """Yield the records of some entries with their examples, or why they are left out."""
        self.parts()
        for number, entry in enumerate((self._entries or [])[first : first + count], first):
            # Each entry has draws of its own, whatever part it is read with.
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

    # ---------------------------------------------------------------------------- for subclasses

    def image(self, name: Any) -> Any:
        """The function that reads an image's file. Raises BadRecord for anything but a name."""
        if not isinstance(name, str) or not name:
            raise BadRecord(f"no name of an image: {name!r}")
        return partial(self._images.image, name, self.config.max_file_bytes)

    def words(self, text: Any, what: str) -> str:
        """A text without surrounding spaces. Raises BadRecord for one that is empty, or no text."""
        return caption_text(page_text(text, what), self.config.max_caption_bytes).strip()


def read_json(files: Files, where: str) -> Any:
    """Read the only JSON file at a path. Raises UserError for anything else."""
    listed = files.list((".json",))
    if len(listed) != 1:
        raise UserError(f"{where}: {files.path} is {len(listed)} files; give one JSON file")
    try:
        with files.open(listed[0].name) as file:
            return json.load(file)
    except (ValueError, RecursionError, *CUT_STREAM) as error:
        raise UserError(f"{where}: {files.path} is not usable JSON: {error}") from error


def listed(content: Any, key: str, path: str, what: str) -> list[Any]:
    """The list under a key of a JSON object. Raises UserError saying which file to give instead."""
    found = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(found, list):
        raise UserError(f"{path} has no list under {key}; give {what}")
    return found


def check_image_name(template: str, image_id: int | str) -> None:
    """Check that {image_id} is the only slot of a template for names. Raises UserError."""
    try:
        template.format(image_id=image_id)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"image_name is {template!r}; its only slot is {{image_id}}, as in {{image_id}}.jpg"
        ) from error


def integer(value: Any, what: str) -> int:
    """A whole number, which may be written as a string. Raises BadRecord for anything else."""
    number = id_key(value)
    if not isinstance(number, int):
        raise BadRecord(f"{what} is no whole number: {value!r}")
    return number
