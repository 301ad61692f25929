"""What a protocol is: items that are asked, and the figures of their answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from cm3leon.data.source import squared
from cm3leon.evaluation.metrics import Measured, average
from cm3leon.types import Document, ImageSegment, Modality, TextSegment, UserError

MAX_TOKENS = {"caption": 64, "vqa": 32, "paragraph": 256, "narrative": 256, "reasoning": 384}
"""Tokens of an answer in text at most, by task: what nearly all answers of its data sets take,
at 1.3 tokens a word.

- caption: COCO's sentences have 10 words on average, Flickr30k's 12, hardly one has 45.
- vqa: 99 % of VQA's answers have at most three words; VizWiz's are as short,
  32 tokens hold the text of a label, too.
- paragraph: those of Image Paragraph have 68 words with a standard deviation of 26 (Krause et al.
  2017, table 1); mean and four deviations are 172 words, 224 tokens.
- narrative: 37 words on average (Pont-Tuset et al. 2020), with a longer tail than captions have.
- reasoning: ScienceQA's answer is behind an explanation, of 48 words on average, or where that is
  missing behind a lecture, of 125 (Lu et al. 2022, table 1); 384 tokens are 295 words,
  more than twice a lecture.
"""


@dataclass(frozen=True, eq=False)
class Item:
    """One prompt: the registered task that asks for an answer,
    and the document with the true one."""

    id: str
    task: str
    document: Document
    truth: Any = None
    """What else the answer is compared with."""
    kind: str = ""
    """Figures of each kind are given beside those of all."""
    options: tuple[str, ...] = ()
    """Candidates that are to be ranked, where the protocol `ranks`."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What was answered: a text, or an image (H, W, C) of uint8 with its CLIP score,
    or scores of the candidates."""

    text: str = ""
    image_HWC: np.ndarray | None = None
    clip: float = float("nan")
    """NaN where the run's retriever has no CLIP."""
    truncated: bool = False
    """Whether the text was stopped by its length before it ended."""
    scores_K: np.ndarray | None = None
    """Log-likelihood of each candidate in nats; `text` is the likeliest one then."""
    codes_N: np.ndarray | None = None
    """Codes of an image."""
    retrieved: Sequence[np.ndarray] = ()
    """Codes of the images that were retrieved for its prompt,
    for a protocol of a run's own corpus."""
    features_D: np.ndarray | None = None
    """Features of an image, for a protocol that is `scored_by` them;
    the image itself may be missing then."""
    given_kept: bool | None = None
    """Whether all that was given stands beside the answer as it was, for a protocol of a run's own
    corpus; None where no model has answered: of true answers, and of those to other items."""


@dataclass(frozen=True, eq=False)
class Shown:
    """An item as a reader is shown it, without its answer."""

    text: str
    given_HWC: np.ndarray | None
    """The image that is given with it."""
    original_HWC: np.ndarray | None = None
    """The true image, where an answer is looked at beside it."""


def clip_score(answers: Sequence[Answer]) -> dict[str, Measured]:
    """The mean score of images, by name; no figure where the run's retriever has no CLIP."""
    scores = np.array([answer.clip for answer in answers])
    return {} if np.isnan(scores).any() else {"CLIP score": average(scores)}


class Protocol(ABC):
    """Registered in `PROTOCOLS`, built as `cls(config)`;
    the same config gives the same items everywhere."""

    answers_in: Modality
    """The modality of the answers."""
    ranks: bool = False
    """Whether the items' `options` are scored, instead of an answer being made; in text only."""
    has_truth: bool = True
    """Whether one right answer to an item is known,
    so that ceiling and chance can be measured by it."""
    max_tokens: int = 64
    """Tokens of an answer in text, at most, unless the setting says otherwise; see `MAX_TOKENS`."""
    lowest_is_best: ClassVar[Collection[str]] = ()
    """Figures of which the lowest is the best, such as distances."""
    scored_by: str = ""
    """What features images are scored by, changing with whatever changes them;
    empty = by the images themselves."""
    device: torch.device = torch.device("cpu")
    """What features are computed on."""
    folder: Path | None = None
    """Where it may keep what is the same for all models that are asked; None = nowhere."""
    attribution: ClassVar[str] = ""
    """What a page that shows its items has to say of whose they are,
    as in a source (`data/source.py`)."""
    explained: ClassVar[Mapping[str, str]] = {}
    """What there is to say on a page of a figure whose name does not say enough, in a sentence,
    by its name."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def items(self) -> list[Item]:
        """What is asked, in a fixed order.

        Raises:
            UserError: for data that is missing or of another form,
                or too few items for the figures.
        """

    def items_squared(self, size: int) -> list[Item]:
        """The items with their images brought to (size, size, 3), see `cm3leon.data.images.square`.

        A protocol that reads photographs brings each to the size as it is read, so that what is
        held does not grow with them.
        """
        return [replace(item, document=squared(item.document, size)) for item in self.items()]

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        """Figures of the answers, by name."""

    def features(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Features (B, D) of images, for a protocol that is `scored_by` them."""
        raise NotImplementedError

    def right(self, item: Item, answer: Answer) -> bool | None:
        """Whether one answer is right; None where that cannot be said of one alone."""
        return None

    def shown(self, item: Item) -> Shown:
        """What a report shows of an item."""
        return Shown(asked(item), given_image(item))

    def notes(self, items: Sequence[Item]) -> dict[str, str]:
        """What else a result has to say of how it came about."""
        return {}

    def fingerprint(self) -> str:
        """Changes with files that the items come from."""
        return ""


def check_missing(skipped: int, usable: int, share: float) -> None:
    """Raises UserError where more than that share of a data set's items cannot be used:
    it is not what it should be."""
    if skipped > share * (skipped + usable):
        raise UserError(
            f"data: {skipped} of {skipped + usable} items cannot be used (missing images, broken "
            f"entries), more than protocol.missing={share:g} allows; complete the data set, or "
            "raise it"
        )


def asked(item: Item) -> str:
    """The text of an item without its answer, as a reader is shown it."""
    runs: list[str] = []
    for segment in item.document.segments:
        if isinstance(segment, TextSegment):
            text = " …" if segment.role == "answer" else segment.text
            runs = (
                [*runs[:-1], runs[-1] + text] if segment.joined and runs else [*runs, text.strip()]
            )
    return " | ".join(runs) if item.task != "caption" else ""


def given_image(item: Item) -> np.ndarray | None:
    """The image (H, W, C) that is given with an item, None without one."""
    images = [segment for segment in item.document.segments if isinstance(segment, ImageSegment)]
    if (
        any(segment.role == "answer" for segment in item.document.segments)
        or item.task == "caption"
    ):
        return images[0].pixels_HWC if images else None
    return images[0].pixels_HWC if len(images) > 1 else None


def true_answer(item: Item, modality: Modality) -> Answer:
    """The answer that the document of an item holds."""
    if modality == "image":
        return Answer(image_HWC=item.document.images[-1])
    for segment in item.document.segments:
        if isinstance(segment, TextSegment) and segment.role == "answer":
            return Answer(text=segment.text.strip())
    return Answer(text=item.document.text)
