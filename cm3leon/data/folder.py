"""Any folder of captioned images."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated

from cm3leon.config import Location
from cm3leon.data.files import FilesConfig, FileSource, Record, fingerprint, is_utf8
from cm3leon.data.images import SUFFIXES, read_limited
from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES
from cm3leon.types import UserError

CAPTIONS_FILE = "captions.jsonl"
UNUSED = f"unused lines of {CAPTIONS_FILE}"
CHUNK = 1000
"""Images of a part."""


@dataclass(frozen=True)
class _Listing:
    """Names of the images, the `.txt` files beside them, captions by image, and what is wrong with captions.jsonl."""

    images: list[str]
    texts: frozenset[str]
    captions: dict[str, str]
    bad_lines: list[Skipped]
    has_captions_file: bool


@SOURCES.register("folder")
class FolderSource(FileSource):
    """JPEG, PNG and WebP images under a folder, with captions in `name.txt` beside each or in one `captions.jsonl`.

    A line of captions.jsonl is `{"file": "sub/name.jpg", "caption": "..."}`, the file relative to the folder.
    Images that are unreadable, truncated, too large or without a caption are skipped, never fatal. A part is a
    thousand images.
    """

    @dataclass(kw_only=True)
    class Config(FilesConfig):
        """Where the images are."""

        path: Annotated[str, Location()]
        """The folder, local or a URL; its subfolders are searched too."""

    suffixes = (*sorted(SUFFIXES), ".txt", ".jsonl")

    def __init__(self, config: Config) -> None:
        problem = UserError(
            f"data.path: {config.path} is not a folder; give the folder that holds the images"
        )
        try:
            super().__init__(config)
        except UserError as error:
            raise problem from error
        if self.files.is_file:
            raise problem
        self._listing: _Listing | None = None

    def parts(self) -> list[str]:
        self._listing = listing = self._listed()
        chunks = [f"images {number}" for number in range(-(-len(listing.images) // CHUNK))]
        return [CAPTIONS_FILE, *chunks, UNUSED] if listing.has_captions_file else chunks

    def fingerprint(self) -> str:
        return fingerprint(self.files, self.files.list(self.suffixes))

    def records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        listing = self._listing = self._listing or self._listed()
        if part == CAPTIONS_FILE:
            yield from listing.bad_lines
        elif part == UNUSED:
            reason = f"named in {CAPTIONS_FILE}, but there is no such image in the folder"
            images = set(listing.images)
            yield from (Skipped(name, reason) for name in listing.captions if name not in images)
        else:
            first = int(part.removeprefix("images ")) * CHUNK
            for name in listing.images[first : first + CHUNK]:
                yield self._record(name, listing)

    def _record(self, name: str, listing: _Listing) -> Record | Skipped:
        if not is_utf8(name):
            return Skipped(ascii(name), "the file's name is not UTF-8")
        caption = listing.captions.get(name) or self._caption_beside(name, listing.texts)
        if isinstance(caption, Skipped):
            return caption
        return Record(name, (caption, partial(self.files.image, name, self.config.max_file_bytes)))

    def _listed(self) -> _Listing:
        names = [file.name for file in self.files.list(self.suffixes)]
        captions, bad_lines = self._captions_file() if CAPTIONS_FILE in names else ({}, [])
        return _Listing(
            images=[name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES],
            texts=frozenset(name for name in names if name.endswith(".txt")),
            captions=captions,
            bad_lines=bad_lines,
            has_captions_file=CAPTIONS_FILE in names,
        )

    def _captions_file(self) -> tuple[dict[str, str], list[Skipped]]:
        """Captions by image name, and the lines that could not be used."""
        captions: dict[str, str] = {}
        skipped = []
        with self.files.open_raw(CAPTIONS_FILE) as file:
            lines = file.read().splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
                name, caption = Path(record["file"]).as_posix(), record["caption"]
                self._check_caption(caption)
                captions[name] = caption
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                skipped.append(Skipped(f"{CAPTIONS_FILE}:{number}", f"unusable line: {reason}"))
        return captions, skipped

    def _caption_beside(self, name: str, texts: frozenset[str]) -> str | Skipped:
        beside = PurePosixPath(name).with_suffix(".txt")
        if str(beside) not in texts:
            return Skipped(
                name, f"no caption: neither {beside.name!a} nor a line of {CAPTIONS_FILE}"
            )
        try:
            with self.files.open_raw(str(beside)) as file:
                content = read_limited(file, self.config.max_file_bytes)
            caption = content.removeprefix(codecs.BOM_UTF8).decode().strip()
            self._check_caption(caption)
        except (FileNotFoundError, PermissionError) as error:
            return Skipped(name, f"unusable caption: {type(error).__name__}")
        except ValueError as error:
            return Skipped(name, f"unusable caption: {error}")
        return caption

    def _check_caption(self, caption: str) -> None:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError("the caption is empty")
        if len(caption.encode()) > self.config.max_caption_bytes:
            raise ValueError(f"the caption is longer than {self.config.max_caption_bytes} bytes")
