"""Generation by continuous batching: rows share prefixes, guidance's streams are rows of one batch, each draws by its
own seed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.decoders.base import Decoder
from cm3leon.decoders.grammar import Allowed, Grammar, NewGrammar, exactly
from cm3leon.decoders.processors import draw, gumbel_noise, stream_key
from cm3leon.decoders.request import Request, Shape
from cm3leon.decoders.steps import Recorder, Steps
from cm3leon.models.base import Model
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Execution, Modality, NotFinite, UserError

PREFILL = 2**14
"""Prompt tokens that are computed at a time."""
NO_TOKEN = -1
"""Stands in the place of tokens that cannot be drawn, because their logits are NaN or infinite."""


class _Kind(NamedTuple):
    """Lanes of a kind choose their tokens in one go."""

    allowed: Allowed
    decoder: Decoder
    rows: int
    drafts: int
    """Drafts of a lane that are looked at."""
    ahead: int
    """Tokens that are drawn for want of better drafts, all as if they were the next one."""

    @property
    def searches(self) -> bool:
        """Whether its rows are beams, not streams."""
        return self.decoder.beams > 0 and self.allowed.forced is None

    @property
    def streams(self) -> int:
        """Rows of a lane whose logits are wanted."""
        return self.decoder.beams if self.searches else min(self.decoder.streams, self.rows)


@dataclass(eq=False)
class _Beam:
    """A beginning of the run of tokens that is searched, and where the grammar stands behind it."""

    log_likelihood: float
    tokens: list[int]
    grammar: Grammar | None = None
    """None = made anew when the beam goes on; a grammar cannot be copied."""
    allowed: Allowed | None = None
    """What may come next; None where the answer ends."""


@dataclass
class _Search:
    """Beam search of one run of tokens: of those that the grammar takes from the same ids, a text or an image.

    When the run is over the best beam is chosen, and what follows goes on from it.
    """

    running: list[_Beam] = field(default_factory=list)
    finished: list[tuple[float, _Beam]] = field(default_factory=list)
    """Beams whose run is over, with their scores."""


@dataclass(eq=False)
class _Lane:
    """A sample in the making."""

    ticket: int
    number: int
    rows: list[int]
    decoders: Mapping[Modality, Decoder]
    new_grammar: NewGrammar
    grammar: Grammar
    allowed: Allowed
    key: int
    """The start of its random numbers."""
    tokens: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    search: _Search = field(default_factory=_Search)
    chosen: list[int] = field(default_factory=list)
    """What a search has found: these tokens come next, so that the cache holds them in all rows."""
    finished: bool = False

    @property
    def grown(self) -> int:
        """Tokens behind its prompt, in the making."""
        searched = len(self.search.running[0].tokens) if self.search.running else 0
        return len(self.tokens) + searched

    def follow(self, beam: _Beam, token: int, log_likelihood: float) -> _Beam:
        """The beam with one more token. Its grammar goes over to the first of its children."""
        tokens, grammar = [*beam.tokens, token], beam.grammar
        beam.grammar = None
        try:
            if grammar is None:
                grammar = self.new_grammar()
                next(grammar)
                for earlier in (*self.tokens, *beam.tokens):
                    grammar.send(earlier)
            allowed = grammar.send(token)
        except StopIteration:
            return _Beam(log_likelihood, tokens)
        return _Beam(log_likelihood, tokens, grammar, allowed)

    def choose(self, beam: _Beam) -> None:
        """Ends the search with its best beam."""
        self.search = _Search()
        if beam.allowed is None:
            self.tokens += beam.tokens
            self.finished = True
        else:
            self.chosen = beam.tokens[1:]
            self.take(beam.tokens[:1], 0)

    def take(self, drawn: Sequence[int], drafts: int) -> None:
        """Takes the tokens that were drawn behind its last one and behind drafts, as far as those were right.

        What was drawn beyond are the next drafts.
        """
        asked = self.allowed
        for count, token in enumerate(drawn[: 1 + drafts], 1):
            self.tokens.append(token)
            try:
                self.allowed = self.grammar.send(token)
            except StopIteration:
                self.finished = True
                return
            if self.allowed != asked or (count <= drafts and token != self.drafts[count - 1]):
                break
        self.drafts = [*drawn[count:]]


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
    """Columns of the longest tail when it started."""


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
        window: image codes of a sample that a step computes: the next one, and behind it drafts that this step checks.
            Answers are those of a window of one (up to rounding), steps are fewer.
        execution: how steps are run.
        recorder: in the place of CUDA graphs.
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
    ) -> None:
        self.model, self.vocab, self.shape, self.window = model, vocab, shape, window
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
        self._answers: list[Answer] = []
        self._tickets = 0
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def submit(self, request: Request) -> int:
        """Queues a request; returns its ticket.

        Raises:
            UserError: for a request that this engine has no room for, or the model no positions.
        """
        request.check(self.model.seq_len)
        rows, tail = request.rows(), request.tail() + self.window - 1
        if (
            rows > self.shape.width
            or request.shared() > self.shape.prefix
            or tail > self.shape.tail
        ):
            raise UserError(
                f"a request of {rows} rows, {request.shared()} shared and {tail} own tokens does not "
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
        """Lets waiting requests in, adds a token to every sample, and returns those that are finished.

        Raises:
            NotFinite: for logits that are NaN or infinite, naming the token and the request.
        """
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
            for batch in _in_budget(
                [each for each in entering if len(each[1].request.used()) == streams]
            ):
                self._prefill_tails(batch, streams)
        for slot, piece in entering:
            self._start(slot, piece)

    def _prefill_prefixes(self, batch: Sequence[tuple[int, _Piece]]) -> None:
        prefixes = [piece.request.streams[0][: piece.request.shared()] for _, piece in batch]
        ids_BT, length_B = self._padded(prefixes)
        self._pass(
            ids_BT, self._cache.prefix_pass(self._tensor([slot for slot, _ in batch]), length_B)
        )

    def _prefill_tails(self, batch: Sequence[tuple[int, _Piece]], streams: int) -> None:
        """The streams behind what they share, less their last tokens, which the first step takes."""
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
                _Lane(
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

    # -------------------------------------------------------------------------------------------- steps

    def _add_tokens(self) -> None:
        lanes = [lane for group in self._groups.values() for lane in group.lanes]
        kinds: dict[_Kind, list[_Lane]] = {}
        for lane in lanes:
            kinds.setdefault(self._kind(lane), []).append(lane)
        tail = max(
            group.tail + max(lane.grown for lane in group.lanes) for group in self._groups.values()
        )
        hidden_RWD = self._steps(
            max(self._groups) + 1,
            max(group.prefix for group in self._groups.values()),
            tail + self.window,
        )
        self.steps += 1
        before = {lane: lane.grown for lane in lanes}
        drawn: list[tuple[_Kind, list[_Lane], Tensor]] = []
        for kind, members in kinds.items():
            if kind.allowed.forced is not None:
                for lane in members:
                    lane.take([kind.allowed.forced], 0)
                    lane.chosen = lane.chosen[1:]
                continue
            logits_CBWV = self._logits(kind, members, hidden_RWD)
            if kind.searches:
                for place, lane in enumerate(members):
                    self._search(kind, lane, logits_CBWV[:, place, 0])
            else:
                drawn.append((kind, members, self._draw(kind, members, logits_CBWV)))
        for kind, members, token_BN in drawn:  # read only now, when all of them are under way
            for lane, tokens in zip(members, token_BN.tolist(), strict=True):
                if NO_TOKEN in tokens:
                    raise _not_finite(lane)
                lane.take(tokens, kind.drafts)
        self._advance([(lane, lane.grown - before[lane]) for lane in lanes if not lane.finished])
        self._answers += [
            Answer(lane.ticket, lane.number, lane.tokens) for lane in lanes if lane.finished
        ]
        if any(lane.finished for lane in lanes):
            for slot, group in list(self._groups.items()):
                self._keep(slot, [lane for lane in group.lanes if not lane.finished])

    def _kind(self, lane: _Lane) -> _Kind:
        decoder = lane.decoders[lane.allowed.modality]
        if lane.chosen:
            return _Kind(exactly(lane.chosen[0]), decoder, len(lane.rows), 0, 0)
        one_by_one = decoder.looks_back or decoder.beams > 0
        most = self.window - 1 if lane.allowed.modality == "image" and not one_by_one else 0
        return _Kind(lane.allowed, decoder, len(lane.rows), min(len(lane.drafts), most), most)

    def _advance(self, lanes: Sequence[tuple[_Lane, int]]) -> None:
        """Makes so many of the tokens that each lane was given a part of its rows' tails, and gives it the next ones.

        Rows of beams have their tokens already. A count is negative where a search ended in a beam shorter than those
        that ran: its tokens are computed again.
        """
        rows = [
            (row, count, *self._given(lane, place))
            for lane, count in lanes
            for place, row in enumerate(lane.rows)
        ]
        if rows:
            row_R, count_R, *token_WR = self._tensor(rows).T
            self._cache.tail_length_R[row_R] += count_R
            self._steps.next_RW[row_R] = torch.stack(token_WR, 1)

    def _given(self, lane: _Lane, row: int) -> list[int]:
        """The last token of a row, and its drafts."""
        if lane.search.running:
            beams = lane.search.running
            return [beams[min(row, len(beams) - 1)].tokens[-1]] * self.window
        lane.drafts = lane.drafts[: self.window - 1]
        return [lane.tokens[-1], *lane.drafts, *[0] * (self.window - 1 - len(lane.drafts))]

    def _logits(self, kind: _Kind, lanes: list[_Lane], hidden_RWD: Tensor) -> Tensor:
        """Logits (C, B, W, V) of lanes of a kind, of the ids that are allowed."""
        allowed = kind.allowed
        hidden_CBWD = hidden_RWD[self._rows(lanes, kind.streams), : 1 + kind.drafts]
        logits_CBWV = F.linear(
            hidden_CBWD, self.model.head.weight[allowed.low : allowed.high]
        ).float()
        return logits_CBWV[..., self._columns(allowed)] if allowed.closed else logits_CBWV

    def _draw(self, kind: _Kind, lanes: list[_Lane], logits_CBWV: Tensor) -> Tensor:
        """The tokens (B, N) that follow each lane's last one and its drafts, and what is drawn ahead."""
        B, W = logits_CBWV.shape[1:3]
        column_V = self._columns(kind.allowed)
        past: dict[str, Any] = {}
        if kind.decoder.looks_back:
            place = {
                int(column) + kind.allowed.low: place
                for place, column in enumerate(column_V.tolist())
            }
            past["past"] = [
                [place[token] for token in lane.tokens if token in place] for lane in lanes
            ]
        conditional, *others = logits_CBWV.flatten(1, 2)
        logits_BWV = kind.decoder.logits(conditional, *(others or [None]), **past).view(B, W, -1)
        logits_BNV = torch.cat([logits_BWV, logits_BWV[:, -1:].expand(B, kind.ahead, -1)], 1)
        key_B, begin_B = self._tensor([(lane.key, len(lane.tokens)) for lane in lanes]).T
        place_BN = begin_B[:, None] + torch.arange(W + kind.ahead, device=self._device)
        id_V = column_V + kind.allowed.low
        noise_BNV = gumbel_noise(key_B[:, None, None], place_BN[..., None] * self.vocab.size + id_V)
        token_BN = id_V[draw(logits_BNV, noise_BNV)]

        # A draw from logits that are no numbers would be the first code, without a word. The mark comes with the
        # tokens, so that nothing waits for the device here.
        finite_BW = logits_CBWV.isfinite().all(-1).all(0) & (logits_BWV.amax(-1) < torch.inf)
        return token_BN.where(finite_BW.all(-1, keepdim=True), NO_TOKEN)

    def _search(self, kind: _Kind, lane: _Lane, logits_KV: Tensor) -> None:
        """A step of beam search; when the run is over, the lane has chosen its best beam."""
        K, V = logits_KV.shape
        decoder, search = kind.decoder, lane.search
        beams = search.running or [_Beam(0.0, [])]  # at the start all rows are the same

        before_B1 = torch.tensor([[beam.log_likelihood] for beam in beams], device=self._device)
        total_BV = decoder.logits(logits_KV)[: len(beams)] + before_B1
        best = total_BV.flatten().topk(min(2 * K, total_BV.numel()))

        column_V = self._columns(lane.allowed)
        running: list[_Beam] = []
        parents: list[int] = []
        for log_likelihood, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if math.isnan(log_likelihood):
                raise _not_finite(lane)
            if log_likelihood == -torch.inf and (running or search.finished):
                break  # beams without a chance are all that is left
            parent, token = place // V, int(column_V[place % V]) + lane.allowed.low
            beam = lane.follow(beams[parent], token, log_likelihood)
            if beam.allowed != lane.allowed:
                score = decoder.score(log_likelihood, len(beam.tokens))
                search.finished.append((score, beam))
            elif len(running) < K:
                running.append(beam)
                parents.append(parent)

        if not running or len(search.finished) >= K:
            lane.choose(max(search.finished, key=lambda each: (each[0], each[1].tokens))[1])
            return
        while (
            len(running) < K
        ):  # fewer tokens than beams are allowed: the last one, without a chance
            running.append(_Beam(-torch.inf, running[-1].tokens))
            parents.append(parents[-1])
        search.running = running
        row_K = self._tensor(lane.rows[:K])
        self._cache.reorder(row_K, row_K[self._tensor(parents)])

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
            ids = [
                number - allowed.low
                for number in range(allowed.low, allowed.high)
                if number not in allowed.closed
            ]
            self._indices[key] = self._tensor(ids)
        return self._indices[key]

    def _keep(self, slot: int, lanes: list[_Lane]) -> None:
        """Leaves those lanes in a group; without any it is free."""
        self._groups[slot].lanes = lanes
        if not lanes:
            del self._groups[slot]


def _not_finite(lane: _Lane) -> NotFinite:
    return NotFinite(
        f"the logits of token {lane.grown + 1} of the answer to request {lane.ticket} are NaN or infinite: the model's "
        "weights are damaged or have diverged, or the decoder's guidance is too strong for them"
    )


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
