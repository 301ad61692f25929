"""Any folder of captioned images.

    images/captions.jsonl       {"file": "a/1.jpg", "caption": "a dog"}
    images/a/1.jpg              "a dog", from the table
    images/a/1.txt              not read: a table goes before a text beside the image
    images/a/2.jpg              the caption that 2.txt holds
    images/a/2.txt
    images/a/3.jpg              left out: no caption

Names are relative to `data.path`; tables and texts beside images may be mixed.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Annotated, Any
from unicodedata import normalize

from cm3leon.config import Location
from cm3leon.data.fields import (
    IMAGE_KEYS,
    PairConfig,
    find_image,
    find_text,
    first_text,
    image_path,
    under,
)
from cm3leon.data.file_source import (
    UNREADABLE,
    BadRecord,
    FileSource,
    Record,
    fingerprint,
    json_lines,
    parse_object,
)
from cm3leon.data.files import is_utf8, spellings
from cm3leon.data.images import READABLE, SUFFIXES, UnusableImage, read_limited
from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES
from cm3leon.types import UserError

TABLES = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
"""Files that hold the captions of the images in their folder and below."""
UNUSED = "unused captions"
"""The part that lists captions of images that do not exist."""
CHUNK = 1000
"""Images per part."""
_READABLE = tuple(ending for endings in READABLE.values() for ending in endings)


@dataclass(frozen=True)
class _Folder:
    """The contents of a folder: names of images and tables, captions by image, and what cannot be
    used."""

    images: list[str]
    tables: list[str]
    texts: dict[str, str] = field(default_factory=dict)
    """Names of the `.txt` files, by all names under which they may be looked up."""
    captions: dict[str, str] = field(default_factory=dict)
    bad_lines: dict[str, list[Skipped]] = field(default_factory=dict)
    """Lines that cannot be used, by table."""
    unused: list[Skipped] = field(default_factory=list)
    """Captions of images that do not exist."""
    sharing: Counter[str] = field(default_factory=Counter)
    """How many readable images have the same name without its ending."""
    left_out: list[Skipped] = field(default_factory=list)


@SOURCES.register("folder")
class FolderSource(FileSource):
    """Images under a folder, with captions in `name.txt` beside each, or in tables of captions.

    A line of captions.jsonl is `{"file": "sub/name.jpg", "caption": "..."}`; metadata.jsonl and
    metadata.csv are those of Hugging Face's imagefolder, with `file_name` and `text`. Other usual
    names of the two (see `fields.py`), or `data.image_key` and `data.text_key`, serve as well. File
    names are relative to the table's folder; upper and lower case of endings, backslashes and
    composed or decomposed accents do not matter.

    Where an image has several captions, a table goes before `name.txt`, a table in a deeper folder
    before one above it, and the first caption in a table before later ones.

    Images that are unreadable, truncated, too large or without a caption are skipped, never fatal.
    So are images that share one `name.txt`, since nothing says which of them it describes. A part
    is a thousand images.
    """

    @dataclass(kw_only=True)
    class Config(PairConfig):
        """Where the images and their captions are."""

        path: Annotated[str | list[str], Location()]
        """The folder, local or a URL; its subfolders are searched too. Several are given as a list
        or with braces."""

    suffixes = (*sorted(SUFFIXES), ".txt", *TABLES)

    def __init__(self, config: Config) -> None:
        try:
            super().__init__(config)
        except UserError as error:
            if isinstance(config.path, str) and "does not exist" in str(error):
                raise self._no_folder(config.path) from error
            raise
        if self.files.is_file:
            raise self._no_folder(self.files.path)
        self._folder: _Folder | None = None

    @staticmethod
    def _no_folder(path: str) -> UserError:
        return UserError(
            f"data.path: {path} is not a folder; give the folder that holds the images"
        )

    def parts(self) -> list[str]:
        self._folder = folder = self._read_folder()
        chunks = [f"images {number}" for number in range(-(-len(folder.images) // CHUNK))]
        parts = [*folder.tables, *chunks]
        if folder.tables:
            parts.append(UNUSED)
        if folder.left_out:
            parts.append(UNREADABLE)
        return parts

    def fingerprint(self) -> str:
        return fingerprint(self.files, self.files.list(self.suffixes))

    def records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        folder = self._folder = self._folder or self._read_folder()
        if part in folder.bad_lines:
            yield from folder.bad_lines[part]
        elif part == UNUSED:
            yield from folder.unused
        else:
            first = int(part.removeprefix("images ")) * CHUNK
            for name in folder.images[first : first + CHUNK]:
                yield self._record(name, folder)

    def _record(self, name: str, folder: _Folder) -> Record | Skipped:
        """The record of an image, or why it is skipped."""
        if not is_utf8(name):
            return Skipped(ascii(name), "the file's name is not UTF-8")
        caption = folder.captions.get(name)
        try:
            if caption is None:
                caption = self._caption_beside(name, folder)
        except (FileNotFoundError, PermissionError) as error:
            return Skipped(name, f"unusable caption: {type(error).__name__}")
        except ValueError as error:
            return Skipped(name, str(error))
        return Record(name, (caption, partial(self.files.image, name, self.config.max_file_bytes)))

    def _caption_beside(self, name: str, folder: _Folder) -> str:
        """Read the caption in the `.txt` file of an image.

        Raises:
            ValueError: if there is none, if several images share it, or if it cannot be used.
            OSError: if the file has vanished.
        """
        beside = str(PurePosixPath(name).with_suffix(".txt"))
        text = next(
            (folder.texts[each] for each in _looked_for(beside) if each in folder.texts), None
        )
        if text is None:
            raise ValueError(
                f"no caption: neither {PurePosixPath(beside).name!a} nor a line of "
                f"{', '.join(folder.tables) or TABLES[0]}"
            )
        # 1.jpg and 1.png would both be described by 1.txt.
        if folder.sharing[_stem(name)] > 1:
            raise ValueError(
                f"several images share {PurePosixPath(text).name!a}; name them in {TABLES[0]}"
            )

        try:
            with self.files.open_raw(text) as file:
                content = read_limited(file, self.config.max_file_bytes)
            caption = content.removeprefix(codecs.BOM_UTF8).decode().strip()
            self._check_caption(caption)
        except (ValueError, UnusableImage) as error:
            raise ValueError(f"unusable caption: {error}") from error
        return caption

    def _read_folder(self) -> _Folder:
        """Find images, texts and tables, and read the captions in the tables."""
        listing = self.files.listing(self.suffixes)
        names = [file.name for file in listing.files]
        images = [name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES]
        tables = [name for name in names if PurePosixPath(name).name in TABLES]
        folder = _Folder(images, tables, left_out=listing.left_out)

        # Texts can be looked up by composed accents too, but a name spelled exactly so goes first.
        for name in names:
            if name.lower().endswith(".txt"):
                for each in _looked_for(str(PurePosixPath(name).with_suffix(".txt"))):
                    folder.texts.setdefault(each, name)
        folder.texts.update({name: name for name in names if name.endswith(".txt")})
        folder.sharing.update(_stem(name) for name in images if name.lower().endswith(_READABLE))

        # Likewise images, which tables name.
        known: dict[str, str] = {}
        for name in images:
            for each in _looked_for(name):
                known.setdefault(each, name)
        known.update({name: name for name in images})

        # A caption is set once, so the tables of deeper folders come first.
        for table in sorted(tables, key=lambda name: -name.count("/")):
            folder.bad_lines[table] = list(self._read_table(table, known, folder))
        return folder

    def _read_table(
        self, table: str, known: Mapping[str, str], folder: _Folder
    ) -> Iterator[Skipped]:
        """Take over the captions of a table; yield the lines that cannot be used."""
        here: set[str] = set()
        for number, row in self._rows(table):
            try:
                if isinstance(row, BadRecord):
                    raise row
                written, caption = self._named_caption(row)
            except (BadRecord, ValueError) as error:
                yield Skipped(f"{table}:{number}", f"unusable line: {error}")
                continue

            # An absolute path counts if it lies in the folder; others start at the table's folder.
            if self.files.local and written.startswith(f"{self.files.root}/"):
                paths = [written[len(self.files.root) + 1 :]]
            else:
                paths = [str(PurePosixPath(table).parent / each) for each in spellings(written)]
            looked_for = [each for path in paths for each in _looked_for(path)]
            name = next((known[each] for each in looked_for if each in known), None)

            if name is None:
                reason = f"named in {table}, but there is no such image in the folder"
                folder.unused.append(Skipped(written, reason))
            elif name in here:
                yield Skipped(f"{table}:{number}", "an earlier line has a caption of this image")
            else:
                here.add(name)
                folder.captions.setdefault(name, caption)

    def _named_caption(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """The image's name and the caption in a row. Raises BadRecord or ValueError."""
        found = find_image(row, self.config.image_key)
        if found is None and self.config.image_key is None:
            found = next(under(row, IMAGE_KEYS), None)
        text = find_text(row, self.config.text_key)
        for what, setting, half in (("image", "image_key", found), ("caption", "text_key", text)):
            if half is None:
                keys = ", ".join(map(ascii, list(row)[:5]))
                raise BadRecord(f"no {what} under a usual name or data.{setting}, but {keys}")

        assert found is not None
        assert text is not None
        caption = first_text(text.value)
        self._check_caption(caption)
        return image_path(found), caption

    def _rows(self, table: str) -> Iterator[tuple[int, Mapping[str, Any] | BadRecord]]:
        """Yield the rows of a table with their line numbers, or why one cannot be read."""
        with self.files.open_raw(table) as file:
            if table.endswith(".csv"):
                yield from _csv_rows(file, self.config.max_file_bytes)
                return
            for number, line in json_lines(file, self.config.max_file_bytes):
                try:
                    if line is None:
                        raise BadRecord(f"longer than {self.config.max_file_bytes} bytes")
                    yield number, parse_object(line, "it")
                except BadRecord as error:
                    yield number, error

    def _check_caption(self, caption: Any) -> None:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError("the caption is empty")
        if len(caption.encode()) > self.config.max_caption_bytes:
            raise ValueError(f"the caption is longer than {self.config.max_caption_bytes} bytes")


def _csv_rows(file: Any, max_bytes: int) -> Iterator[tuple[int, Mapping[str, Any] | BadRecord]]:
    """Yield the rows of a CSV file, each by the column names of its first line."""
    before = csv.field_size_limit(min(max_bytes, 2**31 - 1))
    rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    try:
        for row in rows:
            yield rows.line_num, {key: value for key, value in row.items() if key is not None}
    except (csv.Error, UnicodeDecodeError) as error:
        yield rows.line_num + 1, BadRecord(f"the rest is not usable CSV: {error}")
    finally:
        csv.field_size_limit(before)


def _looked_for(name: str) -> list[str]:
    """The spellings under which a file is looked up: as written, and with composed accents."""
    return [name, normalize("NFC", name)] if is_utf8(name) else [name]


def _stem(name: str) -> str:
    """An image's name without its ending, as its caption's file is looked up."""
    return _looked_for(str(PurePosixPath(name).with_suffix("")))[-1]
