"""What is asked of the engine, and the room that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cm3leon.decoders.base import Decoder
from cm3leon.decoders.grammar import NewGrammar
from cm3leon.decoders.memory import free_memory
from cm3leon.models.base import Model
from cm3leon.types import Modality, UserError

WIDEST = 16
"""Most rows of a group; more samples of a prompt take several groups."""
SHORTEST = 16
"""Tokens from which a common beginning is a prefix, computed and kept once."""


@dataclass(frozen=True, eq=False)
class Request:
    """Samples of one prompt."""

    streams: tuple[np.ndarray, ...]
    """Ids of the prompt, then of the unconditional one, then of one with a part of the conditions;
    none is empty."""
    grammar: NewGrammar
    """Begins the grammar of an answer."""
    length: int
    """Most tokens of an answer."""
    decoders: Sequence[Mapping[Modality, Decoder]]
    """How tokens of each modality are drawn, for each sample."""
    seeds: Sequence[int]
    """One for each sample, which depends on it alone (up to rounding), not on its neighbours."""

    def part(self, numbers: Sequence[int]) -> Request:
        """Some of its samples."""
        of = [self.decoders[number] for number in numbers]
        return replace(self, decoders=of, seeds=[self.seeds[number] for number in numbers])

    def used(self) -> tuple[np.ndarray, ...]:
        """The streams that the decoders look at."""
        return self.streams[
            : max(decoder.streams for of in self.decoders for decoder in of.values())
        ]

    def rows(self) -> int:
        """Rows of a sample: its streams as often as its beams need them."""
        beams = max(decoder.beams for of in self.decoders for decoder in of.values())
        streams = len(self.used())
        return -(-max(1, beams) // streams) * streams

    def shared(self) -> int:
        """Tokens of the prefix that all streams begin with; the last one of each is not counted.

        Fewer than `SHORTEST` are none, and are computed by each row: attention to a prefix beside
        that to the tail costs more operators than it saves then.
        """
        streams = self.used()
        shortest = min(map(len, streams)) - 1
        differ = np.zeros(shortest, bool)
        for other in streams[1:]:
            differ |= streams[0][:shortest] != other[:shortest]
        alike = int(differ.argmax()) if differ.any() else shortest
        return alike if alike >= SHORTEST else 0

    def tail(self) -> int:
        """Columns that a row needs behind what is shared."""
        return max(map(len, self.used())) - self.shared() - 1 + self.length

    def check(self, seq_len: int) -> None:
        """Raises UserError for an answer that the model has no positions for."""
        longest = max(map(len, self.used()))
        if longest + self.length > seq_len:
            raise UserError(
                f"model.seq_len: a prompt of {longest} tokens and an answer of {self.length} do "
                f"not fit the model's {seq_len} positions; ask for less, or use a model of a "
                "larger model.seq_len"
            )


@dataclass(frozen=True)
class Shape:
    """Room of an engine: groups of rows, each with a prefix, and tails; see `KVCache`."""

    groups: int
    width: int
    prefix: int
    tail: int

    def holds(self, other: Shape) -> bool:
        """Whether it has all the room that another has, in groups as wide."""
        fits = self.prefix >= other.prefix and self.tail >= other.tail
        return fits and self.width == other.width and self.groups >= other.groups


def shape_for(
    model: Model,
    requests: Sequence[Request],
    *,
    samples: int = 256,
    memory: int | None = None,
    window: int = 1,
    multiple: int = 1,
) -> Shape:
    """Room for these requests: for at most so many samples at a time, and bytes of keys and values.

    Args:
        memory: None = what the device has left, less a fifth.
        window: of the engine.
        multiple: what columns are rounded up to.

    Raises:
        UserError: where not even one sample has room.
    """
    rows = max(request.rows() for request in requests)
    prefix, tail = (
        max(method(request) for request in requests) for method in (Request.shared, Request.tail)
    )
    prefix, tail = (-(-columns // multiple) * multiple for columns in (prefix, tail + window - 1))
    most = max(len(request.seeds) for request in requests)
    at_once = max(1, min(most, samples, WIDEST // rows))
    memory = memory or int(0.8 * free_memory(next(model.parameters()).device))
    while True:
        width = at_once * rows
        pieces = sum(-(-len(request.seeds) // (width // request.rows())) for request in requests)
        group = model.cache_bytes(groups=1, width=width, prefix=prefix, tail=tail)
        groups = min(pieces, max(1, samples // at_once), memory // group)
        if groups or at_once == 1:
            break
        at_once = -(-at_once // 2)
    if not groups:
        raise UserError(
            f"one sample of {prefix + tail} tokens in {rows} rows takes {group / 1e9:.3g} GB of "
            f"keys and values, {memory / 1e9:.3g} GB are free; use fewer retrieved documents, a "
            "smaller model, or another device"
        )
    return Shape(groups, width, prefix, tail)
