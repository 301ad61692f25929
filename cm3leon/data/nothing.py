"""The corpus of a run whose weights were made elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cm3leon.config import NoSettings
from cm3leon.data.source import Skipped, Source
from cm3leon.io import digest_of
from cm3leon.registry import SOURCES
from cm3leon.types import Document


@SOURCES.register("none")
class NoSource(Source):
    """No documents: what a run that was imported was trained on is not there."""

    Config = NoSettings

    def __init__(self, config: Any) -> None:
        pass

    def parts(self) -> list[str]:
        return []

    def read(self, part: str, start: int = 0) -> Iterator[Document | Skipped]:
        yield from ()

    def fingerprint(self) -> str:
        return digest_of("")
