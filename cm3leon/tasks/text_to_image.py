"""Text to image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cm3leon.registry import TASKS
from cm3leon.tasks.base import Task, required, with_segment
from cm3leon.tokenizers.document import lay_out
from cm3leon.types import Modality, Prompt, Sample, TokenDocument, TokenSegment


@TASKS.register("text_to_image")
class TextToImage(Task):
    """`<eos> [documents] caption <break>`, then the image; the unconditional stream has `<mask:0>` for the caption."""

    retrieves_by: Modality = "text"
    answers_in: Modality = "image"
    guided = True
    asked_again = True

    @dataclass(kw_only=True)
    class Config:
        """What guidance compares with."""

        unconditional_documents: Literal["keep", "drop"] = "keep"
        """Whether the unconditional stream sees the retrieved documents."""

    config: Config

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        caption = required(query, "text")
        mask = TokenSegment("text", np.array([self.vocab.sentinel(0)]))
        unconditional = retrieved if self.config.unconditional_documents == "keep" else ()
        return Prompt(
            self._ask(query.id, caption, retrieved),
            "image",
            self.image_codes,
            self.vocab.eos,
            self._ask(query.id, mask, unconditional),
        )

    def complete(self, query: TokenDocument, answer_T: np.ndarray) -> TokenDocument:
        return with_segment(query, "image", answer_T)

    def _ask(self, id_: str, text: TokenSegment, retrieved: Sequence[TokenDocument]) -> np.ndarray:
        no_image = TokenSegment("image", np.empty(0, np.int64))
        asked = Sample(TokenDocument(id_, (text, no_image)), tuple(retrieved))
        return lay_out(asked, self.vocab).ids_T[
            :-1
        ]  # without the <eos> that would close an empty image
