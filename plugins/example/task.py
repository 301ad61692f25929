"""Infilling of the middle of an image, in the form that fill-in-the-middle trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cm3leon.config import Probability
from cm3leon.registry import TASKS
from cm3leon.tasks.base import required
from cm3leon.tasks.infill import Infilling
from cm3leon.tokenizers.document import lay_out
from cm3leon.types import Prompt, Sample, TokenDocument

from .objective import Range, rearrange


@TASKS.register("infill_middle")
class InfillMiddle(Infilling):
    """The caption, the top and the bottom of the image are given, the codes between are asked for;
    what is given stays.

    `<eos> [documents] <mask:0> caption <break> top <mask:1> bottom <mask:2>`, then the middle.
    """

    @dataclass(kw_only=True)
    class Config:
        """How much is missing."""

        share: Probability = 0.5
        """Share of the image's tokens that is asked for; one at least."""

    config: Config

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        required(query, "text")
        required(query, "image")
        sample = lay_out(Sample(query, tuple(retrieved)), self.vocab)
        own = [segment for segment in sample.segments if segment.is_query]
        image = next(segment for segment in own if segment.modality == "image")
        start, end = self.span
        middle = image.start + start, image.start + end
        ids_T = rearrange(sample.ids_T, (own[0].start, own[-1].end), middle, self.vocab)
        asked_T = ids_T[
            : len(ids_T) - (end - start) - 1
        ]  # without the answer and the <eos> behind it
        closed = self.vocab.layout.row_ends(self.grid[1], start, end)
        return Prompt(asked_T, "image", end - start, self.vocab.layout.end, closed=closed)

    @property
    def span(self) -> Range:
        missing = max(1, round(self.config.share * self.image_tokens))
        start = (self.image_tokens - missing) // 2
        return start, start + missing
