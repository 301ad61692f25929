"""A question about an image, in turns, as public chat models were tuned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cm3leon.registry import TASKS
from cm3leon.tasks.base import TextOfImage
from cm3leon.tokenizers.document import lay_out
from cm3leon.types import Prompt, Sample, TokenDocument


@TASKS.register("chat")
class Chat(TextOfImage):
    """`<s> question <break> image <end_of_span> <end of turn>`, then text until `</s>`.

    This is the form of transformers' ChameleonProcessor for chat. In a layout without a token that
    ends a turn, the question ends where a sample would.
    """

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        layout = self.vocab.layout
        asked_T = lay_out(Sample(query, tuple(retrieved)), self.vocab).ids_T[:-1]
        turn_T = np.array(layout.turn or (layout.end,), np.int64)
        ids_T = np.concatenate([asked_T, turn_T])
        return Prompt(ids_T, "text", self.config.max_tokens, layout.end)
