"""Blocks as an endless, exactly resumable stream of batches;
`packing` draws the ways of filling them.

With a batch of 4 blocks on 2 ranks, the samples of the stream go to lanes, and lanes to ranks:

    lane  rank  samples            its blocks, one in every batch
    0     0     0  4  8  12 ..     [0 4] [8] [12 16] ..
    1     1     1  5  9  13 ..     [1] [5 9] [13] ..
    2     0     2  6  10 14 ..
    3     1     3  7  11 15 ..

A sample is a function of its position in the stream, and a lane's state is the positions of what it
holds. So the batches are the same on any number of ranks, and a checkpoint stores a few integers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from cm3leon.objectives.base import Corrupted, Objective
from cm3leon.objectives.packing import PackingConfig, choose, collate, fit, pack, shorten
from cm3leon.tokenizers.document import LaidOut, lay_out, sample_length, token_count
from cm3leon.types import Batch, Sample, UserError

Draw = Callable[[int, np.random.Generator], Sample]
"""(position in the endless stream of samples, generator of that position) -> the sample; always the
same one."""

TOLERANCE = 0.01
"""Share of a block that whole and together may leave empty in favour of samples that are harder to
place."""
SPARE = 0.5
"""Share of its farthest retrieved document that a sample may lose to share its block with another.
With a quarter, no two samples shared a block of 4,096 if captions had more than 65 tokens, and a
seventh of the positions stayed empty."""
LARGEST_POOL = 4
"""Most windows of samples that together draws ahead, if those of one window fill no block."""

SAMPLE, PIECE = 1, 3
"""Second number of the seeds of samples and of pieces, which keeps their draws apart."""


class Samples:
    """The endless stream of samples; each is a function of the seed
    and its position in the stream."""

    def __init__(self, draw: Draw, objective: Objective, *, seq_len: int, seed: int) -> None:
        self._draw = draw
        self._objective = objective
        self.seq_len = seq_len
        self.layout = objective.vocab.layout
        self._seed = seed

    def whole(self, position: int) -> Corrupted:
        """A corrupted sample that fits a block."""
        rng = self._generator(SAMPLE, position)
        sample = fit(self._draw(position, rng), self.seq_len, self.layout)
        return self._objective.corrupt(lay_out(sample, self._objective.vocab), rng, self.seq_len)

    def uncut(self, position: int) -> Uncut:
        """A sample of any length, corrupted as if blocks were as long as it."""
        sample = self._draw(position, self._generator(SAMPLE, position))
        laid_out = lay_out(sample, self._objective.vocab)
        rng = self._generator(PIECE, 0, position)
        spare = 0
        if sample.retrieved:
            spare = int(SPARE * token_count(sample.retrieved[0], self.layout))
        return Uncut(sample, self._objective.corrupt(laid_out, rng, sys.maxsize), spare)

    def shortened(self, uncut: Uncut, position: int, length: int) -> Corrupted:
        """A sample of `uncut`, cut by `shorten` to at most `length` tokens and corrupted.

        A document that lacks its beginning is context: none of its tokens is a target, since what
        they depend on is gone, and no span is taken from it.
        """
        added = uncut.length - sample_length(uncut.sample, self.layout)
        sample, is_cut = self.fitted(uncut, length)
        laid_out, context = lay_out(sample, self._objective.vocab), 0

        # Hide the segments of a document that was cut from the objective.
        if is_cut:
            lost = laid_out.segments[: len(sample.retrieved[0].segments)]
            context = laid_out.segments[len(lost)].start
            laid_out = replace(laid_out, segments=laid_out.segments[len(lost) :])

        rng = self._generator(PIECE, 0, position)
        room = min(length, len(laid_out.ids_T) + added)
        corrupted = self._objective.corrupt(laid_out, rng, room)
        weight_T = corrupted.weight_T.copy()
        weight_T[:context] = 0
        return Corrupted(corrupted.ids_T, weight_T)

    def fitted(self, uncut: Uncut, length: int) -> tuple[Sample, bool]:
        """`shorten` a sample so that it has at most `length` tokens after its corruption.

        What the corruption adds is taken off the retrieved documents too. The query stays whole
        even so, with fewer spans if the block has no room for them.
        """
        added = uncut.length - sample_length(uncut.sample, self.layout)
        query = sample_length(replace(uncut.sample, retrieved=()), self.layout)
        return shorten(uncut.sample, min(length, max(query, length - added)), self.layout)

    def laid_out(self, position: int) -> LaidOut:
        """A sample of any length, to take pieces of."""
        return lay_out(
            self._draw(position, self._generator(SAMPLE, position)), self._objective.vocab
        )

    def id_of(self, position: int) -> str:
        """Id of a sample's query document."""
        return self._draw(position, self._generator(SAMPLE, position)).query.id

    def piece(self, sample: LaidOut, position: int, start: int, room: int) -> tuple[Corrupted, int]:
        """`Objective.take` of the sample at a position."""
        return self._objective.take(sample, start, room, self._generator(PIECE, start, position))

    def _generator(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *numbers])


