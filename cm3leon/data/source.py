"""What a source of documents offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from cm3leon.types import Document


@dataclass(frozen=True)
class Skipped:
    """An item of a corpus that is left out: the file (relative to the corpus) and a short reason."""

    file: str
    reason: str


class Source(ABC):
    """A corpus as parts that can be read apart from each other. Registered in `SOURCES`, built as `cls(config)`.

    A part is one tar, one parquet file, a thousand images of a folder: the items of `read(part, 7)` are those of
    `read(part)` from the eighth on, which is all that sharing and resuming need.
    """

    class_names: tuple[str, ...] = ()
    """Names of the classes that `Document.label` numbers; empty where documents have no known class."""

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

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when what the corpus holds changes, and with nothing else: not with where it lies, nor when it was
        copied there."""

    def documents(self) -> Iterator[Document | Skipped]:
        """The items of all parts."""
        for part in self.parts():
            yield from self.read(part)

    def class_in(self, text: str) -> int | None:
        """The one class that a caption names, None if it names none or several."""
        return None
