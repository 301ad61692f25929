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
"""Shortest common beginning, in tokens, that is kept as a prefix."""


@dataclass(frozen=True, eq=False)
class Request:
    """Samples of one prompt."""

    streams: tuple[np.ndarray, ...]
    """Ids of the prompt, of the unconditional prompt, and of a prompt with part of the conditions;
    the last two may be missing, none is empty."""
    grammar: NewGrammar
    """Starts the grammar of an answer."""
    length: int
    """Most tokens of an answer."""
    decoders: Sequence[Mapping[Modality, Decoder]]
    """The decoder of each modality, for each sample."""
    seeds: Sequence[int]
    """One for each sample, which depends on its seed and not on its neighbours (up to rounding)."""

    def part(self, numbers: Sequence[int]) -> Request:
        """The request with only these samples."""
        decoders, seeds = [], []
        for number in numbers:
            decoders.append(self.decoders[number])
            seeds.append(self.seeds[number])
        return replace(self, decoders=decoders, seeds=seeds)

    def _all_decoders(self) -> list[Decoder]:
        found: list[Decoder] = []
        for by_modality in self.decoders:
            found += by_modality.values()
        return found

    def used(self) -> tuple[np.ndarray, ...]:
        """The streams that its decoders look at."""
        return self.streams[: max(decoder.streams for decoder in self._all_decoders())]

    def rows(self) -> int:
        """Rows of a sample: its streams, repeated until every beam has a row."""
        beams = max(decoder.beams for decoder in self._all_decoders())
        streams = len(self.used())
        return -(-max(1, beams) // streams) * streams

    def shared(self) -> int:
        """Tokens of the prefix that all streams have in common, never the last one of a stream.

        0 if they are fewer than `SHORTEST`: each row then computes them, since attention to a
        prefix beside that to the tail costs more operators than so short a prefix saves.

            conditional    <eos> documents  a red dog <break>
            unconditional  <eos> documents  <mask:0> <break>
                           shared()         tails
        """
        streams = self.used()
        shortest = min(map(len, streams)) - 1
        differ = np.zeros(shortest, bool)
        for other in streams[1:]:
            differ |= streams[0][:shortest] != other[:shortest]
        common = int(differ.argmax()) if differ.any() else shortest
        return common if common >= SHORTEST else 0

    def tail(self) -> int:
        """Columns that a row needs behind what is shared."""
        return max(map(len, self.used())) - self.shared() - 1 + self.length

    def check(self, seq_len: int) -> None:
        """Raise UserError for an answer that the model has no positions for."""
        longest = max(map(len, self.used()))
        if longest + self.length > seq_len:
            raise UserError(
                f"model.seq_len: a prompt of {longest} tokens and an answer of {self.length} do "
                f"not fit the model's {seq_len} positions; ask for a shorter answer or fewer "
                "retrieved documents, or use a model with a larger model.seq_len"
            )


@dataclass(frozen=True)
class Shape:
    """The size of an engine: groups of `width` rows, and the columns of a prefix and of a tail.

    See `KVCache`.
    """

    groups: int
    width: int
    prefix: int
    tail: int

    def holds(self, other: Shape) -> bool:
        """Whether an engine of this shape can do all that one of another can,
        with groups as wide."""
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
    """The shape of an engine for these requests.

    Args:
        samples: most samples that are generated at a time.
        memory: bytes for keys and values; None: what the device has left, less a fifth.
        window: of the engine.
        multiple: columns are rounded up to a multiple of this.

    Raises:
        UserError: if there is no room for even one sample.
    """
    # Columns and rows must suffice for the largest request.
    rows = max(request.rows() for request in requests)
    prefix = max(request.shared() for request in requests)
    prefix = -(-prefix // multiple) * multiple
    tail = max(request.tail() for request in requests) + window - 1
    tail = -(-tail // multiple) * multiple

    most = max(len(request.seeds) for request in requests)
    per_group = max(1, min(most, samples, WIDEST // rows))
    memory = memory or int(0.8 * free_memory(next(model.parameters()).device))

    # Halve the groups until at least one of them fits into the memory.
    while True:
        width = per_group * rows
        pieces = 0
        for request in requests:
            pieces += -(-len(request.seeds) // (width // request.rows()))
        group = model.cache_bytes(groups=1, width=width, prefix=prefix, tail=tail)
        groups = min(pieces, max(1, samples // per_group), memory // group)
        if groups or per_group == 1:
            break
        per_group = -(-per_group // 2)

    if not groups:
        raise UserError(
            f"one sample of {prefix + tail} tokens in {rows} rows takes {group / 1e9:.3g} GB of "
            f"keys and values, {memory / 1e9:.3g} GB are free; use fewer retrieved documents, a "
            "smaller model, or another device"
        )
    return Shape(groups, width, prefix, tail)
