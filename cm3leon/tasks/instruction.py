"""Instructions: a document whose segments have roles becomes the prompt for its answer."""

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
    """Ask for a document's text answer, or for its last image if it has none.

    A text: `<eos> Question: what color? Answer:<mask:0>. <break> I7 I2 <eos> <mask:0>`, then the
    answer until `<end_of_span>`. An image: everything before it; the unconditional stream has masks
    for instruction and conditions, and with conditions a third stream has one for the instruction
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
        index = answer_index_of(query)
        segments = list(query.segments)

        # A text is a span of one token; the prompt keeps only its position.
        if segments[index].modality == "text":
            segments[index] = replace(segments[index], ids_T=np.array([self.vocab.pad]))
            asked = replace(query, segments=tuple(segments))
            ids_T = spans_prompt(asked, [AskedSpan(index, 0, 1)], retrieved, self.vocab)
            return Prompt(ids_T, "text", self.config.max_tokens, self.vocab.end_of_span)

        # An image is generated behind everything else, with streams for guidance.
        segments[index] = replace(self.fresh_image, role=segments[index].role)
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
        index = answer_index_of(query)
        segments = list(query.segments)
        segments[index] = replace(segments[index], ids_T=answer_T)
        return replace(query, segments=tuple(segments))

    def keeps_given(self, query: TokenDocument, completed: TokenDocument) -> bool:
        index = answer_index_of(query)
        if len(query.segments) != len(completed.segments):
            return False
        given = [*query.segments[:index], *query.segments[index + 1 :]]
        kept = [*completed.segments[:index], *completed.segments[index + 1 :]]
        pairs = zip(given, kept, strict=True)
        return all(np.array_equal(one.ids_T, other.ids_T) for one, other in pairs)


def answer_index_of(document: TokenDocument) -> int:
    """Index of the segment that is asked for: the answer, or the last image.

    Raises:
        UserError: for a document without either.
    """
    for index, segment in enumerate(document.segments):
        if segment.role == "answer":
            return index
    last = len(document.segments) - 1
    if last < 0 or document.segments[last].modality != "image" or document.segments[last].role:
        raise UserError(
            f"document {document.id} asks for nothing: it has no answer, and does not end in an "
            "image"
        )
    return last


def with_masks(document: TokenDocument, roles: Collection[Role], vocab: Vocab) -> TokenDocument:
    """The document with a sentinel for each segment that has one of these roles, as in training."""
    indices = [index for index, each in enumerate(document.segments) if each.role in roles]
    return masked(document, indices, vocab)
