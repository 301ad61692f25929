"""What a source of documents offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from cm3leon.data.images import square
from cm3leon.types import Document, ImageSegment


@dataclass(frozen=True)
class Skipped:
    """An item of a corpus that is left out: the file (relative to the corpus) and a short
    reason."""

    file: str
    reason: str


def squared(document: Document, size: int) -> Document:
    """The document with its images brought to (size, size, 3)."""
    segments = (
        ImageSegment(square(segment.pixels_HWC, size), segment.role)
        if isinstance(segment, ImageSegment)
        else segment
        for segment in document.segments
    )
    return replace(document, segments=tuple(segments))


class Source(ABC):
    """A corpus as parts that can be read apart from each other. Registered in `SOURCES`, built as
    `cls(config)`.

    A part is one tar, one parquet file, a thousand images of a folder: the items of `read(part, 7)`
    are those of `read(part)` from the eighth on, which is all that sharing and resuming need.
    """

    class_names: tuple[str, ...] = ()
    """Names of the classes that `Document.label` numbers; empty where documents have no known
    class."""

    attribution: ClassVar[str] = ""
    """Whose the pictures are and under which licence, in sentences, where the licence asks for it:
    every page that shows them says so."""

    @classmethod
    def task_of(cls, config: Any) -> str | None:
        """The one task of instructions (docs/tasks.md) that all its documents are of; None where
        that is not known."""
        return None

    @abstractmethod
    def parts(self) -> list[str]:
        """Names of the corpus's parts, in a fixed order.

        Raises:
            UserError: for a corpus that is missing or holds no part.
        """

    @abstractmethod
    def read(self, part: str, start: int = 0) -> Iterator[Document | Skipped]:
        """The items of a part from item `start` on, images in their own size, in a fixed order.

        What cannot be used is a `Skipped` item. Images before `start` are not decoded.
        """

    def read_squared(self, part: str, start: int = 0, *, size: int) -> Iterator[Document | Skipped]:
        """The items of `read` with their images brought to (size, size, 3), see `square`.

        Each is cut as soon as it is decoded, so that what is held of a corpus does not grow with
        its photographs.
        """
        for item in self.read(part, start):
            yield item if isinstance(item, Skipped) else squared(item, size)

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when what the corpus holds changes, and with nothing else: not with where it
        lies, nor when it was copied there."""

    def documents(self, *, size: int | None = None) -> Iterator[Document | Skipped]:
        """The items of all parts, images in their own size, or brought to `size` as they are
        read."""
        for part in self.parts():
            yield from self.read(part) if size is None else self.read_squared(part, size=size)

    def class_in(self, text: str) -> int | None:
        """The one class that a caption names, None if it names none or several."""
        return None
