"""The registered metrics: figures of the generations of one setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cm3leon.config import NoSettings
from cm3leon.evaluation.metrics import Measured, average, equal_to_any, proportion
from cm3leon.registry import METRICS
from cm3leon.types import Modality

UNKNOWN = -1
"""A class that nobody asked for, or that nothing shows."""


@dataclass(frozen=True, eq=False)
class Generated:
    """Generations of one setting as arrays, one row each.

    `asked_B`: the class that was asked for; `read_B`: the class that the judge reads in the image, or that the text
    names; -1 where there is none. `codes_BN` and `texts`: the answer with what was given. `given_texts`: captions of
    the documents that were asked for. `training_MN`: codes of the training images and of their varied versions;
    `retrieved`: codes of the documents in each prompt, (K, N). `clip_B`: cosine of text and image by the run's own
    retriever, which is no independent judge; None where that is no CLIP. `exact_B`: whether what the task has to leave
    as it was is so.
    """

    modality: Modality
    asked_B: np.ndarray
    read_B: np.ndarray
    codes_BN: np.ndarray
    texts: Sequence[str]
    given_texts: Sequence[str]
    training_MN: np.ndarray
    retrieved: Sequence[np.ndarray]
    clip_B: np.ndarray | None
    exact_B: np.ndarray


class Metric:
    """A figure of a setting. Registered in `METRICS`, built as `cls(config)`."""

    Config: type = NoSettings

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, generated: Generated) -> Measured | None:
        """The figure; None where it does not apply."""
        raise NotImplementedError


@METRICS.register("accuracy")
class Accuracy(Metric):
    """Share of generations in which the class asked for is read; none where documents have no known class."""

    def __call__(self, generated: Generated) -> Measured | None:
        if (generated.asked_B == UNKNOWN).any():
            return None
        return proportion(generated.read_B == generated.asked_B)


@METRICS.register("copies")
class Copies(Metric):
    """Share of images with the codes of a training image (or a version of it) or a retrieved one: no generation."""

    def __call__(self, generated: Generated) -> Measured | None:
        if generated.modality != "image":
            return None
        copied_B = equal_to_any(generated.codes_BN, generated.training_MN)
        for row, retrieved_KN in enumerate(generated.retrieved):
            copied_B[row] |= (
                bool(len(retrieved_KN))
                and (retrieved_KN == generated.codes_BN[row]).all(axis=1).any()
            )
        return proportion(copied_B)


@METRICS.register("clip_score")
class ClipScore(Metric):
    """Mean cosine of text and image by the run's own retriever, which is not independent of the run."""

    def __call__(self, generated: Generated) -> Measured | None:
        return None if generated.clip_B is None else average(generated.clip_B)


@METRICS.register("distinct")
class Distinct(Metric):
    """Share of different answers among all: a low one tells of a collapse."""

    def __call__(self, generated: Generated) -> Measured | None:
        if generated.modality != "image":
            return None
        _, first, of_row = np.unique(
            generated.codes_BN, axis=0, return_index=True, return_inverse=True
        )
        return proportion(first[of_row.ravel()] == np.arange(len(generated.codes_BN)))


@METRICS.register("given_kept")
class GivenKept(Metric):
    """Share of generations in which what was given is exactly as it was (of an infilled image, the given half)."""

    def __call__(self, generated: Generated) -> Measured | None:
        return proportion(generated.exact_B)
