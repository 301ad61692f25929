"""The packer: samples become blocks of tokens.

Three ways of packing, drawn for blocks of 16 positions. 1 is the farthest retrieved document, Q the
query document, and . is padding:

    stream     QQQQ 111222QQQQ 1    all positions are filled; a block's end cuts its last sample
    whole      222QQQQ 333QQQQ ..   no document is cut; retrieved ones are dropped to fit a block
    together   12223333QQQQ QQQQ    a sample stays whole; its farthest document is cut at its start

A block of two samples `a b c` and `d e` with run_on false; weights that are 0 carry no loss:

    ids_T       a  b  c  d  e  pad
    target_T    b  c  .  e  .  .
    weight_T    1  1  0  1  0  0
    sample_T    0  0  0  1  1  -1      attention stays inside a sample
    position_T  0  1  2  0  1  0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch

from cm3leon.config import PositiveInt
from cm3leon.objectives.base import Corrupted
from cm3leon.tokenizers.document import sample_length, token_count
from cm3leon.tokenizers.layout import Layout
from cm3leon.types import Batch, Block, Sample, TokenDocument, TokenSegment, UserError


@dataclass(kw_only=True)
class PackingConfig:
    """How samples become blocks of `seq_len` positions."""

    method: Literal["stream", "whole", "together"] = "together"
    """together: a sample is in one block, where its farthest retrieved document may lose its
    beginning; that document is then context without a loss. whole: no document is cut, and the rest
    of a block is padding. stream: samples are cut so that every position is filled."""
    window: PositiveInt = 64
    """Methods whole and together: how many samples a block is chosen from."""
    positions: Literal["auto", "restart", "run_on"] = "auto"
    """restart: at 0 in every sample of a block; run_on: through the block; auto: run_on for stream,
    restart for the others."""

    @property
    def run_on(self) -> bool:
        """Whether positions run on through a block."""
        if self.positions == "auto":
            return self.method == "stream"
        return self.positions == "run_on"

    @property
    def query_is_whole(self) -> bool:
        """Whether every query document lies in one block, and so has to fit it."""
        return self.method != "stream"


def fit(sample: Sample, seq_len: int, layout: Layout) -> Sample:
    """Drop retrieved documents, the farthest first, until the sample fits.

    Raises:
        UserError: if the query alone does not fit.
    """
    while (length := sample_length(sample, layout)) > seq_len:
        if not sample.retrieved:
            raise UserError(
                f"model.seq_len: document {sample.query.id} takes {length} tokens, "
                f"a block holds {seq_len}; raise model.seq_len"
            )
        sample = replace(sample, retrieved=sample.retrieved[1:])
    return sample


def shorten(sample: Sample, length: int, layout: Layout) -> tuple[Sample, bool]:
    """Cut tokens off the beginning of the farthest retrieved document until the sample fits.

    A document that is used up is dropped, and the next one loses its beginning. A document that
    lost its first segments begins inside the first segment that is left, without a `<break>` before
    it; a cut at the end of a segment takes the `<break>` too. An image that lacks its beginning has
    no tokens that open it.

    Returns:
        The sample of at most `length` tokens, and whether its first document lacks its beginning.

    Raises:
        UserError: if the query alone is longer than `length`.
    """
    surplus = sample_length(sample, layout) - length
    between = len(layout.between_documents)
    if surplus <= 0:
        return sample, False

    for number, document in enumerate(sample.retrieved):
        tokens = token_count(document, layout)
        closing = len(layout.closing(document.segments[-1])) if document.segments else 0
        # What closes an image stays whole, or goes with it.
        if tokens - surplus >= max(closing, 1):
            rest = _without_beginning(document, surplus, layout)
            return replace(sample, retrieved=(rest, *sample.retrieved[number + 1 :])), True
        surplus -= tokens + between
        if surplus <= 0:
            return replace(sample, retrieved=sample.retrieved[number + 1 :]), False
    return fit(replace(sample, retrieved=()), length, layout), False


def _without_beginning(document: TokenDocument, lost: int, layout: Layout) -> TokenDocument:
    """A document without its first `lost` tokens or a few more, counting those that open and close
    segments or stand between them."""
    segments = list(document.segments)
    while len(segments) > 1:
        first, closing = _segment_length(segments[0], layout), len(layout.closing(segments[0]))
        if lost <= first - max(closing, 1):
            break
        segments.pop(0)
        between = 0 if segments[0].joined else len(layout.between_segments)
        lost = max(0, lost - first - between)

    opening = len(layout.opening(segments[0]))
    rest_T = segments[0].ids_T[max(0, lost - opening) :]
    segments[0] = replace(segments[0], ids_T=rest_T, joined=opening > 0 and lost > 0)
    return replace(document, segments=tuple(segments))


def _segment_length(segment: TokenSegment, layout: Layout) -> int:
    around = len(layout.opening(segment)) + len(layout.closing(segment))
    return len(segment.ids_T) + around


def pack(samples: Sequence[Corrupted], seq_len: int, pad: int, *, run_on: bool = False) -> Block:
    """One block of samples, or of pieces of different samples, with padding at the end.
    They must fit.

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
        # The target of a position is the next token of the same sample; its last has none.
        target_T[start : end - 1] = sample.ids_T[1:]
        weight_T[start : end - 1] = sample.weight_T[1:]
        sample_T[start:end] = number
        if not run_on:
            position_T[start:end] = np.arange(end - start)
        start = end
    return Block(ids_T, target_T, weight_T, sample_T, position_T)