@dataclass(frozen=True)
class Uncut:
    """A sample with all its retrieved documents, and its corruption."""

    sample: Sample
    corrupted: Corrupted
    spare: int
    """Tokens that it may lose so that another sample shares its block."""

    @property
    def length(self) -> int:
        """Tokens that it takes in a block if it is not cut."""
        return len(self.corrupted.ids_T)


class BatchLane(Protocol):
    """One block of every batch: lane l of B packs the samples l, l + B, l + 2 B ...
    of the stream."""

    def next(self) -> list[Corrupted]:
        """The samples of the next block."""

    def state(self) -> dict[str, Any]:
        """The lane's state, as JSON."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""

    @property
    def drawn(self) -> list[int]:
        """Positions of the samples in the last block."""


class WholeLane:
    """Whole samples, chosen from a pool to fill a block.

    A block starts with the oldest sample of the pool, so that none waits forever.
    """

    def __init__(self, samples: Samples, first: int, step: int, window: int) -> None:
        self._samples = samples
        self._window = window
        self._step = step
        self._next = first
        self._pool: dict[int, Corrupted] = {}
        self.drawn: list[int] = []

    def next(self) -> list[Corrupted]:
        while len(self._pool) < self._window:
            self._pool[self._next] = self._samples.whole(self._next)
            self._next += self._step

        seq_len = self._samples.seq_len
        oldest, *others = self._pool
        room = seq_len - len(self._pool[oldest].ids_T)
        lengths = [len(self._pool[position].ids_T) for position in others]
        chosen = choose(lengths, room, tolerance=int(TOLERANCE * seq_len))
        self.drawn = [oldest, *(others[k] for k in chosen)]
        return [self._pool.pop(position) for position in self.drawn]

    def state(self) -> dict[str, Any]:
        return {"pool": list(self._pool), "next": self._next}

    def load(self, state: Mapping[str, Any]) -> None:
        self._pool = {position: self._samples.whole(position) for position in state["pool"]}
        self._next = state["next"]


class TogetherLane:
    """Samples that stay together, chosen from a pool to fill a block, at the cost of their farthest
    documents.

    A block starts with the oldest sample of the pool. If no choice from the pool fills the block,
    more samples are drawn ahead, up to a few windows of them.
    """

    def __init__(self, samples: Samples, first: int, step: int, window: int) -> None:
        self._samples = samples
        self._window = window
        self._step = step
        self._next = first
        self._pool: dict[int, Uncut] = {}
        self.drawn: list[int] = []

    def next(self) -> list[Corrupted]:
        while len(self._pool) < self._window:
            self._draw_ahead()
        self.drawn = self._chosen()
        chosen = {position: self._pool.pop(position) for position in self.drawn}

        # What the block lacks is cut off the sample that can spare most. A sample that is alone in
        # its block pays whatever it can spare.
        total = sum(uncut.length for uncut in chosen.values())
        surplus = max(0, total - self._samples.seq_len)
        payer = max(chosen, key=lambda position: chosen[position].spare)

        block = []
        for position, uncut in chosen.items():
            if surplus and position == payer:
                length = uncut.length - surplus
                block.append(self._samples.shortened(uncut, position, length))
            else:
                block.append(uncut.corrupted)
        return block

    def _draw_ahead(self) -> None:
        self._pool[self._next] = self._samples.uncut(self._next)
        self._next += self._step

    def _chosen(self) -> list[int]:
        """Positions of the samples of the next block, the oldest of the pool first."""
        seq_len = self._samples.seq_len
        tolerance = int(TOLERANCE * seq_len)
        oldest = next(iter(self._pool))
        room = seq_len - self._pool[oldest].length

        while room > 0:
            others = list(self._pool)[1:]
            chosen = self._best_fit([self._pool[oldest], *(self._pool[k] for k in others)], room)
            left = room - sum(self._pool[others[k]].length for k in chosen)
            if left <= tolerance or len(self._pool) >= LARGEST_POOL * self._window:
                return [oldest, *(others[k] for k in chosen)]
            self._draw_ahead()
        return [oldest]

    def _best_fit(self, pool: Sequence[Uncut], room: int) -> list[int]:
        """Choose samples to fill the room beside the first of `pool`;
        return indices without the first."""
        lengths = [uncut.length for uncut in pool[1:]]
        tolerance = int(TOLERANCE * self._samples.seq_len)
        over = max(uncut.spare for uncut in pool)
        chosen = choose(lengths, room, tolerance, over)

        # Only one sample of a block is cut, so one of them must be able to spare the whole surplus.
        spare = max([pool[0].spare, *(pool[1 + k].spare for k in chosen)])
        if sum(lengths[k] for k in chosen) - room > spare:
            return choose(lengths, room, tolerance)
        return chosen

    def state(self) -> dict[str, Any]:
        return {"pool": list(self._pool), "next": self._next}

    def load(self, state: Mapping[str, Any]) -> None:
        self._pool = {position: self._samples.uncut(position) for position in state["pool"]}
        self._next = state["next"]


class StreamLane:
    """Samples one after the other, cut where a block is full."""

    def __init__(self, samples: Samples, first: int, step: int) -> None:
        self._samples = samples
        self._step = step
        self._position = first
        self._offset = 0
        self._sample: LaidOut | None = None
        self.drawn: list[int] = []

    def next(self) -> list[Corrupted]:
        room = self._samples.seq_len
        block = []
        self.drawn = []

        while room:
            self.drawn.append(self._position)
            if self._sample is None:
                self._sample = self._samples.laid_out(self._position)
            piece, self._offset = self._samples.piece(
                self._sample, self._position, self._offset, room
            )
            block.append(piece)
            room -= len(piece.ids_T)

            # The sample is used up; the next block or piece starts with the next one.
            if self._offset == len(self._sample.ids_T):
                self._position, self._offset, self._sample = self._position + self._step, 0, None
        return block

    def state(self) -> dict[str, Any]:
        return {"position": self._position, "offset": self._offset}

    def load(self, state: Mapping[str, Any]) -> None:
        self._position, self._offset, self._sample = state["position"], state["offset"], None


def new_lane(samples: Samples, packing: PackingConfig, first: int, step: int) -> BatchLane:
    """The lane of the samples at positions `first`, `first + step`, `first + 2 * step` ...,
    at its start."""
    if packing.method == "whole":
        return WholeLane(samples, first, step, packing.window)
    if packing.method == "together":
        return TogetherLane(samples, first, step, packing.window)
    return StreamLane(samples, first, step)


# -------------------------------------------------------------------------------- stream of batches


class BlockStream:
    """Endless batches of packed samples, of which each rank makes its part.

    A batch of B blocks is B lanes, and rank r makes lanes r, r + ranks, r + 2 ranks ...: batches
    are the same on any number of ranks, and a state of all lanes (see `merge_states`) can be loaded
    on any other number.

    Args:
        draw: the stream of samples, a pure function.
        batch_size: blocks of a batch, of all ranks together.

    Raises:
        UserError: if the ranks cannot share a batch evenly; from `next`, for a document that does
            not fit a block.
    """

    def __init__(
        self,
        draw: Draw,
        objective: Objective,
        packing: PackingConfig,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch_size % ranks:
            raise UserError(
                f"training.batch_size is {batch_size}; it must be a multiple of the {ranks} ranks"
            )

        samples = Samples(draw, objective, seq_len=seq_len, seed=seed)
        self._lanes: dict[str, BatchLane] = {}
        for lane in range(rank, batch_size, ranks):
            self._lanes[str(lane)] = new_lane(samples, packing, lane, batch_size)
        self._samples = samples
        self._packing = packing
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._pad = objective.vocab.pad
        self._device = device

    def next(self) -> Batch:
        """The blocks of the rank's lanes in the next batch, in order: (B / ranks, T)."""
        run_on = self._packing.run_on
        blocks = [
            pack(lane.next(), self._seq_len, self._pad, run_on=run_on)
            for lane in self._lanes.values()
        ]
        return collate(blocks, self._device)

    @property
    def drawn(self) -> list[int]:
        """Positions of the samples in this rank's part of the last batch."""
        positions: set[int] = set()
        for lane in self._lanes.values():
            positions.update(lane.drawn)
        return sorted(positions)

    def ids(self, positions: Sequence[int]) -> list[str]:
        """Ids of the query documents of samples, which are drawn again."""
        return [self._samples.id_of(position) for position in positions]

    def state_dict(self) -> dict[str, Any]:
        """The state of the rank's lanes, as JSON."""
        lanes = {name: lane.state() for name, lane in self._lanes.items()}
        return {"batch_size": self._batch_size, "method": self._packing.method, "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that holds at least the lanes of this rank.

        Raises:
            UserError: for a state of another batch size or packing method, or without these lanes.
        """
        found = (state.get("batch_size"), state.get("method"))
        if found != (self._batch_size, self._packing.method):
            raise UserError(
                f"the checkpoint was trained with training.batch_size={found[0]} and "
                f"packing.method={found[1]}, not {self._batch_size} and {self._packing.method}; "
                "both must stay the same, or set training.start_with=weights"
            )

        if missing := self._lanes.keys() - state["lanes"].keys():
            raise UserError(
                f"the checkpoint lacks lane {min(missing, key=int)} of the batch: merge all ranks' "
                "states"
            )
        for name, lane in self._lanes.items():
            lane.load(state["lanes"][name])


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the states of all ranks at one step; any number of ranks can load the result."""
    if "lanes" not in states[0]:
        return dict(states[0])  # the same on all ranks
    lanes: dict[str, Any] = {}
    for state in states:
        lanes |= state["lanes"]
    return {**states[0], "lanes": lanes}
