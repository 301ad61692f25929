"""Samples into blocks of tokens.

Three ways of packing, drawn for a block of 16 positions; 1 is the farthest retrieved document, Q
the query, and . is padding:

    stream     QQQQ 111222QQQQ 1    every position is filled, and samples are cut where a block ends
    whole      222QQQQ 333QQQQ ..   no document is cut; retrieved ones are dropped until a sample fits
    together   12223333QQQQ QQQQ    a sample stays together; its farthest document loses its beginning
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

    method: Literal["stream", "whole", "together"] = "whole"
    """stream: samples are cut so that every position is filled. whole: no document is cut, and the
    rest of a block is padding. together: a sample is in one block, where its farthest retrieved
    document may lose its beginning, and that document is context without a loss."""
    window: PositiveInt = 64
    """Methods whole and together: samples from which those that fill a block are chosen."""
    positions: Literal["auto", "restart", "run_on"] = "auto"
    """restart: at 0 in every sample of a block; run_on: through the block; auto: run_on in stream,
    restart in the others."""

    @property
    def run_on(self) -> bool:
        """Whether positions run on through a block."""
        return self.method == "stream" if self.positions == "auto" else self.positions == "run_on"

    @property
    def query_is_whole(self) -> bool:
        """Whether every query document lies whole in one block, and so has to fit it."""
        return self.method != "stream"


def fit(sample: Sample, seq_len: int, layout: Layout) -> Sample:
    """Drops retrieved documents from the left until the sample fits.
    Raises UserError if the query alone does not."""
    while (length := sample_length(sample, layout)) > seq_len:
        if not sample.retrieved:
            raise UserError(
                f"model.seq_len: document {sample.query.id} takes {length} tokens, "
                f"a block holds {seq_len}; raise model.seq_len"
            )
        sample = replace(sample, retrieved=sample.retrieved[1:])
    return sample


def shorten(sample: Sample, length: int, layout: Layout) -> tuple[Sample, bool]:
    """Take tokens from the beginning of the farthest retrieved document until the sample fits.

    A document that is used up is left out, and the next one loses its beginning. A document whose
    first segments are gone begins within the first segment that is left, without a `<break>` before
    it: where a cut falls on a segment's end, the `<break>` is lost too. An image that lacks its
    beginning has no tokens that open it.

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
    """A document without its first `lost` tokens, or some more;
    what stands around and between segments counts."""
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

    stacked = (
        np.stack([getattr(block, field.name) for block in blocks]) for field in fields(Block)
    )
    return Batch(*(torch.from_numpy(array).to(device) for array in stacked))


def choose(lengths: Sequence[int], room: int, tolerance: int, over: int = 0) -> list[int]:
    """Numbers of the items that are to fill `room`, the longest first:
    short ones are easily placed later.

    Their total may exceed the room by up to `over`. An item is passed over where the total would
    end up farther from the room than the nearest of all choices by more than `tolerance`. Of
    lengths 6, 4 and 4, a room of 8 is filled by both 4s; with a tolerance of 2 by the 6. A room of
    9 is filled by both 4s too, and by 6 and 4 where the total may be one over and that is
    tolerated.
    """
    order = sorted(range(len(lengths)), key=lambda k: (lengths[k], -k))
    # Bit s of sums[n] is set where some of the n shortest items are s long together.
    sums = [1]
    for k in order:
        sums.append(sums[-1] | (sums[-1] << lengths[k]) & ((2 << (room + over)) - 1))

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
    """Distance from bit `room` to the nearest bit that is set, at most `over` above it; `room` may
    be negative, down to `-over`."""
    below = room + 1 - (sums & ((2 << room) - 1)).bit_length() if room >= 0 else -1
    first = max(0, room)
    above = (sums >> first) & ((2 << (room + over - first)) - 1)
    lowest = (above & -above).bit_length() - 1 + first - room if above else -1
    return min(distance for distance in (below, lowest) if distance >= 0)