def collate(blocks: Sequence[Block], device: torch.device) -> Batch:
    """Stack blocks to a batch of tensors."""
    tensors = []
    for field in fields(Block):
        stacked = np.stack([getattr(block, field.name) for block in blocks])
        tensors.append(torch.from_numpy(stacked).to(device))
    return Batch(*tensors)


def choose(lengths: Sequence[int], room: int, tolerance: int, over: int = 0) -> list[int]:
    """Choose items that fill `room`; return their indices, the longest item first.

    Long items are preferred, as short ones are easily placed later. An item is passed over if
    taking it would leave the room farther from full than the best choice by more than `tolerance`.

    The lengths 6, 4, 4 and a room of 8:

        tolerance 0          4 + 4, which fills it
        tolerance 2          6, which leaves 2
    and a room of 9:
        tolerance 1          4 + 4, which leaves 1
        tolerance 1, over 1  6 + 4, one over

    Args:
        over: by how much the total may exceed the room.
    """
    order = sorted(range(len(lengths)), key=lambda k: (lengths[k], -k))

    # Subset sums as bits of whole numbers: bit s of sums[n] is set if some of the n shortest items
    # have the total length s. For 4 4 6: 1, then 10001, then 100010001, then also 6, 10 and 14.
    sums = [1]
    for k in order:
        sums.append(sums[-1] | (sums[-1] << lengths[k]) & ((2 << (room + over)) - 1))

    # From the longest down: take an item if the shorter ones can still fill what it leaves.
    farthest = _distance(sums[-1], room, over) + tolerance
    chosen = []
    for n, k in reversed(list(enumerate(order))):
        if room <= 0:
            break
        after = room - lengths[k]
        if after + over >= 0 and _distance(sums[n], after, over) <= farthest:
            chosen.append(k)
            room = after
    return chosen


def _distance(sums: int, room: int, over: int) -> int:
    """Distance from bit `room` to the nearest set bit, which is at most `over` above it.

    Args:
        room: may be negative, down to `-over`.
    """
    distances = []
    if room >= 0:
        below = sums & ((2 << room) - 1)
        distances.append(room + 1 - below.bit_length())

    first = max(0, room)
    above = (sums >> first) & ((2 << (room + over - first)) - 1)
    if above:
        lowest = (above & -above).bit_length() - 1
        distances.append(lowest + first - room)
    return min(distance for distance in distances if distance >= 0)
