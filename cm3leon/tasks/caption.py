"""Image to text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cm3leon.registry import TASKS
from cm3leon.tasks.base import TextOfImage, infilling_prompt, required
from cm3leon.types import Prompt, Sample, TokenDocument, TokenSegment


@TASKS.register("caption")
class Caption(TextOfImage):
    """`<eos> [documents] <mask:0> <break> image <eos> <mask:0>`,
    then text until `<end_of_span>`."""

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        # A token to ask for: the prompt keeps only its position.
        unknown = TokenSegment("text", np.array([self.vocab.pad]))
        asked = TokenDocument(query.id, (unknown, required(query, "image")))
        return infilling_prompt(
            Sample(asked, tuple(retrieved)),
            "text",
            (0, 1),
            self.vocab,
            length=self.config.max_tokens,
        )
