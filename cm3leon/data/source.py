"""What a source of documents offers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from cm3leon.types import Document


@dataclass(frozen=True)
class Skipped:
    """An item of a corpus that is left out: the file (relative to the corpus) and a short reason."""

    file: str
    reason: str


class Source(Protocol):
    """A corpus. Registered in `SOURCES`, built as `cls(config)`."""

    class_names: ClassVar[tuple[str, ...]]
    """Names of the classes that `Document.label` numbers; empty where documents have no known class."""

    def __init__(self, config: Any) -> None: ...

    def documents(self) -> Iterator[Document | Skipped]:
        """All documents, images in their own size, in a fixed order; unusable items as `Skipped`."""

    def fingerprint(self) -> str:
        """Changes when the corpus changes; cheap, without reading every byte."""

    def class_in(self, text: str) -> int | None:
        """The one class that a caption names, None if it names none or several."""
