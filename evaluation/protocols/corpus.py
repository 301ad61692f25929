"""The documents that a model's run kept from training, asked by one of its tasks and read by a
judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from cm3leon.config import PositiveInt, choices
from cm3leon.data.corpus import Split
from cm3leon.evaluation.judge import Judge
from cm3leon.evaluation.metrics import Measured, average, equal_to_any, proportion
from cm3leon.evaluation.protocols.base import MAX_TOKENS, Answer, Item, Protocol, ShownItem
from cm3leon.registry import PROTOCOLS, TASKS
from cm3leon.types import Document, Modality, UserError

UNKNOWN = -1
"""A class that is not asked for, or not shown."""
GREY = 128
"""Pixel value of the half of an image that is not given."""


@dataclass(frozen=True, eq=False)
class OwnCorpus:
    """What a run knows of its corpus: the documents that it kept from training, and its training
    images."""

    documents: Callable[[Split], Sequence[Document]]
    """The documents of a split that fit a block of the model."""
    training_images_BHWC: np.ndarray
    training_labels_B: np.ndarray
    """Classes of the training images; -1 for an unknown one."""
    training_codes_MN: np.ndarray
    """Codes of the training images and of their varied versions."""
    class_in: Callable[[str], int | None]
    """The class that a text names."""

    @cached_property
    def judge(self) -> Judge | None:
        """The judge of the corpus, which learns from its training images only; None where documents
        have no known class, or all have the same."""
        labels_B = self.training_labels_B
        if (labels_B == UNKNOWN).any() or len(set(labels_B.tolist())) < 2:
            return None
        return Judge(self.training_images_BHWC, labels_B)

    def read(self, answers: Sequence[Answer]) -> np.ndarray:
        """The class that the judge reads in each image, or that each text names; -1 if none."""
        named = [UNKNOWN] * len(answers)

        # Images are judged together, texts one by one.
        if answers and answers[0].image_HWC is not None:
            if self.judge is None:
                return np.array(named)
            return self.judge.read(np.stack([np.asarray(answer.image_HWC) for answer in answers]))
        for number, answer in enumerate(answers):
            found = self.class_in(answer.text)
            if found is not None:
                named[number] = found
        return np.array(named)


@PROTOCOLS.register("corpus")
class CorpusTask(Protocol):
    """A task of captioned images, for the documents that the model's own run kept from training.

    - accuracy: share of answers in which the requested class is read, by the judge in an image, by
      its name in a text; not measured if documents have no known class
    - clip_score: mean cosine of text and image by the run's own retriever, which is not independent
      of it
    - copies: share of images with the codes of a training image, of one of its varied versions, or
      of a retrieved one, which were not generated but copied
    - distinct: share of different images; a low one shows a collapse
    - given_kept: share of answers that leave everything given unchanged
    """

    @dataclass(kw_only=True)
    class Config:
        """The task, and the documents."""

        task: str
        """Name of the task: text_to_image, caption, infill_top, infill_bottom, or one of a
        plugin."""
        split: Literal["validation", "held_out"] = "held_out"
        """The split of the documents."""
        at_least: PositiveInt = 1
        """Fewest prompts: all documents are asked as often as that takes, with other seeds."""

        def check(self) -> None:
            if self.task not in TASKS.names():
                raise UserError(
                    f"task is {self.task}, which is not known; {choices(self.task, TASKS.names())}"
                )

    config: Config
    lowest_is_best = ("copies",)
    explained: ClassVar[Mapping[str, str]] = {
        "accuracy": (
            "Accuracy: the share in which the class asked for is read, in images by an independent "
            "judge."
        ),
        "copies": (
            "Copies have the codes of a training image, of one of its varied versions, or of a "
            "retrieved one."
        ),
        "distinct": "Distinct: the share of different images.",
        "given_kept": "Given kept: the share beside which what was given is as it was.",
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.answers_in: Modality = TASKS.get(config.task).answers_in
        self.max_tokens = MAX_TOKENS.get(config.task, 64)
        self._corpus: OwnCorpus | None = None

    @property
    def corpus(self) -> OwnCorpus:
        """The corpus of the model that is asked."""
        assert self._corpus is not None
        return self._corpus

    def ask_about(self, corpus: OwnCorpus) -> None:
        """Use the items of this corpus from now on."""
        self._corpus = corpus

    def items(self) -> list[Item]:
        documents = self.corpus.documents(self.config.split)
        # As many rounds as reach `at_least`, rounded up; the first one keeps the documents' ids.
        rounds = max(1, -(-self.config.at_least // max(1, len(documents))))
        items = []
        for number in range(rounds):
            for document in documents:
                id_ = f"{document.id}#{number}" if number else document.id
                items.append(Item(id_, self.config.task, document, truth=document.label))
        return items

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        figures: dict[str, Measured] = {}

        # Whether the answers show what was asked for.
        if all(item.truth is not None for item in items) and self._can_read:
            asked_B = np.array([item.truth for item in items])
            figures["accuracy"] = proportion(self.corpus.read(answers) == asked_B)
        clip_B = np.array([answer.clip for answer in answers])
        if not np.isnan(clip_B).any():
            figures["clip_score"] = average(clip_B)

        # Whether images were generated: neither copied nor all the same.
        if self.answers_in == "image":
            codes_BN = np.stack([np.asarray(answer.codes_N) for answer in answers])
            figures["copies"] = proportion(self._copied(answers, codes_BN))
            # Of equal images, the first one counts as a different one.
            _, first, of_row = np.unique(codes_BN, axis=0, return_index=True, return_inverse=True)
            figures["distinct"] = proportion(first[of_row.ravel()] == np.arange(len(codes_BN)))

        # Whether what was given was left alone, where a model made the answer.
        kept = [answer.given_kept for answer in answers if answer.given_kept is not None]
        if kept:
            figures["given_kept"] = proportion(np.array(kept))
        return figures

    def _copied(self, answers: Sequence[Answer], codes_BN: np.ndarray) -> np.ndarray:
        """Which images have the codes of a training image, or of one retrieved for them."""
        copied_B = equal_to_any(codes_BN, self.corpus.training_codes_MN)
        for row, answer in enumerate(answers):
            for codes_N in answer.retrieved:
                copied_B[row] |= np.array_equal(codes_BN[row], codes_N)
        return copied_B

    @property
    def _can_read(self) -> bool:
        """Whether the class of an answer can be read."""
        return self.answers_in == "text" or self.corpus.judge is not None

    def right(self, item: Item, answer: Answer) -> bool | None:
        if item.truth is None or not self._can_read:
            return None
        return bool(self.corpus.read([answer])[0] == item.truth)

    def shown(self, item: Item) -> ShownItem:
        text, image_HWC = item.document.text, item.document.image
        if self.answers_in == "text":
            return ShownItem(f"the document's caption: {text}", image_HWC)
        if image_HWC is None or self.config.task not in ("infill_top", "infill_bottom"):
            return ShownItem(text, None)

        # The half that the model is to fill in is grey.
        given_HWC, middle = image_HWC.copy(), len(image_HWC) // 2
        if self.config.task == "infill_top":
            given_HWC[:middle] = GREY
        else:
            given_HWC[middle:] = GREY
        return ShownItem(text, given_HWC, image_HWC)
