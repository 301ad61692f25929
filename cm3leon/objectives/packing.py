"""Samples into blocks, and blocks into an endless, exactly resumable stream of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch

from cm3leon.config import PositiveInt
from cm3leon.objectives.base import Corrupted, Objective
from cm3leon.tokenizers.document import LaidOut, lay_out, sample_length
from cm3leon.types import Batch, Block, Sample, UserError

Draw = Callable[[int, np.random.Generator], Sample]
"""(position in the endless stream of samples, generator of that position) -> the sample, the same every time."""

TOLERANCE = 0.01
"""Share of a block that `whole` may leave empty for the sake of samples that are harder to place."""

SAMPLE, PIECE = 1, 3
"""Second number of the seeds of samples and of pieces, which keeps them apart from each other."""


@dataclass(kw_only=True)
class PackingConfig:
    """How samples become blocks of `seq_len` positions."""

    method: Literal["stream", "whole"] = "whole"
    """stream: samples are cut so that every position is filled; whole: no document is cut, the rest is padding."""
    window: PositiveInt = 64
    """Method whole: number of samples from which those that fill a block are chosen."""
    positions: Literal["auto", "restart", "run_on"] = "auto"
    """restart: at 0 in every sample of a block; run_on: through the block; auto: run_on in stream, restart in whole."""

    @property
    def run_on(self) -> bool:
        """Whether positions run on through a block."""
        return self.method == "stream" if self.positions == "auto" else self.positions == "run_on"


def fit(sample: Sample, seq_len: int) -> Sample:
    """Drops retrieved documents from the left until the sample fits. Raises UserError if the query alone does not."""
    while sample_length(sample) > seq_len:
        if not sample.retrieved:
            raise UserError(
                f"model.seq_len: document {sample.query.id} takes {sample_length(sample)} tokens, "
                f"a block holds {seq_len}; raise model.seq_len"
            )
        sample = replace(sample, retrieved=sample.retrieved[1:])
    return sample


def pack(samples: Sequence[Corrupted], seq_len: int, pad: int, *, run_on: bool = False) -> Block:
    """One block of samples, or pieces of different samples; padding at the end. They must fit.

    Args:
        run_on: positions run on through the block; otherwise they restart in each sample.
    """
    ids_T = np.full(seq_len, pad, dtype=np.int64)
    target_T = np.full(seq_len, pad, dtype=np.int64)
    weight_T = np.zeros(seq_len, dtype=np.float32)
    sample_T = np.full(seq_len, -1, dtype=np.int64)
    position_T = np.arange(seq_len) if run_on else np.zeros(seq_len, dtype=np.int64)
    start = 0
    for number, sample in enumerate(samples):
        end = start + len(sample.ids_T)
        ids_T[start:end] = sample.ids_T
        target_T[start : end - 1] = sample.ids_T[1:]
        weight_T[start : end - 1] = sample.weight_T[1:]
        sample_T[start:end] = number
        if not run_on:
            position_T[start:end] = np.arange(end - start)
        start = end
    return Block(ids_T, target_T, weight_T, sample_T, position_T)


def collate(blocks: Sequence[Block], device: torch.device) -> Batch:
    """Blocks as one batch of tensors."""

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(block, name) for block in blocks])).to(device)

    return Batch(
        stack("ids_T"), stack("target_T"), stack("weight_T"), stack("sample_T"), stack("position_T")
    )


def choose(lengths: Sequence[int], room: int, tolerance: int) -> list[int]:
    """Numbers of the items that are to fill `room`: the longest first, as short ones are easily placed later.

    An item is passed over where the room left in the end would exceed the least that any choice leaves by more than
    `tolerance`. Of lengths 6, 4 and 4, a room of 8 is filled by both 4s; with a tolerance of 2 by the 6.
    """
    order = sorted(range(len(lengths)), key=lambda k: (lengths[k], -k))
    # Bit s of sums[n] is set where some of the n shortest items are s long together.
    sums = [1]
    for k in order:
        sums.append(sums[-1] | (sums[-1] << lengths[k]) & ((2 << room) - 1))
    most_left = room - _longest(sums[-1], room) + tolerance
    chosen = []
    for n, k in reversed(list(enumerate(order))):
        after = room - lengths[k]
        if after >= 0 and after - _longest(sums[n], after) <= most_left:
            chosen.append(k)
            room = after
    return chosen


def _longest(sums: int, room: int) -> int:
    """The highest bit set, up to bit `room`."""
    return (sums & ((2 << room) - 1)).bit_length() - 1


# ------------------------------------------------------------------------------------------------ lanes


class Samples:
    """The endless stream of samples: everything about one is a function of (seed, its position in the stream)."""

    def __init__(self, draw: Draw, objective: Objective, *, seq_len: int, seed: int) -> None:
        self._draw = draw
        self._objective = objective
        self.seq_len = seq_len
        self._seed = seed

    def whole(self, position: int) -> Corrupted:
        """A sample that fits a block, corrupted."""
        rng = self._generator(SAMPLE, position)
        sample = fit(self._draw(position, rng), self.seq_len)
        return self._objective.corrupt(lay_out(sample, self._objective.vocab), rng, self.seq_len)

    def laid_out(self, position: int) -> LaidOut:
        """A sample of any length, to take pieces of."""
        return lay_out(
            self._draw(position, self._generator(SAMPLE, position)), self._objective.vocab
        )

    def id_of(self, position: int) -> str:
        """Id of the query document of a sample."""
        return self._draw(position, self._generator(SAMPLE, position)).query.id

    def piece(self, sample: LaidOut, position: int, start: int, room: int) -> tuple[Corrupted, int]:
        """`Objective.take` of the sample at a position."""
        return self._objective.take(sample, start, room, self._generator(PIECE, start, position))

    def _generator(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *numbers])


class Lane(Protocol):
    """One row of every batch: the blocks made of every B-th sample of the stream."""

    def next(self) -> list[Corrupted]:
        """What the next block holds."""

    def state(self) -> dict[str, Any]:
        """Where the lane is, as JSON."""

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""

    @property
    def drawn(self) -> list[int]:
        """Positions of the samples in the block that was made last."""


class WholeLane:
    """Whole samples, chosen from a pool of them to fill a block.

    A block starts with the oldest sample of the pool, so that none waits for ever.
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
            if self._offset == len(self._sample.ids_T):
                self._position, self._offset, self._sample = self._position + self._step, 0, None
        return block

    def state(self) -> dict[str, Any]:
        return {"position": self._position, "offset": self._offset}

    def load(self, state: Mapping[str, Any]) -> None:
        self._position, self._offset, self._sample = state["position"], state["offset"], None


