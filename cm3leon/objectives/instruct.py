"""The CM3 objective on instructions (paper section 4.2):
what is asked for is what is generated last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cm3leon.config import NonNegativeFloat, Probability
from cm3leon.objectives.base import Corrupted, Objective
from cm3leon.objectives.cm3 import CM3, EXTRA, Span
from cm3leon.registry import OBJECTIVES
from cm3leon.tokenizers.document import LaidOut
from cm3leon.types import Role


@OBJECTIVES.register("instruct")
class Instruct(CM3):
    """Spans by the roles of segments: an answer is rotated whole, as a prompt asks for it.

    `<eos> Question: what color? Answer:<mask:0>. <break> I7 I2 <eos> <mask:0> red <end_of_span>`

    Where an image is asked for, it stays last and whole, and what it is drawn by is masked at
    times, which trains the streams of guidance by two conditions. Samples without roles are as the
    CM3 objective has them.
    """

    @dataclass(kw_only=True)
    class Config(CM3.Config):
        """This project's reading; the paper states none of these."""

        rotate_answer: Probability = 0.8
        """Of samples with an answer in text; the others stay as they are,
        which keeps text to image alive."""
        mask_instruction: Probability = 0.1
        """Of samples that ask for an image: the instruction is masked."""
        mask_all: Probability = 0.05
        """Of samples that ask for an image: the instruction
        and the images that it is about are masked."""
        answer_weight: NonNegativeFloat = 1.0
        """Weight of an answer's tokens in the loss."""

    config: Config

    def take(
        self, sample: LaidOut, start: int, room: int, rng: np.random.Generator
    ) -> tuple[Corrupted, int]:
        if any(segment.role for segment in sample.segments):
            return Objective.take(
                self, sample, start, room, rng
            )  # masks where the rest of a sample has room for them
        return super().take(sample, start, room, rng)

    def draw_spans(self, sample: LaidOut, rng: np.random.Generator, max_tokens: int) -> list[Span]:
        own = [
            segment for segment in sample.segments if segment.is_query
        ]  # retrieved documents stay as they are
        roles = {segment.role for segment in own}
        if roles <= {""}:
            return super().draw_spans(sample, rng, max_tokens)
        masked: set[Role] = set()
        chance = rng.random()
        if "answer" in roles:
            masked = {"answer"} if chance < self.config.rotate_answer else set()
        elif chance < self.config.mask_all:
            masked = {"instruction", "condition"}
        elif chance < self.config.mask_all + self.config.mask_instruction:
            masked = {"instruction"}
        spans = [(segment.start, segment.end) for segment in own if segment.role in masked]
        fits = (
            len(sample.ids_T) + EXTRA * len(spans) <= max_tokens
            and len(spans) < self.vocab.sentinels
        )
        return [span for span in spans if span[0] < span[1]] if fits else []

    def _weights(self, sample: LaidOut) -> np.ndarray:
        weight_T = super()._weights(sample)
        for segment in sample.segments:
            if segment.role == "answer":
                weight_T[segment.start : segment.end] *= self.config.answer_weight
        return weight_T
