"""Choose the next tokens from hidden states: drawn by each sample's own seed, or by beam search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.decoders.grammar import Allowed
from cm3leon.decoders.lanes import Candidate, Lane, LaneKind
from cm3leon.decoders.processors import draw, gumbel_noise
from cm3leon.models.base import Model
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import NotFinite

NO_TOKEN = -1
"""Marks a token that cannot be drawn, because its logits are NaN or infinite."""


class Chooser:
    """Chooses the next tokens of lanes of one kind at a time."""

    def __init__(self, model: Model, vocab: Vocab, device: torch.device) -> None:
        self._model, self._vocab, self._device = model, vocab, device
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def all_logits(self, hidden_RWD: Tensor) -> Tensor:
        """Logits (R, W, V) of all rows and all ids: one shape, whatever is being generated."""
        return F.linear(hidden_RWD, self._model.head.weight).float()

    def logits(
        self,
        kind: LaneKind,
        lanes: list[Lane],
        hidden_RWD: Tensor,
        logits_RWV: Tensor | None = None,
    ) -> Tensor:
        """Logits (C, B, W, V) of lanes of a kind, of the ids that are allowed.

        Args:
            logits_RWV: from `all_logits`; None: only the logits that are needed are computed.
        """
        allowed, tokens = kind.allowed, 1 + kind.drafts
        row_CB = self._rows(lanes, kind.streams)
        if logits_RWV is None:
            weight_VD = self._model.head.weight[allowed.low : allowed.high]
            logits_CBWV = F.linear(hidden_RWD[row_CB, :tokens], weight_VD).float()
        else:
            logits_CBWV = logits_RWV[..., allowed.low : allowed.high][row_CB, :tokens]
        return logits_CBWV[..., self._columns(allowed)] if allowed.closed else logits_CBWV

    def draw(self, kind: LaneKind, lanes: list[Lane], logits_CBWV: Tensor) -> Tensor:
        """Draw the tokens (B, N) behind each lane's last one and its drafts, and those ahead.

        N is 1 + drafts + ahead; a row with logits that are not finite is all `NO_TOKEN`.
        """
        B, W = logits_CBWV.shape[1:3]
        column_V = self._columns(kind.allowed)
        id_V = column_V + kind.allowed.low

        # A decoder that looks back is given the answer so far, as columns of its logits.
        past: dict[str, Any] = {}
        if kind.decoder.looks_back:
            column_of = {token: column for column, token in enumerate(id_V.tolist())}
            columns = []
            for lane in lanes:
                columns.append([column_of[token] for token in lane.tokens if token in column_of])
            past["past"] = columns

        # Combine the streams. The last position's logits also serve the tokens drawn ahead.
        conditional, *others = logits_CBWV.flatten(1, 2)
        logits_BWV = kind.decoder.logits(conditional, *(others or [None]), **past).view(B, W, -1)
        logits_BNV = torch.cat([logits_BWV, logits_BWV[:, -1:].expand(B, kind.ahead, -1)], 1)

        # Each noise value is a function of the sample's seed, the token's index in its answer, and
        # the id, so that it does not depend on the batch or on which tokens were drafts.
        key_B, begin_B = self._tensor([(lane.key, len(lane.tokens)) for lane in lanes]).T
        index_BN = begin_B[:, None] + torch.arange(W + kind.ahead, device=self._device)
        noise_BNV = gumbel_noise(
            key_B[:, None, None], index_BN[..., None] * self._vocab.size + id_V
        )
        token_BN = id_V[draw(logits_BNV, noise_BNV)]

        # From logits that are NaN, argmax would silently take the first id. The mark travels with
        # the tokens, so that nothing waits for the device here.
        finite_BW = logits_CBWV.isfinite().all(-1).all(0) & (logits_BWV.amax(-1) < torch.inf)
        return token_BN.where(finite_BW.all(-1, keepdim=True), NO_TOKEN)

    def search(self, kind: LaneKind, lane: Lane, logits_KV: Tensor) -> list[int]:
        """Take a step of beam search; return for each of the lane's rows the row it continues.

        When the run is over, the lane has chosen its best beam and the list is empty.
        """
        K, V = logits_KV.shape
        decoder, search = kind.decoder, lane.search
        beams = search.running or [Candidate(0.0, [])]  # at the start all rows are the same

        # 2 K candidates leave K to run on even if K of them end the run.
        before_B1 = torch.tensor([[beam.log_likelihood] for beam in beams], device=self._device)
        total_BV = decoder.logits(logits_KV)[: len(beams)] + before_B1
        best = total_BV.flatten().topk(min(2 * K, total_BV.numel()))

        column_V = self._columns(lane.allowed)
        running: list[Candidate] = []
        parents: list[int] = []
        for log_likelihood, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if math.isnan(log_likelihood):
                raise NotFiniteLogits(lane)
            if log_likelihood == -torch.inf and (running or search.finished):
                break  # only impossible beams are left

            # The grammar decides whether the run is over with this token.
            parent, token = index // V, int(column_V[index % V]) + lane.allowed.low
            beam = lane.follow(beams[parent], token, log_likelihood)
            if beam.allowed != lane.allowed:
                score = decoder.score(log_likelihood, len(beam.tokens))
                search.finished.append((score, beam))
            elif len(running) < K:
                running.append(beam)
                parents.append(parent)

        if not running or len(search.finished) >= K:
            lane.choose(max(search.finished, key=lambda each: (each[0], each[1].tokens))[1])
            return []

        # Where fewer tokens than beams are allowed, copies of the last one that can never win fill
        # the other rows.
        while len(running) < K:
            running.append(Candidate(-torch.inf, running[-1].tokens))
            parents.append(parents[-1])
        search.running = running
        return parents

    def _rows(self, lanes: list[Lane], streams: int) -> Tensor:
        """Rows (C, B) of the first streams of some lanes,
        as a tensor that is kept for later steps."""
        rows = []
        for stream in range(streams):
            for lane in lanes:
                rows.append(lane.rows[stream])
        numbers = tuple(rows)
        if numbers not in self._indices:
            if len(self._indices) > 1000:
                self._indices.clear()
            self._indices[numbers] = self._tensor(numbers)
        return self._indices[numbers].view(streams, -1)

    def _columns(self, allowed: Allowed) -> Tensor:
        """Ids that are allowed, counted from the lowest."""
        key = (-1, allowed.low, allowed.high, *allowed.closed)
        if key not in self._indices:
            ids = range(allowed.low, allowed.high)
            columns = [token - allowed.low for token in ids if token not in allowed.closed]
            self._indices[key] = self._tensor(columns)
        return self._indices[key]

    def _tensor(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


class NotFiniteLogits(NotFinite):
    """The logits of a lane cannot be drawn from; says whose they are."""

    def __init__(self, lane: Lane) -> None:
        super().__init__(
            f"the logits of token {lane.grown + 1} of the answer to request {lane.ticket} are NaN "
            "or infinite: the model's weights are damaged or have diverged, or the decoder's "
            "guidance is too strong for them"
        )
        self.ticket = lane.ticket
