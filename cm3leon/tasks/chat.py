"""A question about an image, asked in turns as chat models of public weights were tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cm3leon.config import PositiveInt
from cm3leon.registry import TASKS
from cm3leon.tasks.base import Task, with_segment
from cm3leon.tokenizers.document import lay_out
from cm3leon.types import Modality, Prompt, Sample, TokenDocument


@TASKS.register("chat")
class Chat(Task):
    """`<s> question <break> image <end_of_span> <end of turn>`, then text until `</s>`.

    The form is transformers' ChameleonProcessor's for chat. Where a layout has no token that ends a
    turn, the question ends where a sample would.
    """

    retrieves_by: Modality = "image"
    answers_in: Modality = "text"

    @dataclass(kw_only=True)
    class Config:
        """How long an answer may be."""

        max_tokens: PositiveInt = 64
        """An answer is cut at this many tokens."""

    config: Config

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        layout = self.vocab.layout
        asked_T = lay_out(Sample(query, tuple(retrieved)), self.vocab).ids_T[:-1]
        turn_T = np.array(layout.turn or (layout.end,), np.int64)
        ids_T = np.concatenate([asked_T, turn_T])
        return Prompt(ids_T, "text", self.config.max_tokens, layout.end)

    def complete(self, query: TokenDocument, answer_T: np.ndarray) -> TokenDocument:
        return with_segment(query, "text", answer_T)
