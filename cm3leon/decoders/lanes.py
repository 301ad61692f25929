"""A sample in the making: its tokens so far, what its grammar allows next,
its drafts and its beam search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cm3leon.decoders.base import Decoder
from cm3leon.decoders.grammar import Allowed, Grammar, NewGrammar, exactly
from cm3leon.types import Modality


class LaneKind(NamedTuple):
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
class Candidate:
    """A beginning of the run of tokens that is searched, and where the grammar stands behind it."""

    log_likelihood: float
    tokens: list[int]
    grammar: Grammar | None = None
    """None = made anew when the beam goes on; a grammar cannot be copied."""
    allowed: Allowed | None = None
    """What may come next; None where the answer ends."""


@dataclass
class BeamSearch:
    """Beam search of one run of tokens: of those that the grammar takes from the same ids,
    a text or an image.

    When the run is over the best beam is chosen, and what follows goes on from it.
    """

    running: list[Candidate] = field(default_factory=list)
    finished: list[tuple[float, Candidate]] = field(default_factory=list)
    """Beams whose run is over, with their scores."""


@dataclass(eq=False)
class Lane:
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
    search: BeamSearch = field(default_factory=BeamSearch)
    chosen: list[int] = field(default_factory=list)
    """What a search has found: these tokens come next, so that the cache holds them in all rows."""
    finished: bool = False

    @property
    def grown(self) -> int:
        """Tokens behind its prompt, in the making."""
        searched = len(self.search.running[0].tokens) if self.search.running else 0
        return len(self.tokens) + searched

    def follow(self, beam: Candidate, token: int, log_likelihood: float) -> Candidate:
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
            return Candidate(log_likelihood, tokens)
        return Candidate(log_likelihood, tokens, grammar, allowed)

    def choose(self, beam: Candidate) -> None:
        """Ends the search with its best beam."""
        self.search = BeamSearch()
        if beam.allowed is None:
            self.tokens += beam.tokens
            self.finished = True
        else:
            self.chosen = beam.tokens[1:]
            self.take(beam.tokens[:1], 0)

    def kind(self, window: int) -> LaneKind:
        """How its next token is chosen, by an engine that computes `window` tokens
        of a sample in a step."""
        decoder = self.decoders[self.allowed.modality]
        if self.chosen:
            return LaneKind(exactly(self.chosen[0]), decoder, len(self.rows), 0, 0)
        one_by_one = decoder.looks_back or decoder.beams > 0
        ahead = window - 1 if self.allowed.modality == "image" and not one_by_one else 0
        drafts = min(len(self.drafts), ahead)
        return LaneKind(self.allowed, decoder, len(self.rows), drafts, ahead)

    def next_inputs(self, row: int, window: int) -> list[int]:
        """The last token of one of its rows, and its drafts; of beams, which have no drafts,
        the token alone counts."""
        if self.search.running:
            beams = self.search.running
            return [beams[min(row, len(beams) - 1)].tokens[-1]] * window
        self.drafts = self.drafts[: window - 1]
        return [self.tokens[-1], *self.drafts, *[0] * (window - 1 - len(self.drafts))]

    def take(self, drawn: Sequence[int], drafts: int) -> None:
        """Takes the tokens that were drawn behind its last one and behind drafts,
        as far as those were right.

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
