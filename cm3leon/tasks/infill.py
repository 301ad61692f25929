"""Infilling of half an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cm3leon.objectives.cm3 import Span
from cm3leon.registry import TASKS
from cm3leon.tasks.base import (
    Task,
    infilling_prompt,
    required,
    with_segment,
    without_conditions,
)
from cm3leon.types import Modality, Prompt, Sample, TokenDocument


class Infilling(Task):
    """Base of the tasks that ask for some codes of an image,
    given the caption and the other codes."""

    retrieves_by: Modality = "text"
    answers_in: Modality = "image"

    @property
    def span(self) -> Span:
        """Tokens [start, end) of the image that are asked for; codes run row by row."""
        raise NotImplementedError

    def complete(self, query: TokenDocument, answer_T: np.ndarray) -> TokenDocument:
        start, end = self.span
        ids_T = required(query, "image").ids_T.copy()
        ids_T[start:end] = answer_T
        return with_segment(query, "image", ids_T)

    def keeps_given(self, query: TokenDocument, completed: TokenDocument) -> bool:
        start, end = self.span
        old_T = np.delete(required(query, "image").ids_T, np.s_[start:end])
        new_T = np.delete(required(completed, "image").ids_T, np.s_[start:end])
        return super().keeps_given(query, completed) and np.array_equal(old_T, new_T)


@TASKS.register("infill")
class Infill(Infilling):
    """Given the caption and one half of an image, generate the other half; what is given stays.

    In the unconditional stream `<mask:1>` stands for the caption; `<mask:0>` is the half that is
    asked for.
    """

    guided = True

    @dataclass(kw_only=True)
    class Config:
        """The half that is missing."""

        half: Literal["top", "bottom"] = "bottom"
        """The half of the image that is generated."""

    config: Config

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        required(query, "text")
        required(query, "image")

        def ask(document: TokenDocument) -> Prompt:
            sample, span = Sample(document, tuple(retrieved)), self.span
            return infilling_prompt(
                sample,
                "image",
                span,
                self.vocab,
                length=span[1] - span[0],
                closed=self.vocab.layout.row_ends(self.grid[1], *span),
            )

        prompt, unguided = ask(query), without_conditions(query, "image", self.vocab, spans=1)
        if unguided is None:
            return prompt
        return replace(prompt, unconditional_T=ask(unguided).ids_T)

    @property
    def span(self) -> Span:
        rows, columns = self.grid
        middle = rows // 2 * self.vocab.layout.row_length(columns)
        return (0, middle) if self.config.half == "top" else (middle, self.image_tokens)


TASKS.preset("infill_top", of="infill", half="top")
TASKS.preset("infill_bottom", of="infill", half="bottom")
