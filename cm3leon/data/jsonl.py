"""Documents as lines of JSON.

    a line                                                     its document
    {"text": "a dog", "image": "7.jpg"}                        "a dog", 7.jpg
    {"text": "a dog"}                                          "a dog"
    {"segments": [{"text": "a"}, {"image": "7.jpg"}]}          a page: "a", 7.jpg
    {"image": "7.jpg", "conversations":                        a page: 7.jpg, "what is it?\\na dog"
        [{"from": "human", "value": "<image> what is it?"},
         {"from": "gpt", "value": "a dog"}]}

How a text and an image are found in a line is told in `fields.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from cm3leon.config import Location
from cm3leon.data.fields import (
    Found,
    PairConfig,
    check_unread,
    conversation,
    conversation_segments,
    find_image,
    find_text,
    first_text,
    image_path,
    image_paths,
)
from cm3leon.data.file_source import (
    BadRecord,
    FilesConfig,
    FileSource,
    Record,
    caption_text,
    interleaved,
    json_lines,
    page_text,
    parse_object,
)
from cm3leon.data.files import CUT_STREAM, Files
from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES


class LinesSource(FileSource):
    """Files of JSON objects, one per line, of which a subclass makes records. Blank lines do not
    count."""

    suffixes = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")

    @abstractmethod
    def record(self, content: dict[str, Any], id_: str, part: str) -> Record:
        """Make the record of a line. Raises BadRecord for an unusable one."""

    def records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        with self.files.open(part) as file:
            lines = json_lines(file, self.config.max_file_bytes)
            try:
                for number, line in lines:
                    yield self._record(line, number, part)
            except CUT_STREAM as error:
                yield Skipped(part, f"the file ends early: {type(error).__name__}: {error}")

    def _record(self, line: bytes | None, number: int, part: str) -> Record | Skipped:
        """Parse a line and make its record, or say why it is skipped."""
        if line is None:
            return Skipped(
                f"{part}:{number}", f"the line is longer than {self.config.max_file_bytes} bytes"
            )
        try:
            content = parse_object(line, "the line")
            key = content.get("id")
            id_ = number if key is None else page_text(str(key), "the id")
            return self.record(content, f"{part}/{id_}", part)
        except BadRecord as error:
            return Skipped(f"{part}:{number}", str(error))


@SOURCES.register("jsonl")
class JsonlSource(LinesSource):
    """Lines of JSON, each a document of text, of a caption and an image, or of both in any order.

    `{"id": "7", "text": "...", "image": "images/7.jpg"}` is a caption and its image; either may be
    missing. Both are found under their usual names (see `fields.py`), or under `data.text_key` and
    `data.image_key`. Of a list of captions the first is used. A page is written as `{"segments":
    [{"text": "..."}, {"image": "images/7.jpg"}]}`, or as `{"image": "7.jpg", "conversations":
    [{"from": "human", "value": "<image> ..."}, ...]}`. A line without an `id` is named by its
    number.
    """

    @dataclass(kw_only=True)
    class Config(PairConfig):
        """Where the lines and the images are."""

        images: Annotated[str, Location()] | None = None
        """Folder or URL that the images' paths are relative to; null = the folder of each file."""

    images_apart = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._images = Files(config.images, "data.images") if config.images else None

    def record(self, content: dict[str, Any], id_: str, part: str) -> Record:

        # A page says itself where its texts and images stand.
        load = partial(self._image, part)
        if "segments" in content:
            return Record(id_, interleaved(content["segments"], load))

        # A conversation is a page, too, with images where its turns have placeholders.
        image = find_image(content, self.config.image_key)
        turns = conversation(content) if self.config.text_key is None else None
        if turns is not None:
            check_unread(content, Found("conversation", turns), image, self.config)
            segments = conversation_segments(turns, image_paths(image) if image else [])
            return Record(id_, interleaved(segments, load))

        # Everything else is a caption and an image, or one of them.
        text = find_text(content, self.config.text_key)
        check_unread(content, text, image, self.config)
        if image is None:
            if text is None:
                keys = ", ".join(map(ascii, list(content)[:5]))
                held = f", but {keys}" if content else ""
                raise BadRecord(f"the line has none of text, image and segments{held}")
            return Record(id_, interleaved([{"text": first_text(text.value)}], load))
        if text is None:
            return Record(id_, (load(image_path(image)),))
        caption = caption_text(page_text(first_text(text.value)), self.config.max_caption_bytes)
        return Record(id_, (caption, load(image_path(image))))

    def _image(self, part: str, name: str) -> Any:
        """The function that reads an image's file; the name may not leave the folder."""
        if self._images:
            return partial(self._images.image, name, self.config.max_file_bytes)
        return partial(self.files.image, name, self.config.max_file_bytes, beside=part)


@SOURCES.register("text_jsonl")
class TextJsonlSource(LinesSource):
    """Lines of JSON, each a document of text: `{"text": "..."}`."""

    @dataclass(kw_only=True)
    class Config(FilesConfig):
        """Where the lines are."""

        field: str = "text"
        """Key of the text in each line."""

    def record(self, content: dict[str, Any], id_: str, part: str) -> Record:
        if self.config.field not in content:
            raise BadRecord(
                f"the line has no {self.config.field}, but "
                f"{', '.join(map(ascii, list(content)[:5]))}"
            )
        text = page_text(content[self.config.field])
        if not text.strip():
            raise BadRecord("the text is empty")
        return Record(id_, (text,))
