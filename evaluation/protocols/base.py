"""Base class of the protocols: items that are asked, and the figures of their answers."""

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
"""Most tokens of an answer in text by task: what nearly all answers of its data sets take, at 1.3
tokens a word.

- caption: COCO's sentences have 10 words on average, Flickr30k's 12, hardly one has 45.
- vqa: 99 % of VQA's answers have at most three words; VizWiz's are as short, and 32 tokens also
  hold the text of a label.
- paragraph: those of Image Paragraph have 68 words with a standard deviation of 26 (Krause et al.
  2017, table 1); mean and four deviations are 172 words, 224 tokens.
- narrative: 37 words on average (Pont-Tuset et al. 2020), with a longer tail than captions.
- reasoning: ScienceQA's answer follows an explanation of 48 words on average, or without one a
  lecture of 125 (Lu et al. 2022, table 1); 384 tokens are 295 words, more than twice a lecture.
"""

RIGHT_IN_ANY = "right_in_any"
"""Name of the share of items of which at least one of several images is right."""


@dataclass(frozen=True, eq=False)
class Item:
    """One prompt: the registered task that asks it, and the document with the true answer."""

    id: str
    task: str
    document: Document
    truth: Any = None
    """What else the answer is compared with."""
    kind: str = ""
    """Figures are given for each kind besides those of all items."""
    options: tuple[str, ...] = ()
    """Candidates to rank, if the protocol `ranks`."""


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer: a text, or a uint8 image (H, W, C) with its CLIP score, or scores of the
    candidates."""

    text: str = ""
    image_HWC: np.ndarray | None = None
    clip: float = float("nan")
    """NaN if the run's retriever has no CLIP."""
    truncated: bool = False
    """Whether the text was stopped by its length before it ended."""
    scores_K: np.ndarray | None = None
    """Log-likelihood of each candidate in nats; then `text` is the likeliest one."""
    codes_N: np.ndarray | None = None
    """Codes of an image."""
    retrieved: Sequence[np.ndarray] = ()
    """Codes of the images retrieved for its prompt, for a protocol of a run's own corpus."""
    features_D: np.ndarray | None = None
    """Features of an image, for a protocol that is `scored_by` them; then the image may be
    missing."""
    given_kept: bool | None = None
    """Whether everything given is unchanged, for a protocol of a run's own corpus; None for answers
    that no model made: true answers, and those to other items."""


@dataclass(frozen=True, eq=False)
class ShownItem:
    """An item as a reader is shown it, without its answer."""

    text: str
    given_HWC: np.ndarray | None
    """The image that is given with it."""
    original_HWC: np.ndarray | None = None
    """The true image, if the answer is to be compared with it."""


def clip_score(answers: Sequence[Answer]) -> dict[str, Measured]:
    """The mean CLIP score of images, by name; {} if the run's retriever has no CLIP."""
    scores = np.array([answer.clip for answer in answers])
    if np.isnan(scores).any():
        return {}
    return {"CLIP score": average(scores)}


class Protocol(ABC):
    """Base class of protocols, which are registered in `PROTOCOLS` and built as `cls(config)`.

    The same config always gives the same items.
    """

    answers_in: Modality
    """The modality of the answers."""
    ranks: bool = False
    """Whether the items' `options` are scored instead of making an answer; only in text."""
    has_truth: bool = True
    """Whether each item has one right answer, with which ceiling and chance can be measured."""
    max_tokens: int = 64
    """Most tokens of an answer in text, unless the setting says otherwise; see `MAX_TOKENS`."""
    lowest_is_best: ClassVar[Collection[str]] = ()
    """Figures of which the lowest is best, such as distances."""
    scored_by: str = ""
    """Names the features that images are scored by, and changes with them; "" if the images
    themselves are needed."""
    device: torch.device = torch.device("cpu")
    """Device that features are computed on."""
    folder: Path | None = None
    """Folder in which it may keep what is the same for all models; None if it must keep nothing."""
    explained: ClassVar[Mapping[str, str]] = {}
    """Sentences for a page that explain figures whose names do not, by name."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def attributions(cls, config: Any) -> Sequence[str]:
        """What a page that shows its items must say of their licensors, as in a source
        (`data/source.py`)."""
        return ()

    @abstractmethod
    def items(self) -> list[Item]:
        """The items, in a fixed order.

        Raises:
            UserError: for data that is missing or of another form, or too few items for the
                figures.
        """

    def items_squared(self, size: int) -> list[Item]:
        """The items with images resized to (size, size, 3), see `cm3leon.data.images.square`.

        A protocol of photographs resizes each as it is read, so that memory does not grow with
        them.
        """
        return [replace(item, document=squared(item.document, size)) for item in self.items()]

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        """Figures of the answers, by name."""

    def features(self, images_BHWC: np.ndarray) -> np.ndarray:
        """Features (B, D) of images, for a protocol that is `scored_by` them."""
        raise NotImplementedError

    def right(self, item: Item, answer: Answer) -> bool | None:
        """Whether one answer is right; None if that cannot be said of a single answer."""
        return None

    def shown(self, item: Item) -> ShownItem:
        """What a report shows of an item."""
        return ShownItem(asked(item), given_image(item))

    def notes(self, items: Sequence[Item]) -> dict[str, str]:
        """Further notes on how a result was made."""
        return {}

    def fingerprint(self) -> str:
        """Digest of the files that the items come from."""
        return ""


def check_missing(skipped: int, usable: int, share: float) -> None:
    """Raise UserError if more than a share of a data set's items cannot be used, since figures of
    an incomplete data set cannot be compared."""
    if skipped > share * (skipped + usable):
        raise UserError(
            f"data: {skipped} of {skipped + usable} items cannot be used (missing images, broken "
            f"entries), more than protocol.missing={share:g} allows; complete the data set, or "
            "raise protocol.missing"
        )


def asked(item: Item) -> str:
    """The text of an item without its answer, as a reader is shown it."""
    if item.task == "caption":
        return ""
    runs: list[str] = []
    for segment in item.document.segments:
        if not isinstance(segment, TextSegment):
            continue
        text = " …" if segment.role == "answer" else segment.text
        # A joined text continues the one before it, within one sentence of a template.
        if segment.joined and runs:
            runs[-1] += text
        else:
            runs.append(text.strip())
    return " | ".join(runs)


def given_image(item: Item) -> np.ndarray | None:
    """The image (H, W, C) that is given with an item; None without one."""
    images = [segment for segment in item.document.segments if isinstance(segment, ImageSegment)]
    has_answer = any(segment.role == "answer" for segment in item.document.segments)

    # With an answer in text, every image is given; otherwise the last image is asked for.
    fewest = 2
    if has_answer or item.task == "caption":
        fewest = 1
    if len(images) < fewest:
        return None
    return images[0].pixels_HWC


def true_answer(item: Item, modality: Modality) -> Answer:
    """The answer that the document of an item holds."""
    if modality == "image":
        return Answer(image_HWC=item.document.images[-1])
    for segment in item.document.segments:
        if isinstance(segment, TextSegment) and segment.role == "answer":
            return Answer(text=segment.text.strip())
    return Answer(text=item.document.text)
