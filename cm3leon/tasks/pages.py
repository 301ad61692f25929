"""Pages of several texts and images: an image given what stands before it, or the text behind one.

The page "a farm" I2 I9 "its cow" I4 I7 asks for its second image, and for the text behind its first
image, with

    <eos> a farm <break> I2 I9 <break> its cow <break>        then the image's codes
    <eos> a farm <break> I2 I9 <break>                        then text until <break> or <eos>

which are beginnings of the page as it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cm3leon.config import PositiveInt
from cm3leon.registry import TASKS
from cm3leon.tasks.base import Task, without_conditions
from cm3leon.tokenizers.document import prompt_until
from cm3leon.types import Modality, Prompt, Sample, TokenDocument, TokenSegment, UserError


class PageTask(Task):
    """Base of the tasks that ask for one segment of a page given what stands before it; what
    follows is not seen."""

    guided = True

    @dataclass(kw_only=True)
    class Config:
        """The image of the page that the task is about."""

        number: PositiveInt | None = None
        """Number of the image on the page, from 1; null: the last one."""

    config: Config

    def answer_index(self, page: TokenDocument) -> int:
        """Index of the segment that is asked for;
        the number of segments if it is to be appended."""
        raise NotImplementedError

    def beginning(self, page: TokenDocument) -> TokenDocument:
        """The page up to the segment that is asked for."""
        return replace(page, segments=page.segments[: self.answer_index(page)])

    def complete(self, query: TokenDocument, answer_T: np.ndarray) -> TokenDocument:
        index = self.answer_index(query)
        before, behind = query.segments[:index], query.segments[index:]
        answer = TokenSegment(self.answers_in, answer_T)
        if behind and behind[0].modality == self.answers_in:
            answer, behind = replace(behind[0], ids_T=answer_T), behind[1:]
        return replace(query, segments=(*before, answer, *behind))

    def shortened(self, query: TokenDocument) -> TokenDocument | None:
        """The page without its first segment, the farthest from the answer; one stays before it."""
        if self.config.number is not None or self.answer_index(query) < 2:
            return None
        return replace(query, segments=query.segments[1:])

    def keeps_given(self, query: TokenDocument, completed: TokenDocument) -> bool:
        given, kept = self.beginning(query).segments, self.beginning(completed).segments
        if len(given) != len(kept):
            return False
        for one, other in zip(given, kept, strict=True):
            if one.modality != other.modality or not np.array_equal(one.ids_T, other.ids_T):
                return False
        return True

    def image_index(self, page: TokenDocument) -> int:
        """Index of the image that the config names. Raises UserError for a page without it."""
        images = [index for index, each in enumerate(page.segments) if each.modality == "image"]
        number = self.config.number or len(images) or 1
        if number > len(images):
            raise UserError(
                f"document {page.id} has no image {number}, which this task is about: it has "
                f"{len(images)}"
            )
        return images[number - 1]

    def ask(
        self, page: TokenDocument, retrieved: Sequence[TokenDocument]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids of the prompt and of the unconditional stream: the page up to the answer."""

        def until_answer(begun: TokenDocument) -> np.ndarray:
            empty_text = TokenSegment("text", np.empty(0, np.int64))
            empty = self.fresh_image if self.answers_in == "image" else empty_text
            whole = replace(begun, segments=(*begun.segments, empty))
            return prompt_until(Sample(whole, tuple(retrieved)), self.vocab)

        given = self.beginning(page)
        unguided = without_conditions(given, self.answers_in, self.vocab)
        if unguided is None:
            return until_answer(given), None
        return until_answer(given), until_answer(unguided)


@TASKS.register("page_image")
class PageImage(PageTask):
    """An image of a page given what stands before it;
    the unconditional stream has a mask for each text."""

    retrieves_by: Modality = "text"
    answers_in: Modality = "image"
    asked_again = True

    def answer_index(self, page: TokenDocument) -> int:
        return self.image_index(page)

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        ids_T, unconditional_T = self.ask(query, retrieved)
        return self.image_prompt(ids_T, unconditional_T)


@TASKS.register("page_text")
class PageText(PageTask):
    """The text behind an image of a page, until the next segment or the page's end.

    The unconditional stream has a mask for each image.
    """

    retrieves_by: Modality = "image"
    answers_in: Modality = "text"

    @dataclass(kw_only=True)
    class Config(PageTask.Config):
        """Which image, and how long the text behind it may be."""

        max_tokens: PositiveInt = 64
        """The text is cut at this many tokens."""

    config: Config

    def answer_index(self, page: TokenDocument) -> int:
        return self.image_index(page) + 1

    def prompt(self, query: TokenDocument, retrieved: Sequence[TokenDocument] = ()) -> Prompt:
        ids_T, unconditional_T = self.ask(query, retrieved)
        return Prompt(
            ids_T,
            "text",
            self.config.max_tokens,
            self.vocab.layout.end,
            unconditional_T,
            also_ends=self.vocab.layout.before_an_image[:1],
        )
