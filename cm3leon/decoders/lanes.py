"""Lane: a sample in the making, with its tokens, its grammar, its drafts and its beam search.

How drafts are accepted, for a window of 4 and the drafts 4, 8, 1 behind the last token 9:

    input of the step     9  4  8  1
    drawn behind each     4  8  5  7      the draws behind 9 and 4 confirm the drafts 4 and 8;
                                          the draw behind 8 is 5, so that the draft 1 was wrong
    tokens taken          4  8  5         the next input is 5, its drafts are 7 and what was ahead
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cm3leon.decoders.base import Decoder
from cm3leon.decoders.grammar import Allowed, Grammar, NewGrammar, exactly
from cm3leon.types import Modality


class LaneKind(NamedTuple):
    """What lanes must have in common to choose their tokens in one batched operation."""

    allowed: Allowed
    decoder: Decoder
    rows: int
    drafts: int
    """Drafts of a lane that the step checks."""
    ahead: int
    """Tokens drawn ahead as drafts of the next step, from the logits of the next token."""

    @property
    def searches(self) -> bool:
        """Whether the rows of a lane are beams instead of streams."""
        return self.decoder.beams > 0 and self.allowed.forced is None

    @property
    def streams(self) -> int:
        """Rows of a lane whose logits are needed."""
        return self.decoder.beams if self.searches else min(self.decoder.streams, self.rows)


@dataclass(eq=False)
class Candidate:
    """A beam: the first tokens of the run that is searched, and the grammar's state behind them."""

    log_likelihood: float
    tokens: list[int]
    grammar: Grammar | None = None
    """None: replayed from the tokens when the beam is extended, as a generator has no copy."""
    allowed: Allowed | None = None
    """What may come next; None if the answer ends here."""


@dataclass
class BeamSearch:
    """Beam search of one run of tokens, a text or an image: the grammar allows the same ids for it.

    When the run is over, the best beam is chosen and the answer continues from it.
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
    """Start of its stream of random numbers."""
    tokens: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    """Guesses of the tokens behind the last one, which the next step checks."""
    search: BeamSearch = field(default_factory=BeamSearch)
    chosen: list[int] = field(default_factory=list)
    """Tokens that a finished search found. The next steps take them one by one, which writes
    their keys and values to the cache of all rows."""
    finished: bool = False

    @property
    def grown(self) -> int:
        """Tokens generated so far, those of a running search included."""
        searched = len(self.search.running[0].tokens) if self.search.running else 0
        return len(self.tokens) + searched

    def follow(self, beam: Candidate, token: int, log_likelihood: float) -> Candidate:
        """Extend a beam by one token. The first child inherits its grammar, others replay it."""
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
        """End the search with its best beam."""
        self.search = BeamSearch()
        if beam.allowed is None:
            self.tokens += beam.tokens
            self.finished = True
        else:
            self.chosen = beam.tokens[1:]
            self.take(beam.tokens[:1], 0)

    def kind(self, window: int) -> LaneKind:
        """How the next tokens are chosen, in a window of so many tokens."""
        decoder = self.decoders[self.allowed.modality]
        if self.chosen:
            return LaneKind(exactly(self.chosen[0]), decoder, len(self.rows), 0, 0)

        # Only image codes have drafts. A decoder that looks at the answer so far, or searches,
        # needs each token before it can choose the next one.
        one_by_one = decoder.looks_back or decoder.beams > 0
        ahead = 0
        if self.allowed.modality == "image" and not one_by_one:
            ahead = window - 1
        drafts = min(len(self.drafts), ahead)
        return LaneKind(self.allowed, decoder, len(self.rows), drafts, ahead)

    def next_inputs(self, row: int, window: int) -> list[int]:
        """The window of one of its rows: its last token, then its drafts, then zeros."""
        if self.search.running:
            # Beams have no drafts: what stands behind the token is never read.
            beams = self.search.running
            return [beams[min(row, len(beams) - 1)].tokens[-1]] * window

        self.drafts = self.drafts[: window - 1]
        unused = window - 1 - len(self.drafts)
        return [self.tokens[-1], *self.drafts, *[0] * unused]

    def take(self, drawn: Sequence[int], drafts: int) -> None:
        """Take the drawn tokens up to the first wrong draft; what was drawn beyond become drafts.

        Args:
            drawn: what was drawn behind the last token, behind each draft, and ahead.
            drafts: how many drafts the step checked.
        """
        asked = self.allowed
        for count, token in enumerate(drawn[: 1 + drafts], 1):
            self.tokens.append(token)
            try:
                self.allowed = self.grammar.send(token)
            except StopIteration:
                self.finished = True
                return
            # What was drawn behind it holds only if the draft was right and the ids are the same.
            wrong_draft = count <= drafts and token != self.drafts[count - 1]
            if wrong_draft or self.allowed != asked:
                break
        self.drafts = [*drawn[count:]]
