"""Image to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cm3leon.config import PositiveInt
from cm3leon.registry import TASKS
from cm3leon.tasks.base import Task, infilling_prompt, required, with_segment
from cm3leon.types import Modality, Prompt, Sample, TokenDocument, TokenSegment


@TASKS.register("caption")
class Caption(Task):
    """`<eos> [documents] <mask:0> <break> image <eos> <mask:0>`,
    then text until `<end_of_span>`."""

    retrieves_by: Modality = "image"
    answers_in: Modality = "text"

    @dataclass(kw_only=True)
    class Config:
        """How long a caption may be."""

        max_tokens: PositiveInt = 64
        """A caption is cut at this many tokens."""

    config: Config

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        unknown = TokenSegment(
            "text", np.array([self.vocab.pad])
        )  # its place is all that the prompt keeps of it
        asked = TokenDocument(query.id, (unknown, required(query, "image")))
        return infilling_prompt(
            Sample(asked, tuple(retrieved)),
            "text",
            (0, 1),
            self.vocab,
            length=self.config.max_tokens,
        )

    def complete(self, query: TokenDocument, answer_T: np.ndarray) -> TokenDocument:
        return with_segment(query, "text", answer_T)
