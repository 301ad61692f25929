"""The items of a source one by one, each with the place to go on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cm3leon.data.source import Skipped, Source
from cm3leon.types import Document

State = dict[str, int]


class DocumentStream:
    """Iterates over (item, state) of a source; a stream loaded with that state gives exactly the items after it.

    A state is `{"part": 3, "item": 17}`: the next item is number 17 of part number 3.

    Args:
        part: this worker's number (from 0) and the number of workers; it has every such part of the source.
    """

    def __init__(self, source: Source, *, part: tuple[int, int] = (0, 1)) -> None:
        self._source = source
        self._parts = list(enumerate(source.parts()))[part[0] :: part[1]]
        self._state: State = {"part": 0, "item": 0}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from a state that a stream over the same corpus gave."""
        self._state = {"part": state["part"], "item": state["item"]}

    def __iter__(self) -> Iterator[tuple[Document | Skipped, State]]:
        first, start = self._state["part"], self._state["item"]
        for number, name in self._parts:
            if number < first:
                continue
            begin = start if number == first else 0
            for item, content in enumerate(self._source.read(name, begin), begin + 1):
                yield content, {"part": number, "item": item}
