"""Text to image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cm3leon.registry import TASKS
from cm3leon.tasks.base import Task, required, with_segment
from cm3leon.tokenizers.document import prompt_until
from cm3leon.types import Modality, Prompt, Sample, TokenDocument, TokenSegment


@TASKS.register("text_to_image")
class TextToImage(Task):
    """`<eos> [documents] caption <break>`, then the image; in the unconditional stream `<mask:0>`
    stands for the caption."""

    retrieves_by: Modality = "text"
    answers_in: Modality = "image"
    guided = True
    asked_again = True

    @dataclass(kw_only=True)
    class Config:
        """The unconditional stream that guidance compares with."""

        unconditional_documents: Literal["keep", "drop"] = "keep"
        """Whether the unconditional stream sees the retrieved documents."""
        unconditional_text: Literal["mask", "none"] | None = None
        """What stands for the caption in the unconditional stream: a mask, as in the paper, or
        nothing; null: as the layout says."""

    config: Config

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        caption = required(query, "text")
        mask = TokenSegment("text", np.array([self.vocab.sentinel(0)]))
        others = retrieved if self.config.unconditional_documents == "keep" else ()
        convention = self.config.unconditional_text or self.vocab.layout.unconditional_text
        nothing = (mask,) if convention == "mask" else ()
        return self.image_prompt(
            self._ask(query.id, (caption,), retrieved), self._ask(query.id, nothing, others)
        )

    def complete(self, query: TokenDocument, answer_T: np.ndarray) -> TokenDocument:
        return with_segment(query, "image", answer_T)

    def _ask(
        self, id_: str, before: Sequence[TokenSegment], retrieved: Sequence[TokenDocument]
    ) -> np.ndarray:
        asked = TokenDocument(id_, (*before, self.fresh_image))
        return prompt_until(Sample(asked, tuple(retrieved)), self.vocab)
