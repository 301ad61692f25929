"""Instructions: a document with roles becomes the prompt for what it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cm3leon.config import PositiveInt
from cm3leon.registry import TASKS
from cm3leon.tasks.base import Task, masked
from cm3leon.tasks.prompts import AskedSpan, spans_prompt
from cm3leon.tokenizers.document import prompt_until
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Modality, Prompt, Role, Sample, TokenDocument, UserError


@TASKS.register("instruction")
class Instruction(Task):
    """Asks for a document's answer in text, or where it has none, for its last image.

    In text: `<eos> Question: what color? Answer:<mask:0>. <break> I7 I2 <eos> <mask:0>`, then the
    answer until `<end_of_span>`. An image: everything before it; the unconditional stream has masks
    for instruction and conditions, and where there are conditions, a third one for the instruction
    alone.
    """

    retrieves_by: Modality = "text"
    answers_in: Modality = "image"  # of most tasks; a prompt says which it is
    guided = True

    @dataclass(kw_only=True)
    class Config:
        """How long an answer may be."""

        max_tokens: PositiveInt = 64
        """An answer in text is cut at this many tokens."""

    config: Config

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        place = answer_place(query)
        segments = list(query.segments)
        if segments[place].modality == "text":
            segments[place] = replace(
                segments[place], ids_T=np.array([self.vocab.pad])
            )  # only its place is kept
            asked = replace(query, segments=tuple(segments))
            ids_T = spans_prompt(asked, [AskedSpan(place, 0, 1)], retrieved, self.vocab)
            return Prompt(ids_T, "text", self.config.max_tokens, self.vocab.end_of_span)
        segments[place] = replace(self.fresh_image, role=segments[place].role)
        asked = replace(query, segments=tuple(segments))

        def ask(*masked: Role) -> np.ndarray:
            sample = Sample(with_masks(asked, masked, self.vocab), tuple(retrieved))
            return prompt_until(sample, self.vocab)

        roles = {segment.role for segment in segments}
        return self.image_prompt(
            ask(),
            ask("instruction", "condition"),
            ask("instruction") if "condition" in roles else None,
        )

    def complete(self, query: TokenDocument, answer_T: np.ndarray) -> TokenDocument:
        place = answer_place(query)
        segments = list(query.segments)
        segments[place] = replace(segments[place], ids_T=answer_T)
        return replace(query, segments=tuple(segments))

    def keeps_given(self, query: TokenDocument, completed: TokenDocument) -> bool:
        place = answer_place(query)
        return len(query.segments) == len(completed.segments) and all(
            np.array_equal(one.ids_T, other.ids_T)
            for number, (one, other) in enumerate(
                zip(query.segments, completed.segments, strict=True)
            )
            if number != place
        )


def answer_place(document: TokenDocument) -> int:
    """Number of the segment that is asked for: the answer, or the last image.
    Raises UserError without either."""
    answers = [
        number for number, segment in enumerate(document.segments) if segment.role == "answer"
    ]
    if answers:
        return answers[0]
    last = len(document.segments) - 1
    if last < 0 or document.segments[last].modality != "image" or document.segments[last].role:
        raise UserError(
            f"document {document.id} asks for nothing: it has no answer, and does not end in an "
            "image"
        )
    return last


def with_masks(document: TokenDocument, roles: Collection[Role], vocab: Vocab) -> TokenDocument:
    """The document with a sentinel in the place of each segment of some roles,
    as training masks them."""
    places = [place for place, segment in enumerate(document.segments) if segment.role in roles]
    return masked(document, places, vocab)
