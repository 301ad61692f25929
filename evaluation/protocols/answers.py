"""Questions and images of published data sets, answered in text (the paper's table 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from cm3leon.config import Component, PositiveInt, Probability
from cm3leon.data.instructions.base import InstructionSource
from cm3leon.data.source import Skipped
from cm3leon.evaluation.answers import ndcg, option_of, vqa_accuracy
from cm3leon.evaluation.captions import caption_figures
from cm3leon.evaluation.metrics import Measured, average, proportion
from cm3leon.evaluation.protocols.base import (
    MAX_TOKENS,
    Answer,
    Item,
    Protocol,
    check_missing,
)
from cm3leon.registry import PROTOCOLS, SOURCES
from cm3leon.types import Document, UserError


@PROTOCOLS.register("ranked_answers")
class RankedAnswers(Protocol):
    """Candidates ranked by their log-likelihoods, measured by VisDial's NDCG over its dense
    annotations."""

    answers_in = "text"
    ranks = True
    has_truth = False

    @dataclass(kw_only=True)
    class Config:
        """The data set."""

        data: Annotated[Component, SOURCES]
        """A source of rated candidates: visdial with `relevance`."""
        count: PositiveInt | None = None
        """Number of items, the first ones; null: all."""
        missing: Probability = 0.01
        """Share of the items that may be unusable, for example because an image is missing."""

        def check(self) -> None:
            if self.data.name != "visdial" or not self.data.config.relevance:
                raise UserError(
                    "data must be visdial with its dense annotations: data.name=visdial and "
                    "data.relevance=FILE"
                )

    config: Config

    def items(self) -> list[Item]:
        return self._items()

    def items_squared(self, size: int) -> list[Item]:
        return self._items(size)

    def _items(self, size: int | None = None) -> list[Item]:
        found = asked_items(self.config.data, self.config.count, self.config.missing, size)
        items = []
        for document, example in found:
            truth, options = example.relevance, example.options
            items.append(Item(document.id, "instruction", document, truth, options=options))
        return items

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        values = []
        for item, answer in zip(items, answers, strict=True):
            values.append(ndcg(list(_scores(answer)), item.truth))
        return {"NDCG": average(np.array(values))}

    def fingerprint(self) -> str:
        return SOURCES.build(self.config.data).fingerprint()


@PROTOCOLS.register("answers")
class TextAnswers(Protocol):
    """Answers in text to each image or question of a source, measured by the rule of its data
    set."""

    answers_in = "text"
    has_truth = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        task = SOURCES.get(config.data.name).task_of(config.data.config)
        self.max_tokens = MAX_TOKENS.get(str(task), Protocol.max_tokens)

    @dataclass(kw_only=True)
    class Config:
        """The data set, and how it is measured."""

        data: Annotated[Component, SOURCES]
        """A source of instructions in its evaluation split."""
        measure: Literal["vqa", "options", "captions"]
        """vqa: the official accuracy over ten answers. options: the option that an answer names
        (ScienceQA). captions: CIDEr and other scores against all captions of an image."""
        count: PositiveInt | None = None
        """Number of items, the first ones; null: all."""
        missing: Probability = 0.01
        """Share of the items that may be unusable, for example because an image is missing."""

        def check(self) -> None:
            if not issubclass(SOURCES.get(self.data.name), InstructionSource):
                raise UserError(
                    f"data.name is {self.data.name}, which has no instructions with known answers; "
                    "choose a source of instructions, for example vqa"
                )

    config: Config

    def items(self) -> list[Item]:
        return self._items()

    def items_squared(self, size: int) -> list[Item]:
        return self._items(size)

    def _items(self, size: int | None = None) -> list[Item]:
        found = asked_items(self.config.data, self.config.count, self.config.missing, size)
        return [
            Item(document.id, "instruction", document, example.truth) for document, example in found
        ]

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        texts = [answer.text for answer in answers]
        if self.config.measure == "captions":
            return caption_figures(texts, [item.truth for item in items])
        if self.config.measure == "options":
            right = [self.right(item, answer) for item, answer in zip(items, answers, strict=True)]
            return {"accuracy": proportion(np.array(right))}

        values = []
        for text, item in zip(texts, items, strict=True):
            values.append(vqa_accuracy(text, item.truth))
        return {"VQA accuracy": average(np.array(values))}

    def right(self, item: Item, answer: Answer) -> bool | None:
        if self.config.measure == "captions":
            return None
        if self.config.measure == "options":
            chosen, *options = item.truth  # the right option's text, then all options
            named = option_of(answer.text, options)
            return named is not None and options[named] == chosen
        return vqa_accuracy(answer.text, item.truth) > 0

    def fingerprint(self) -> str:
        return SOURCES.build(self.config.data).fingerprint()


def asked_items(
    data: Component, count: int | None, missing: float, size: int | None
) -> list[tuple[Document, Any]]:
    """Read what a source of instructions asks: at most `count` documents, each with its example.

    Images are resized to `size` as they are read; None keeps their own size.

    Raises:
        UserError: if more than the share `missing` of the items cannot be used.
    """
    source = SOURCES.build(data)
    assert isinstance(source, InstructionSource)  # see `check` of the protocols
    items: list[tuple[Document, Any]] = []
    skipped = 0
    for found in source.asked(size=size):
        if isinstance(found, Skipped):
            skipped += 1
            continue
        items.append(found)
        if len(items) == count:
            break
    check_missing(skipped, len(items), missing)
    return items


def _scores(answer: Answer) -> np.ndarray:
    assert answer.scores_K is not None
    return answer.scores_K
