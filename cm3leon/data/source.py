"""The interface of a source of documents.

    parts()            "a.tar", "b.tar"                     workers divide these among themselves
    read("a.tar")      item 0, item 1, item 2 ...           documents, and items that are left out
    read("a.tar", 2)   item 2 ...                           whoever was interrupted resumes so

The order of parts and items is fixed, and the same in every process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cm3leon.data.images import square
from cm3leon.types import Document, ImageSegment, Segment


@dataclass(frozen=True)
class Skipped:
    """An item of a corpus that is left out: its file, relative to the corpus, and a short reason."""

    file: str
    reason: str


def squared(document: Document, size: int) -> Document:
    """A copy of the document with its images brought to (size, size, 3)."""
    segments: list[Segment] = []
    for segment in document.segments:
        if isinstance(segment, ImageSegment):
            segment = ImageSegment(square(segment.pixels_HWC, size), segment.role)
        segments.append(segment)
    return replace(document, segments=tuple(segments))


class Source(ABC):
    """A corpus made of parts that can be read independently. Registered in `SOURCES`, built as
    `cls(config)`.

    A part is for example one tar, one parquet file, or a thousand images of a folder. The items of
    `read(part, 7)` are those of `read(part)` from the eighth on: nothing else is needed to divide
    the work and to resume it.
    """

    class_names: tuple[str, ...] = ()
    """Names of the classes, by the values of `Document.label`; empty if documents have no known
    class."""

    @classmethod
    def attributions(cls, config: Any) -> Sequence[str]:
        """Whose pictures these are and under which licence, in sentences, a text for each licensor
        that requires it: every page that shows them says so.

        Args:
            config: its settings; None if they could not be read.
        """
        return ()

    @classmethod
    def task_of(cls, config: Any) -> str | None:
        """The task of instructions (docs/tasks.md) that all its documents belong to; None if that
        is not known."""
        return None

    @abstractmethod
    def parts(self) -> list[str]:
        """The names of the corpus's parts, in a fixed order.

        Raises:
            UserError: for a corpus that is missing or has no part.
        """

    @abstractmethod
    def read(self, part: str, start: int = 0) -> Iterator[Document | Skipped]:
        """Yield the items of a part from item `start` on, in a fixed order, images in their own
        size.

        Whatever cannot be used is a `Skipped` item. Images before `start` are not decoded.
        """

    def read_squared(self, part: str, start: int = 0, *, size: int) -> Iterator[Document | Skipped]:
        """Yield the items of `read` with their images brought to (size, size, 3), see `square`.

        Each image is cut as soon as it is decoded, so that little is held of large photographs.
        """
        for item in self.read(part, start):
            if isinstance(item, Document):
                item = squared(item, size)
            yield item

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that changes exactly when the content of the corpus changes: not with the place
        where it lies, nor with the time when it was copied."""

    def documents(self, *, size: int | None = None) -> Iterator[Document | Skipped]:
        """Yield the items of all parts, images in their own size or brought to `size` as they are
        read."""
        for part in self.parts():
            if size is None:
                yield from self.read(part)
            else:
                yield from self.read_squared(part, size=size)

    def class_in(self, text: str) -> int | None:
        """The only class that a caption names; None if it names none or several."""
        return None
