"""Generation by continuous batching: many samples in one pass, each drawn by its own seed.

Four words carry this file. A *lane* is a sample in the making. It owns as many *rows* of the batch
as it has streams (the prompt, and the unconditional prompt that guidance compares it with) or
beams. A *group* holds lanes of one prompt; what all their rows begin with is computed and kept
once, as the group's prefix. The *window* is how many tokens of each row a step computes.

Here are two requests: two samples of "a red dog" with guidance, and one caption without. The engine
has groups of four rows and a window of 3; `d` marks drafts, guesses of codes that come later:

    group  prefix             row  tail so far                     window     lane
    0      <eos> documents    0    a red dog <break> I7 I2         I9 d4 d1   0, conditional
                              1    <mask:0> <break> I7 I2          I9 d4 d1   0, unconditional
                              2    a red dog <break> I3            I5 d8 d2   1, conditional
                              3    <mask:0> <break> I3             I5 d8 d2   1, unconditional
    1      <eos> I4 I4 I8 ..  4    a small                         cat        0
                              5-7  (unused)

A step runs the model once over the window column of all rows. Each lane then draws what follows its
last token and each of its drafts. In lane 0, if the draw after I9 is I4, draft d4 was right and the
draw behind it counts too: the lane grew by two tokens in one step. The first wrong draft ends this;
what was drawn beyond it becomes the next drafts. Since every draw is a function of the seed and the
token's index alone, drafts change how many steps are needed, never the answer (up to rounding).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cm3leon.decoders.choosing import NO_TOKEN, Chooser, NotFiniteLogits
from cm3leon.decoders.lanes import Lane, LaneKind
from cm3leon.decoders.processors import stream_key
from cm3leon.decoders.request import Request, Shape
from cm3leon.decoders.steps import Recorder, Steps
from cm3leon.models.base import Model
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Execution, UserError

PREFILL = 2**14
"""Prompt tokens that one pass computes at most."""


@dataclass(eq=False)
class _Piece:
    """The samples of a request that share a group, waiting to enter the engine."""

    ticket: int
    request: Request
    numbers: range
    """Which samples of the request."""


@dataclass(eq=False)
class _RowGroup:
    """A group in use: its unfinished samples, and how many columns of the cache it reads."""

    lanes: list[Lane]
    prefix: int
    """Tokens of its prefix."""
    tail: int
    """Tokens of its longest tail at the start, before any was generated."""


@dataclass(frozen=True)
class FinishedSample:
    """A finished sample."""

    ticket: int
    """What `submit` returned."""
    number: int
    """Index of the sample in its request."""
    tokens: list[int]
    """All generated tokens, special tokens included."""


class Engine:
    """Answer requests; samples come out as they finish, and requests without room wait.

    Args:
        model: from `MODELS`, in evaluation mode.
        window: image codes of a sample that a step computes: the next one, and drafts behind it
            that the same step checks. The answers equal those of a window of one (up to rounding);
            there are fewer steps.
        execution: how steps are run.
        recorder: replaces the recording of CUDA graphs, for tests.
        batch_invariant: every pass has one shape, whatever else is being generated: each prompt is
            computed alone, and each step computes all rows and columns, used or not. A matrix
            product of one shape computes each of its rows in the same way, so the bits of a sample
            depend on its own request only.
    """

    def __init__(
        self,
        model: Model,
        vocab: Vocab,
        shape: Shape,
        *,
        window: int = 1,
        execution: Execution = "eager",
        recorder: Recorder | None = None,
        batch_invariant: bool = False,
    ) -> None:
        self.model, self.vocab, self.shape, self.window = model, vocab, shape, window
        self.batch_invariant = batch_invariant
        self.steps = 0
        """Passes over next tokens so far."""

        self._cache = model.new_cache(
            groups=shape.groups, width=shape.width, prefix=shape.prefix, tail=shape.tail
        )
        self._steps = Steps(
            model, self._cache, window=window, execution=execution, recorder=recorder
        )
        self._device = self._cache.device
        self._chooser = Chooser(model, vocab, self._device)

        self._groups: dict[int, _RowGroup] = {}
        """Groups in use, by their slot in the cache."""
        self._waiting: deque[_Piece] = deque()
        self._answers: list[FinishedSample] = []
        self._tickets = 0

    def check(self, request: Request) -> None:
        """Check that the model has positions, and this engine room, for a request.

        Raises:
            UserError: if not.
        """
        request.check(self.model.seq_len)
        rows, shared = request.rows(), request.shared()
        tail = request.tail() + self.window - 1
        if rows > self.shape.width or shared > self.shape.prefix or tail > self.shape.tail:
            raise UserError(
                f"a request of {rows} rows, {shared} shared tokens and {tail} tokens of each row "
                f"does not fit the engine, which has {self.shape.width} rows, "
                f"{self.shape.prefix} shared tokens and {self.shape.tail} tokens of each row; ask "
                "for fewer retrieved documents or a shorter answer"
            )

    def submit(self, request: Request) -> int:
        """Queue a request and return its ticket. Raises as `check` does."""
        self.check(request)
        ticket, self._tickets = self._tickets, self._tickets + 1
        samples = len(request.seeds)

        # An answer of no tokens is finished before it begins.
        if not request.length:
            for number in range(samples):
                self._answers.append(FinishedSample(ticket, number, []))
            return ticket

        # More samples than a group has rows for take several groups.
        per_group = self.shape.width // request.rows()
        for start in range(0, samples, per_group):
            numbers = range(start, min(start + per_group, samples))
            self._waiting.append(_Piece(ticket, request, numbers))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Forget a request; its rows are free at once."""
        self._waiting = deque(piece for piece in self._waiting if piece.ticket != ticket)
        self._answers = [answer for answer in self._answers if answer.ticket != ticket]
        for slot, group in list(self._groups.items()):
            self._keep(slot, [lane for lane in group.lanes if lane.ticket != ticket])

    @property
    def free(self) -> int:
        """Groups that the next step has room for, besides those in use or waiting."""
        return self.shape.groups - len(self._groups) - len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values; allocated once, so they never change."""
        return self._cache.nbytes()

    def growing(self) -> Iterator[tuple[int, int, Sequence[int]]]:
        """Ticket, index and tokens so far of each unfinished sample."""
        for group in self._groups.values():
            for lane in group.lanes:
                yield lane.ticket, lane.number, lane.tokens

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._groups or self._waiting or self._answers)

    def run(self) -> Iterator[FinishedSample]:
        """Yield samples as they finish, until nothing is left to do."""
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[FinishedSample]:
        """Admit waiting requests, extend every sample, and return the finished ones.

        Raises:
            NotFiniteLogits: for logits that are NaN or infinite. It names the token and the
                request, which is forgotten; the others continue with the next step.
        """
        self._admit()
        if self._groups:
            self._add_tokens()
        answers, self._answers = self._answers, []
        return answers

    # -------------------------------------------------------------------------------------- prompts

    def _admit(self) -> None:
        """Compute the prompts of as many waiting pieces as there are free groups."""
        entering: list[tuple[int, _Piece]] = []
        for slot in range(self.shape.groups):
            if self._waiting and slot not in self._groups:
                entering.append((slot, self._waiting.popleft()))

        # First what all streams of a prompt share, once for each group.
        for batch in self._batches(entering):
            self._prefill_prefixes(batch)

        # Then what follows it in each stream. A pass takes prompts of equally many streams.
        for streams in {len(piece.request.used()) for _, piece in entering}:
            alike = [each for each in entering if len(each[1].request.used()) == streams]
            for batch in self._batches(alike):
                self._prefill_tails(batch, streams)

        for slot, piece in entering:
            self._start(slot, piece)

    def _batches(self, pieces: Sequence[tuple[int, _Piece]]) -> Iterable[list[tuple[int, _Piece]]]:
        """Divide pieces into batches whose prompts are computed together."""
        if self.batch_invariant:
            return [[each] for each in pieces]
        return _in_budget(pieces)

    def _prefill_prefixes(self, batch: Sequence[tuple[int, _Piece]]) -> None:
        """Compute the keys and values that all streams of a prompt share."""
        slots, prefixes = [], []
        for slot, piece in batch:
            slots.append(slot)
            prefixes.append(piece.request.streams[0][: piece.request.shared()])
        ids_BT, length_B = self._padded(prefixes)
        self._pass(ids_BT, self._cache.prefix_pass(self._tensor(slots), length_B))

    def _prefill_tails(self, batch: Sequence[tuple[int, _Piece]], streams: int) -> None:
        """Compute each stream behind the prefix, but not its last token: the first step does that.

        A stream is computed once and written to the row of that stream in every lane. With a width
        of 6 and two streams, row_BCN of slot 1 is [[6, 8, 10], [7, 9, 11]].
        """
        slots, tails = [], []
        for slot, piece in batch:
            slots.append(slot)
            for ids_T in piece.request.used():
                tails.append(ids_T[piece.request.shared() : -1])
        ids_QT, length_Q = self._padded(tails)

        lanes = self.shape.width // streams
        row_CN = np.arange(lanes * streams).reshape(lanes, streams).T
        first_B11 = self.shape.width * np.array(slots).reshape(-1, 1, 1)
        row_BCN = torch.from_numpy(row_CN + first_B11).to(self._device)
        group_B = self._tensor(slots)
        self._pass(ids_QT, self._cache.tail_pass(group_B, row_BCN, length_Q.view(-1, streams)))

    def _pass(self, ids_BT: Tensor, attend: Any) -> None:
        """Run the model over prompt tokens, for the keys and values that it leaves in the cache."""
        T = ids_BT.shape[1]
        if not T:
            return
        # Padding may reach beyond the model's positions.
        position_BT = attend.positions(T).clamp(max=self.model.seq_len - 1)
        self.model(ids_BT, position_BT=position_BT, attend=attend, readout=_nothing)

    def _padded(self, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Ids (B, T) padded on the right, and lengths (B,)."""
        lengths = list(map(len, rows))
        ids_BT = np.full((len(rows), max(lengths)), self.vocab.pad, np.int64)
        for row, ids_T in enumerate(rows):
            ids_BT[row, : len(ids_T)] = ids_T
        return torch.from_numpy(ids_BT).to(self._device), self._tensor(lengths)

    def _tensor(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)

    def _start(self, slot: int, piece: _Piece) -> None:
        """Make the lanes of a piece and queue the last token
        of each stream as their first input."""
        request, streams = piece.request, piece.request.used()
        width, first = request.rows(), slot * self.shape.width

        lanes = []
        for index, number in enumerate(piece.numbers):
            start = first + index * width
            grammar = request.grammar()
            lanes.append(
                Lane(
                    ticket=piece.ticket,
                    number=number,
                    rows=list(range(start, start + width)),
                    decoders=request.decoders[number],
                    new_grammar=request.grammar,
                    grammar=grammar,
                    allowed=next(grammar),
                    key=stream_key(request.seeds[number]),
                )
            )

        # A lane with beams has more rows than streams; its rows repeat them.
        last = [int(ids_T[-1]) for ids_T in streams] * (len(lanes) * width // len(streams))
        self._steps.next_RW[first : first + len(last)] = self._tensor(last)[:, None]

        longest = max(map(len, streams)) - request.shared() - 1
        self._groups[slot] = _RowGroup(lanes, request.shared(), longest)

    # ---------------------------------------------------------------------------------------- steps

    def _add_tokens(self) -> None:
        """Compute every row's window, let each lane take its tokens, and release finished lanes."""
        lanes: list[Lane] = []
        for group in self._groups.values():
            lanes += group.lanes
        length_before = {lane: lane.grown for lane in lanes}
        hidden_RWD = self._hidden()

        # Lanes of a kind (one set of allowed ids, one decoder) choose in one batched operation.
        kinds: dict[LaneKind, list[Lane]] = {}
        for lane in lanes:
            kinds.setdefault(lane.kind(self.window), []).append(lane)
        logits_RWV = self._chooser.all_logits(hidden_RWD) if self.batch_invariant else None

        # Queue the draws of all kinds on the device before reading any of them: reading waits.
        drawn: list[tuple[LaneKind, list[Lane], Tensor]] = []
        failed: dict[Lane, NotFiniteLogits] = {}
        for kind, members in kinds.items():
            if kind.allowed.forced is not None:
                for lane in members:
                    lane.take([kind.allowed.forced], 0)
                    lane.chosen = lane.chosen[1:]
                continue
            logits_CBWV = self._chooser.logits(kind, members, hidden_RWD, logits_RWV)
            if not kind.searches:
                drawn.append((kind, members, self._chooser.draw(kind, members, logits_CBWV)))
                continue
            for number, lane in enumerate(members):
                try:
                    self._search(kind, lane, logits_CBWV[:, number, 0])
                except NotFiniteLogits as error:
                    failed[lane] = error

        # Read the draws. Each lane accepts its right drafts and the token behind the last of them.
        for kind, members, token_BN in drawn:
            for lane, tokens in zip(members, token_BN.tolist(), strict=True):
                if NO_TOKEN in tokens:
                    failed[lane] = NotFiniteLogits(lane)
                else:
                    lane.take(tokens, kind.drafts)

        # Commit what was accepted. A failed lane has not moved, and would only fail again.
        growing = []
        for lane in lanes:
            if not lane.finished and lane not in failed:
                growing.append((lane, lane.grown - length_before[lane]))
        self._commit(growing)

        # Hand out what is finished, and free its rows.
        finished = [lane for lane in lanes if lane.finished]
        for lane in finished:
            self._answers.append(FinishedSample(lane.ticket, lane.number, lane.tokens))
        if finished:
            for slot, group in list(self._groups.items()):
                self._keep(slot, [lane for lane in group.lanes if not lane.finished])

        # Only the first failure is reported now; another lane's comes with the next step.
        for failure in failed.values():
            self.cancel(failure.ticket)
            raise failure

    def _hidden(self) -> Tensor:
        """Hidden states (R, W, D) of each row's window; its keys and values go to the cache."""
        self.steps += 1
        if self.batch_invariant:
            return self._steps(self.shape.groups, self.shape.prefix, self.shape.tail)

        # Read no more columns of the cache than the longest prefix and tail have.
        prefix = tail = 0
        for group in self._groups.values():
            prefix = max(prefix, group.prefix)
            tail = max(tail, group.tail + max(lane.grown for lane in group.lanes))
        return self._steps(max(self._groups) + 1, prefix, tail + self.window)

    def _search(self, kind: LaneKind, lane: Lane, logits_KV: Tensor) -> None:
        """Take a step of beam search, and move the cache of each surviving beam to its new row."""
        parents = self._chooser.search(kind, lane, logits_KV)
        if parents:
            row_K = self._tensor(lane.rows[: len(parents)])
            self._cache.reorder(row_K, row_K[self._tensor(parents)])

    def _commit(self, lanes: Sequence[tuple[Lane, int]]) -> None:
        """Commit the accepted tokens to the cache and queue the next inputs.

        Args:
            lanes: each with the number of tokens that it accepted. A number is negative where a
                search ended in a beam that is shorter than the ones that ran on: its tokens are
                computed again.
        """
        table = []
        for lane, count in lanes:
            for number, row in enumerate(lane.rows):
                table.append([row, count, *lane.next_inputs(number, self.window)])
        if table:
            # One copy to the device for all columns.
            columns = self._tensor(table)
            row_R, count_R, next_RW = columns[:, 0], columns[:, 1], columns[:, 2:]
            self._cache.tail_length_R[row_R] += count_R
            self._steps.next_RW[row_R] = next_RW

    def _keep(self, slot: int, lanes: list[Lane]) -> None:
        """Leave only these lanes in a group; without any, the group is free."""
        self._groups[slot].lanes = lanes
        if not lanes:
            del self._groups[slot]


def _nothing(hidden_BTD: Tensor, head: nn.Linear) -> None:
    """Compute no logits: the pass is for the cache alone."""


def _in_budget(batch: Sequence[tuple[int, _Piece]]) -> Iterator[list[tuple[int, _Piece]]]:
    """Divide pieces into batches of at most `PREFILL` padded tokens, like lengths together."""

    def longest(each: tuple[int, _Piece]) -> int:
        return max(map(len, each[1].request.used()))

    held: list[tuple[int, _Piece]] = []
    for each in sorted(batch, key=longest):
        # Sorted by length, so this piece is the longest and all others are padded to it.
        tokens = longest(each) * len(each[1].request.used())
        if held and tokens * (len(held) + 1) > PREFILL:
            yield held
            held = []
        held.append(each)
    if held:
        yield held
