"""Generation by continuous batching: rows share prefixes, guidance's streams are rows of one batch,
each draws by its own seed."""

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
"""Prompt tokens that are computed at a time."""


@dataclass(eq=False)
class _Piece:
    """Samples of a request that are one group."""

    ticket: int
    request: Request
    numbers: range


@dataclass(eq=False)
class _Group:
    """A group in use: its samples that are not finished, and how far its rows have come."""

    lanes: list[Lane]
    prefix: int
    tail: int
    """Columns of the longest tail when it started."""


@dataclass(frozen=True)
class FinishedSample:
    """A finished sample."""

    ticket: int
    """What `submit` returned."""
    number: int
    """Of the sample in its request."""
    tokens: list[int]
    """All that was generated, special tokens included."""


class Engine:
    """Requests in, answers out, some at every step; what has no room waits.

    Args:
        model: from `MODELS`, in evaluation mode.
        window: image codes of a sample that a step computes: the next one, and behind it drafts
            that this step checks. Answers are those of a window of one (up to rounding),
            steps are fewer.
        execution: how steps are run.
        recorder: in the place of CUDA graphs.
        batch_invariant: every pass has one shape, whatever else is in the making: a prompt is
            computed by itself, and a step computes all rows and all columns that there are, used or
            not. So the bits of a sample depend on its request alone, where a matrix product of one
            shape computes each of its rows alike, in whatever row it is.
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
        self._groups: dict[int, _Group] = {}
        self._waiting: deque[_Piece] = deque()
        self._answers: list[FinishedSample] = []
        self._tickets = 0
        self._chooser = Chooser(model, vocab, self._device)

    def check(self, request: Request) -> None:
        """Raises UserError for a request that this engine has no room for,
        or the model no positions."""
        request.check(self.model.seq_len)
        rows, tail = request.rows(), request.tail() + self.window - 1
        if (
            rows > self.shape.width
            or request.shared() > self.shape.prefix
            or tail > self.shape.tail
        ):
            raise UserError(
                f"a request of {rows} rows, {request.shared()} shared and {tail} own tokens does "
                f"not fit the engine's {self.shape}"
            )

    def submit(self, request: Request) -> int:
        """Queues a request; returns its ticket. Raises as `check` does."""
        self.check(request)
        ticket, self._tickets = self._tickets, self._tickets + 1
        if not request.length:
            self._answers += [
                FinishedSample(ticket, number, []) for number in range(len(request.seeds))
            ]
            return ticket
        at_once = self.shape.width // request.rows()
        for start in range(0, len(request.seeds), at_once):
            numbers = range(start, min(start + at_once, len(request.seeds)))
            self._waiting.append(_Piece(ticket, request, numbers))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Forgets a request; its rows are free at once."""
        self._waiting = deque(piece for piece in self._waiting if piece.ticket != ticket)
        self._answers = [answer for answer in self._answers if answer.ticket != ticket]
        for slot, group in list(self._groups.items()):
            self._keep(slot, [lane for lane in group.lanes if lane.ticket != ticket])

    @property
    def free(self) -> int:
        """Groups that the next step has room for, beside those that are in use or waiting."""
        return self.shape.groups - len(self._groups) - len(self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, which stay the same."""
        return self._cache.nbytes()

    def growing(self) -> Iterator[tuple[int, int, Sequence[int]]]:
        """Ticket, number and tokens so far of each sample in the making."""
        for group in self._groups.values():
            for lane in group.lanes:
                yield lane.ticket, lane.number, lane.tokens

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._groups or self._waiting or self._answers)

    def run(self) -> Iterator[FinishedSample]:
        """Answers as they are finished, until nothing is left to do."""
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[FinishedSample]:
        """Lets waiting requests in, adds a token to every sample,
        and returns those that are finished.

        Raises:
            NotFiniteLogits: for logits that are NaN or infinite, naming the token and the request,
                which is forgotten; the others go on with the next step.
        """
        self._admit()
        if self._groups:
            self._add_tokens()
        answers, self._answers = self._answers, []
        return answers

    # -------------------------------------------------------------------------------------- prompts

    def _admit(self) -> None:
        free = [slot for slot in range(self.shape.groups) if slot not in self._groups]
        entering = [(slot, self._waiting.popleft()) for slot in free[: len(self._waiting)]]
        for batch in self._batches(entering):
            self._prefill_prefixes(batch)
        for streams in {len(piece.request.used()) for _, piece in entering}:
            alike = [each for each in entering if len(each[1].request.used()) == streams]
            for batch in self._batches(alike):
                self._prefill_tails(batch, streams)
        for slot, piece in entering:
            self._start(slot, piece)

    def _batches(self, pieces: Sequence[tuple[int, _Piece]]) -> Iterable[list[tuple[int, _Piece]]]:
        """The pieces whose prompts are computed together."""
        return [[each] for each in pieces] if self.batch_invariant else _in_budget(pieces)

    def _prefill_prefixes(self, batch: Sequence[tuple[int, _Piece]]) -> None:
        prefixes = [piece.request.streams[0][: piece.request.shared()] for _, piece in batch]
        ids_BT, length_B = self._padded(prefixes)
        self._pass(
            ids_BT, self._cache.prefix_pass(self._tensor([slot for slot, _ in batch]), length_B)
        )

    def _prefill_tails(self, batch: Sequence[tuple[int, _Piece]], streams: int) -> None:
        """The streams behind what they share, less their last tokens,
        which the first step takes."""
        at_once = self.shape.width // streams
        tails = [
            ids_T[piece.request.shared() : -1]
            for _, piece in batch
            for ids_T in piece.request.used()
        ]
        ids_QT, length_Q = self._padded(tails)
        rows = np.arange(at_once * streams).reshape(
            at_once, streams
        ).T + self.shape.width * np.array([[[slot]] for slot, _ in batch])
        row_BCN = torch.from_numpy(rows).to(self._device)
        group_B = self._tensor([slot for slot, _ in batch])
        self._pass(ids_QT, self._cache.tail_pass(group_B, row_BCN, length_Q.view(-1, streams)))

    def _pass(self, ids_BT: Tensor, attend: Any) -> None:
        T = ids_BT.shape[1]
        if T:
            position_BT = attend.positions(T).clamp(
                max=self.model.seq_len - 1
            )  # padding may stand beyond them
            self.model(ids_BT, position_BT=position_BT, attend=attend, readout=_nothing)

    def _padded(self, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Ids (B, T) padded on the right, and lengths (B,)."""
        ids_BT = np.full((len(rows), max(map(len, rows))), self.vocab.pad, np.int64)
        for row, ids_T in enumerate(rows):
            ids_BT[row, : len(ids_T)] = ids_T
        return torch.from_numpy(ids_BT).to(self._device), self._tensor(
            [len(ids_T) for ids_T in rows]
        )

    def _tensor(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)

    def _start(self, slot: int, piece: _Piece) -> None:
        request, streams = piece.request, piece.request.used()
        first = slot * self.shape.width
        lanes = []
        for place, number in enumerate(piece.numbers):
            rows = [first + place * request.rows() + row for row in range(request.rows())]
            grammar = request.grammar()
            lanes.append(
                Lane(
                    ticket=piece.ticket,
                    number=number,
                    rows=rows,
                    decoders=request.decoders[number],
                    new_grammar=request.grammar,
                    grammar=grammar,
                    allowed=next(grammar),
                    key=stream_key(request.seeds[number]),
                )
            )
        last = [int(ids_T[-1]) for ids_T in streams] * (len(lanes) * request.rows() // len(streams))
        self._steps.next_RW[first : first + len(last)] = self._tensor(last)[:, None]
        self._groups[slot] = _Group(
            lanes, request.shared(), max(map(len, streams)) - request.shared() - 1
        )

    # ---------------------------------------------------------------------------------------- steps

    def _add_tokens(self) -> None:
        """Compute every row's next tokens, have each lane take what is chosen,
        and let finished ones go."""
        lanes = [lane for group in self._groups.values() for lane in group.lanes]
        before = {lane: lane.grown for lane in lanes}
        hidden_RWD = self._hidden()

        # Lanes of a kind choose in one go. What is drawn is read only
        # when all of it is under way on the device.
        kinds: dict[LaneKind, list[Lane]] = {}
        for lane in lanes:
            kinds.setdefault(lane.kind(self.window), []).append(lane)
        drawn: list[tuple[LaneKind, list[Lane], Tensor]] = []
        failed: dict[Lane, NotFiniteLogits] = {}
        logits_RWV = self._chooser.all_logits(hidden_RWD) if self.batch_invariant else None
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

        for kind, members, token_BN in drawn:
            for lane, tokens in zip(members, token_BN.tolist(), strict=True):
                if NO_TOKEN in tokens:
                    failed[lane] = NotFiniteLogits(lane)
                else:
                    lane.take(tokens, kind.drafts)

        # A lane that failed stands where it stood, and would fail again.
        going_on = [lane for lane in lanes if not lane.finished and lane not in failed]
        self._advance([(lane, lane.grown - before[lane]) for lane in going_on])
        finished = [lane for lane in lanes if lane.finished]
        self._answers += [
            FinishedSample(lane.ticket, lane.number, lane.tokens) for lane in finished
        ]
        if finished:
            for slot, group in list(self._groups.items()):
                self._keep(slot, [lane for lane in group.lanes if not lane.finished])
        for failure in failed.values():
            self.cancel(failure.ticket)
            raise failure

    def _hidden(self) -> Tensor:
        """Hidden states (R, W, D) of the tokens that are next in each row,
        whose keys and values go to the cache."""
        self.steps += 1
        if self.batch_invariant:
            return self._steps(self.shape.groups, self.shape.prefix, self.shape.tail)
        groups = self._groups.values()
        tail = max(group.tail + max(lane.grown for lane in group.lanes) for group in groups)
        prefix = max(group.prefix for group in groups)
        return self._steps(max(self._groups) + 1, prefix, tail + self.window)

    def _search(self, kind: LaneKind, lane: Lane, logits_KV: Tensor) -> None:
        """A step of beam search; what a beam goes on from moves to its row of the cache."""
        parents = self._chooser.search(kind, lane, logits_KV)
        if parents:
            row_K = self._tensor(lane.rows[: len(parents)])
            self._cache.reorder(row_K, row_K[self._tensor(parents)])

    def _advance(self, lanes: Sequence[tuple[Lane, int]]) -> None:
        """Commit each lane's accepted tokens, so many, to the cache and queue the next inputs.

        Rows of beams have their tokens already. A count is negative where a search ended in a beam
        shorter than those that ran: its tokens are computed again.
        """
        rows = [
            (row, count, *lane.next_inputs(number, self.window))
            for lane, count in lanes
            for number, row in enumerate(lane.rows)
        ]
        if rows:
            row_R, count_R, *token_WR = self._tensor(rows).T
            self._cache.tail_length_R[row_R] += count_R
            self._steps.next_RW[row_R] = torch.stack(token_WR, 1)

    def _keep(self, slot: int, lanes: list[Lane]) -> None:
        """Leaves those lanes in a group; without any it is free."""
        self._groups[slot].lanes = lanes
        if not lanes:
            del self._groups[slot]


def _nothing(hidden_BTD: Tensor, head: nn.Linear) -> None:
    """Reads out nothing: the pass is for the cache alone."""


def _in_budget(batch: Sequence[tuple[int, _Piece]]) -> Iterator[list[tuple[int, _Piece]]]:
    """The pieces in batches of few enough tokens, those of like lengths together."""
    held: list[tuple[int, _Piece]] = []
    for each in sorted(batch, key=lambda each: max(map(len, each[1].request.used()))):
        longest = max(map(len, each[1].request.used())) * len(each[1].request.used())
        if held and longest * (len(held) + 1) > PREFILL:
            yield held
            held = []
        held.append(each)
    if held:
        yield held