def new_lane(samples: Samples, packing: PackingConfig, first: int, step: int) -> Lane:
    """The lane of the samples at positions `first`, `first + step`, `first + 2 * step` ..., at its start."""
    if packing.method == "whole":
        return WholeLane(samples, first, step, packing.window)
    return StreamLane(samples, first, step)


# ------------------------------------------------------------------------------------------------ stream of batches


class BlockStream:
    """Endless batches of packed samples, of which each rank makes its part.

    A batch of B blocks is B lanes. Lane l makes its blocks of the samples at positions l, l + B, l + 2B ... of the
    stream, and rank r makes lanes r, r + ranks, r + 2 ranks ...: batches are the same on any number of ranks, and a
    state of all lanes (see `merge_states`) can be loaded on any other number of them.

    Args:
        draw: the stream of samples, a pure function.
        batch_size: blocks of a batch of all ranks together.

    Raises:
        UserError: if the ranks cannot share a batch evenly; from `next`, for a document that does not fit a block.
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
        self._lanes: dict[str, Lane] = {
            str(lane): new_lane(samples, packing, lane, batch_size)
            for lane in range(rank, batch_size, ranks)
        }
        self._samples = samples
        self._packing = packing
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._pad = objective.vocab.pad
        self._device = device

    def next(self) -> Batch:
        """The rank's lanes of the next batch, in order: (B / ranks, T)."""
        run_on = self._packing.run_on
        blocks = [
            pack(lane.next(), self._seq_len, self._pad, run_on=run_on)
            for lane in self._lanes.values()
        ]
        return collate(blocks, self._device)

    def ids(self) -> list[str]:
        """Ids of the query documents in the rank's lanes of the batch that was made last; they are drawn again."""
        positions = sorted({position for lane in self._lanes.values() for position in lane.drawn})
        return [self._samples.id_of(position) for position in positions]

    @property
    def drawn(self) -> int:
        """About how many samples of the stream were drawn so far, by all ranks together."""
        return (
            max((position for lane in self._lanes.values() for position in lane.drawn), default=-1)
            + 1
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the rank's lanes are, as JSON."""
        lanes = {name: lane.state() for name, lane in self._lanes.items()}
        return {"batch_size": self._batch_size, "method": self._packing.method, "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state that holds at least the lanes of this rank.

        Raises:
            UserError: for a state of another batch size or packing method, or of other lanes.
        """
        found = (state.get("batch_size"), state.get("method"))
        if found != (self._batch_size, self._packing.method):
            raise UserError(
                f"the checkpoint's data were batches of {found[0]} blocks packed by {found[1]}, not of "
                f"{self._batch_size} by {self._packing.method}: training.batch_size and packing.method must stay"
            )
        if missing := self._lanes.keys() - state["lanes"].keys():
            raise UserError(
                f"the checkpoint lacks lane {min(missing, key=int)} of the batch: merge all ranks' states"
            )
        for name, lane in self._lanes.items():
            lane.load(state["lanes"][name])


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all ranks at the same step as one, that any number of ranks can load."""
    lanes = {name: lane for state in states for name, lane in state["lanes"].items()}
    return {**states[0], "lanes": lanes}
