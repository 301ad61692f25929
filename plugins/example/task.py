"""Infilling of the middle of an image, in the form that fill-in-the-middle trains.

With the image codes I1 .. I8, of which the middle half is asked for:

    prompt    <eos> <mask:0> a red dog <break> I1 I2 <mask:1> I7 I8 <mask:2>
    answer    I3 I4 I5 I6

The tokens that a layout sets around an image stand around its codes here, too.
"""

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
    """The caption and the top and bottom of an image are given, and the codes between are asked
    for; what is given stays.

    `<eos> [documents] <mask:0> caption <break> top <mask:1> bottom <mask:2>`, then the middle.
    """

    @dataclass(kw_only=True)
    class Config:
        """How much of the image is missing."""

        share: Probability = 0.5
        """Share of the image's tokens that is asked for; at least one token is."""

    config: Config

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        required(query, "text")
        required(query, "image")

        # The sample that the objective would train, with the missing part as its middle.
        sample = lay_out(Sample(query, tuple(retrieved)), self.vocab)
        own = [segment for segment in sample.segments if segment.is_query]
        image = next(segment for segment in own if segment.modality == "image")
        start, end = self.span
        middle = image.start + start, image.start + end
        ids_T = rearrange(sample.ids_T, (own[0].start, own[-1].end), middle, self.vocab)

        # The prompt ends before the answer and the <eos> behind it.
        asked_T = ids_T[: len(ids_T) - (end - start) - 1]
        closed = self.vocab.layout.row_ends(self.grid[1], start, end)
        return Prompt(asked_T, "image", end - start, self.vocab.layout.end, closed=closed)

    @property
    def span(self) -> Range:
        """The positions [start, end) of the image that are asked for."""
        missing = max(1, round(self.config.share * self.image_tokens))
        start = (self.image_tokens - missing) // 2
        return start, start + missing
