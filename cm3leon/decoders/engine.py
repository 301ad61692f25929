"""Generation by continuous batching: rows share prefixes, guidance's streams are rows of one batch, each draws by its
own seed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.decoders.decoders import Decoder
from cm3leon.decoders.grammar import Allowed, Grammar
from cm3leon.decoders.processors import draw, uniforms
from cm3leon.decoders.request import Request, Shape
from cm3leon.tokenizers.vocab import SPECIALS, Vocab
from cm3leon.types import Modality, UserError

PREFILL = 2**14
"""Prompt tokens that are computed at a time."""


class _Kind(NamedTuple):
    """Lanes of a kind choose their tokens in one go."""

    allowed: Allowed
    decoder: Any
    rows: int

    @property
    def beams(self) -> bool:
        """Whether its rows are beams, not streams."""
        return hasattr(self.decoder, "beams") and self.allowed.forced is None

    @property
    def streams(self) -> int:
        """Rows of a lane whose logits are wanted."""
        return self.rows if self.beams else min(self.decoder.streams, self.rows)


@dataclass
class _Search:
    """Beams with their log-likelihoods, and answers with their scores."""

    running: list[tuple[float, list[int]]] = field(default_factory=list)
    finished: list[tuple[float, list[int]]] = field(default_factory=list)


@dataclass(eq=False)
class _Lane:
    """A sample in the making."""

    ticket: int
    number: int
    rows: list[int]
    decoders: Mapping[Modality, Decoder]
    grammar: Grammar
    allowed: Allowed
    uniform_T: Tensor
    drawn: int = 0
    tokens: list[int] = field(default_factory=list)
    search: _Search = field(default_factory=_Search)

    def take(self, token: int) -> bool:
        """Whether the answer is finished with that token."""
        self.tokens.append(token)
        try:
            self.allowed = self.grammar.send(token)
        except StopIteration:
            return True
        return False


@dataclass(eq=False)
class _Piece:
    """Samples of a request that are one group."""

    ticket: int
    request: Request
    numbers: range


@dataclass(eq=False)
class _Group:
    """A group in use: its samples that are not finished, and how far its rows have come."""

    lanes: list[_Lane]
    prefix: int
    tail: int


@dataclass(frozen=True)
class Answer:
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
    """

    def __init__(self, model: Any, vocab: Vocab, shape: Shape) -> None:
        self.model, self.vocab, self.shape = model, vocab, shape
        self._cache = model.new_cache(groups=shape.groups, width=shape.width, prefix=shape.prefix, tail=shape.tail)
        self._device = self._cache.device
        self._groups: dict[int, _Group] = {}
        self._waiting: deque[_Piece] = deque()
        self._answers: list[Answer] = []
        self._tickets = 0
        self._next_R = torch.zeros(shape.groups * shape.width, dtype=torch.int64, device=self._device)
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def submit(self, request: Request) -> int:
        """Queues a request; returns its ticket.

        Raises:
            UserError: for a request that this engine has no room for, or the model no positions.
        """
        request.check(self.model.seq_len)
        rows = request.rows()
        if rows > self.shape.width or request.shared() > self.shape.prefix or request.tail() > self.shape.tail:
            raise UserError(
                f"a request of {rows} rows, {request.shared()} shared and {request.tail()} own tokens does not "
                f"fit the engine's {self.shape}"
            )
        ticket, self._tickets = self._tickets, self._tickets + 1
        if not request.length:
            self._answers += [Answer(ticket, number, []) for number in range(len(request.seeds))]
            return ticket
        at_once = self.shape.width // rows
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
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._groups or self._waiting or self._answers)

    def run(self) -> Iterator[Answer]:
        """Answers as they are finished, until nothing is left to do."""
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Answer]:
        """Lets waiting requests in, adds a token to every sample, and returns those that are finished."""
        self._admit()
        if self._groups:
            self._add_tokens()
        answers, self._answers = self._answers, []
        return answers

    # -------------------------------------------------------------------------------------------- prompts

    def _admit(self) -> None:
        free = [slot for slot in range(self.shape.groups) if slot not in self._groups]
        entering = [(slot, self._waiting.popleft()) for slot in free[: len(self._waiting)]]
        for batch in _in_budget(entering):
            self._prefill_prefixes(batch)
        for streams in {len(piece.request.used()) for _, piece in entering}:
            for batch in _in_budget([each for each in entering if len(each[1].request.used()) == streams]):
                self._prefill_tails(batch, streams)
        for slot, piece in entering:
            self._start(slot, piece)

    def _prefill_prefixes(self, batch: Sequence[tuple[int, _Piece]]) -> None:
        prefixes = [piece.request.streams[0][: piece.request.shared()] for _, piece in batch]
        ids_BT, length_B = self._padded(prefixes)
        self._pass(ids_BT, self._cache.prefix_pass(self._tensor([slot for slot, _ in batch]), length_B))

    def _prefill_tails(self, batch: Sequence[tuple[int, _Piece]], streams: int) -> None:
        """The streams behind what they share, less their last tokens, which the first step takes."""
        at_once = self.shape.width // streams
        tails = [ids_T[piece.request.shared() : -1] for _, piece in batch for ids_T in piece.request.used()]
        ids_QT, length_Q = self._padded(tails)
        rows = np.arange(at_once * streams).reshape(at_once, streams).T + self.shape.width * np.array(
            [[[slot]] for slot, _ in batch]
        )
        row_BCN = torch.from_numpy(rows).to(self._device)
        group_B = self._tensor([slot for slot, _ in batch])
        self._pass(ids_QT, self._cache.tail_pass(group_B, row_BCN, length_Q.view(-1, streams)))

    def _pass(self, ids_BT: Tensor, attend: Any) -> None:
        T = ids_BT.shape[1]
        if T:
            position_BT = attend.positions(T).clamp(max=self.model.seq_len - 1)  # padding may stand beyond them
            self.model(ids_BT, position_BT=position_BT, attend=attend, readout=_nothing)

    def _padded(self, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Ids (B, T) padded on the right, and lengths (B,)."""
        ids_BT = np.full((len(rows), max(map(len, rows))), self.vocab.pad, np.int64)
        for row, ids_T in enumerate(rows):
            ids_BT[row, : len(ids_T)] = ids_T
        return torch.from_numpy(ids_BT).to(self._device), self._tensor([len(ids_T) for ids_T in rows])

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)

    def _start(self, slot: int, piece: _Piece) -> None:
        request, streams = piece.request, piece.request.used()
        first = slot * self.shape.width
        uniform_NT = uniforms([request.seeds[number] for number in piece.numbers], request.length)
        lanes = []
        for place, number in enumerate(piece.numbers):
            rows = [first + place * request.rows() + row for row in range(request.rows())]
            grammar = request.grammar()
            lane = _Lane(
                piece.ticket, number, rows, request.decoders[number], grammar, next(grammar), uniform_NT[place]
            )
            lanes.append(lane)
        last = [int(ids_T[-1]) for ids_T in streams] * (len(lanes) * request.rows() // len(streams))
        self._next_R[first : first + len(last)] = self._tensor(last)
        self._groups[slot] = _Group(lanes, request.shared(), max(map(len, streams)) - request.shared() - 1)

    # -------------------------------------------------------------------------------------------- steps

    def _add_tokens(self) -> None:
        lanes = [lane for group in self._groups.values() for lane in group.lanes]
        kinds: dict[_Kind, list[_Lane]] = {}
        for lane in lanes:
            kind = _Kind(lane.allowed, lane.decoders[lane.allowed.modality], len(lane.rows))
            kinds.setdefault(kind, []).append(lane)
        groups = max(self._groups) + 1
        attend = self._cache.step_pass(
            groups,
            max(group.prefix for group in self._groups.values()),
            max(group.tail for group in self._groups.values()) + 1,
        )
        rows = groups * self.shape.width
        logits = self.model(
            self._next_R[:rows, None],
            position_BT=attend.positions(1).clamp(max=self.model.seq_len - 1),
            attend=attend,
            readout=partial(self._logits, list(kinds.items())),
        )
        self._cache.tail_length_R[:rows] += 1
        for group in self._groups.values():
            group.tail += 1
        finished: set[_Lane] = set()
        drawn = []
        for (kind, members), logits_CBV in zip(kinds.items(), logits, strict=True):
            if kind.beams:
                finished |= {
                    lane for place, lane in enumerate(members) if self._search(kind, lane, logits_CBV[:, place])
                }
            else:
                drawn.append((members, self._draw(kind, members, logits_CBV)))
        tokens = torch.cat([token_B for _, token_B in drawn]).tolist() if drawn else []
        for lane, token in zip((lane for members, _ in drawn for lane in members), tokens, strict=True):
            if lane.take(token):
                finished.add(lane)
        self._answers += [Answer(lane.ticket, lane.number, lane.tokens) for lane in lanes if lane in finished]
        if finished:
            for slot, group in list(self._groups.items()):
                self._keep(slot, [lane for lane in group.lanes if lane not in finished])

    def _logits(
        self, kinds: Sequence[tuple[_Kind, list[_Lane]]], hidden_R1D: Tensor, head: nn.Linear
    ) -> list[Tensor | None]:
        """Logits (C, B, V) of each kind of lanes, of the ids that are allowed; None where there is no choice."""
        result: list[Tensor | None] = []
        for kind, lanes in kinds:
            if kind.allowed.forced is not None:
                result.append(None)
                continue
            hidden_CBD = hidden_R1D[self._rows(lanes, kind.streams), 0]
            logits_CBV = F.linear(hidden_CBD, head.weight[kind.allowed.low : kind.allowed.high]).float()
            result.append(logits_CBV[:, :, self._columns(kind.allowed)] if kind.allowed.closed else logits_CBV)
        return result

    def _draw(self, kind: _Kind, lanes: list[_Lane], logits_CBV: Tensor | None) -> Tensor:
        """The next token (B,) of each lane, which is also put where the next step reads it."""
        if logits_CBV is None:
            token_B = self._tensor([kind.allowed.low] * len(lanes))
        else:
            column_V = self._columns(kind.allowed)
            past: dict[str, Any] = {}
            if getattr(kind.decoder, "looks_back", False):
                place = {int(column) + kind.allowed.low: place for place, column in enumerate(column_V.tolist())}
                past["past"] = [[place[token] for token in lane.tokens if token in place] for lane in lanes]
            conditional_BV, *others = logits_CBV
            logits_BV = kind.decoder.logits(conditional_BV, *(others or [None]), **past)
            uniform_B = torch.stack([lane.uniform_T[lane.drawn] for lane in lanes]).to(self._device)
            token_B = column_V[draw(logits_BV, uniform_B)] + kind.allowed.low
            for lane in lanes:
                lane.drawn += 1
        row_CB = self._rows(lanes, kind.rows)
        self._next_R[row_CB] = token_B.expand_as(row_CB)
        return token_B

    def _search(self, kind: _Kind, lane: _Lane, logits_KV: Tensor) -> bool:
        """A step of beam search; whether the lane is finished, with the best answer as its tokens."""
        K, V = logits_KV.shape
        decoder, search = kind.decoder, lane.search
        if not search.running:
            search.running = [(0.0, [])] * K
        total_KV = decoder.logits(logits_KV) + self._scores(search.running)
        if not search.running[0][1]:
            total_KV = total_KV[:1]  # all beams are the same still
        best = total_KV.flatten().topk(min(2 * K, total_KV.numel()))
        column_V = self._columns(lane.allowed)
        running: list[tuple[float, list[int]]] = []
        parents: list[int] = []
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            parent, token = place // V, int(column_V[place % V]) + lane.allowed.low
            tokens = [*search.running[parent][1], token]
            if token < len(SPECIALS):
                search.finished.append((decoder.score(score, len(tokens)), tokens))
            elif len(running) < K:
                running.append((score, tokens))
                parents.append(parent)
        while len(running) < K:  # fewer tokens than beams are allowed: repeat the last one, without a chance
            running.append((-torch.inf, running[-1][1] if running else [lane.allowed.low]))
            parents.append(parents[-1] if parents else 0)
        search.running = running
        row_K = self._tensor(lane.rows)
        self._cache.reorder(row_K, row_K[self._tensor(parents)])
        self._next_R[row_K] = self._tensor([tokens[-1] for _, tokens in running])
        if len(search.finished) < K and len(running[0][1]) < len(lane.uniform_T):
            return False
        search.finished += [(decoder.score(score, len(tokens)), tokens) for score, tokens in running]
        lane.tokens = max(search.finished)[1]
        return True

    def _scores(self, running: Sequence[tuple[float, list[int]]]) -> Tensor:
        return torch.tensor([[score] for score, _ in running], device=self._device)

    def _rows(self, lanes: list[_Lane], streams: int) -> Tensor:
        """Rows (C, B) of the first streams of some lanes."""
        numbers = tuple(lane.rows[stream] for stream in range(streams) for lane in lanes)
        if numbers not in self._indices:
            if len(self._indices) > 1000:
                self._indices.clear()
            self._indices[numbers] = self._tensor(numbers)
        return self._indices[numbers].view(streams, -1)

    def _columns(self, allowed: Allowed) -> Tensor:
        """Ids that are allowed, counted from the lowest."""
        key = (-1, allowed.low, allowed.high, *allowed.closed)
        if key not in self._indices:
            ids = [number - allowed.low for number in range(allowed.low, allowed.high) if number not in allowed.closed]
            self._indices[key] = self._tensor(ids)
        return self._indices[key]

    def _keep(self, slot: int, lanes: list[_Lane]) -> None:
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
