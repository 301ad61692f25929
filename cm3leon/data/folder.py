"""Any folder of captioned images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cm3leon.config import PositiveInt
from cm3leon.data.images import SUFFIXES, UnusableImage, read_image
from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES
from cm3leon.types import Document, ImageSegment, TextSegment, UserError

CAPTIONS_FILE = "captions.jsonl"


@SOURCES.register("folder")
class FolderSource:
    """JPEG, PNG and WebP images under a folder, with captions in `name.txt` beside each or in one `captions.jsonl`.

    A line of captions.jsonl is `{"file": "sub/name.jpg", "caption": "..."}`, the file relative to the folder.
    Images that are unreadable, truncated, too large or without a caption are skipped, never fatal.
    """

    @dataclass(kw_only=True)
    class Config:
        """Where the images are."""

        path: Path
        """The folder; its subfolders are searched too."""
        max_pixels: PositiveInt = 64_000_000
        """Images of more pixels than this are skipped."""
        max_caption_bytes: PositiveInt = 10_000
        """Captions longer than this, in UTF-8 bytes, are skipped with their images."""

    class_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config) -> None:
        self.config = config
        if not config.path.is_dir():
            raise UserError(f"data.path: {config.path} is not a folder; give the folder that holds the images")

    def documents(self) -> Iterator[Document | Skipped]:
        captions, bad_lines = self._captions_file()
        yield from bad_lines
        for path in self._images():
            name = path.relative_to(self.config.path).as_posix()
            if not _is_utf8(name):
                yield Skipped(ascii(name), "the file's name is not UTF-8")
                continue
            caption = captions.pop(name, None) or self._caption_beside(path)
            try:
                if isinstance(caption, Skipped):
                    yield caption
                    continue
                pixels_HWC = read_image(path, self.config.max_pixels)
            except UnusableImage as error:
                yield Skipped(name, str(error))
                continue
            yield Document(name, (TextSegment(caption), ImageSegment(pixels_HWC)))
        for name in captions:
            yield Skipped(name, f"named in {CAPTIONS_FILE}, but there is no such image in the folder")

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(self.config.path.rglob("*")):
            if path.suffix.lower() in SUFFIXES | {".txt", ".jsonl"}:
                stat = path.stat()
                digest.update(os.fsencode(path.relative_to(self.config.path)))
                digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def class_in(self, text: str) -> int | None:
        return None

    def _images(self) -> list[Path]:
        return sorted(p for p in self.config.path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())

    def _captions_file(self) -> tuple[dict[str, str], list[Skipped]]:
        """Captions by image name, and the lines that could not be used."""
        path = self.config.path / CAPTIONS_FILE
        captions: dict[str, str] = {}
        skipped = []
        lines = path.read_bytes().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
                name, caption = Path(record["file"]).as_posix(), record["caption"]
                self._check_caption(caption)
                captions[name] = caption
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                skipped.append(Skipped(f"{CAPTIONS_FILE}:{number}", f"unusable line: {reason}"))
        return captions, skipped

    def _caption_beside(self, path: Path) -> str | Skipped:
        name = path.relative_to(self.config.path).as_posix()
        beside = path.with_suffix(".txt")
        if not beside.is_file():
            return Skipped(name, f"no caption: neither {beside.name} nor a line of {CAPTIONS_FILE}")
        try:
            caption = beside.read_bytes().decode().strip()
            self._check_caption(caption)
        except ValueError as error:
            return Skipped(name, f"unusable caption: {error}")
        return caption

    def _check_caption(self, caption: str) -> None:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError("the caption is empty")
        if len(caption.encode()) > self.config.max_caption_bytes:
            raise ValueError(f"the caption is longer than {self.config.max_caption_bytes} bytes")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
