"""The CM3 objective on instructions (paper section 4.2): the answer is generated last."""

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
    """Spans chosen by the roles of segments: an answer is rotated whole, as a prompt asks for it.

        <eos> Question: what color? Answer:<mask:0>. <break> I7 I2 <eos> <mask:0> red <end_of_span>

    An image that is asked for stays last and whole. What it is drawn by is sometimes masked, which
    trains the streams that guidance by two conditions needs. Samples without roles are corrupted as
    by the CM3 objective.
    """

    @dataclass(kw_only=True)
    class Config(CM3.Config):
        """This project's choices; the paper states none of them."""

        rotate_answer: Probability = 0.8
        """Share of the samples with a text answer whose answer is rotated; the others stay as they
        are, which keeps text to image alive."""
        mask_instruction: Probability = 0.1
        """Share of the samples that ask for an image whose instruction is masked."""
        mask_all: Probability = 0.05
        """Share of the samples that ask for an image whose instruction
        and given images are masked."""
        answer_weight: NonNegativeFloat = 1.0
        """Weight of an answer's tokens in the loss."""

    config: Config

    def take(
        self, sample: LaidOut, start: int, room: int, rng: np.random.Generator
    ) -> tuple[Corrupted, int]:
        # Spans by role: they are masked only if the piece leaves room for them.
        if any(segment.role for segment in sample.segments):
            return Objective.take(self, sample, start, room, rng)
        return super().take(sample, start, room, rng)

    def draw_spans(self, sample: LaidOut, rng: np.random.Generator, max_tokens: int) -> list[Span]:
        # Retrieved documents stay as they are.
        query = [segment for segment in sample.segments if segment.is_query]
        roles = {segment.role for segment in query}
        if roles <= {""}:
            return super().draw_spans(sample, rng, max_tokens)

        # One draw decides what is masked.
        masked: set[Role] = set()
        chance = rng.random()
        if "answer" in roles:
            if chance < self.config.rotate_answer:
                masked = {"answer"}
        elif chance < self.config.mask_all:
            masked = {"instruction", "condition"}
        elif chance < self.config.mask_all + self.config.mask_instruction:
            masked = {"instruction"}
        spans = [(segment.start, segment.end) for segment in query if segment.role in masked]

        # All of them are masked or none: a part of them would be another question.
        length = len(sample.ids_T) + EXTRA * len(spans)
        if length > max_tokens or len(spans) >= self.vocab.sentinels:
            return []
        return [(start, end) for start, end in spans if start < end]

    def _weights(self, sample: LaidOut) -> np.ndarray:
        weight_T = super()._weights(sample)
        for segment in sample.segments:
            if segment.role == "answer":
                weight_T[segment.start : segment.end] *= self.config.answer_weight
        return weight_T
