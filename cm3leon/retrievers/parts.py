"""Vectors of the text and image parts of documents, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cm3leon.types import Modality

MODALITIES: tuple[Modality, ...] = ("text", "image")


@dataclass(frozen=True, eq=False)
class Parts:
    """Unit vectors of documents' text and image parts, (B, D) each; zeros for a missing part.

    Documents may have several dimensions, such as the candidates of each query: (Q, K, D).
    """

    text_BD: np.ndarray
    image_BD: np.ndarray

    def mean(self) -> np.ndarray:
        """One vector for each document: the mean of the parts that it has (paper section 2.2)."""
        count_B1 = (self.has("text").astype(np.float32) + self.has("image"))[..., None]
        return (self.text_BD + self.image_BD) / np.maximum(count_B1, 1)

    def has(self, modality: Modality) -> np.ndarray:
        """Which documents have this part, boolean (B,)."""
        return np.any(self.text_BD if modality == "text" else self.image_BD, axis=-1)

    def searched(self, pairs_only: bool) -> np.ndarray:
        """Indices (N,) of the documents that an index holds: all, or only those with both parts."""
        if not pairs_only:
            return np.arange(len(self.text_BD))
        return np.flatnonzero(self.has("text") & self.has("image"))

    def rows(self, rows: Any) -> Parts:
        """The parts of some documents."""
        return Parts(self.text_BD[rows], self.image_BD[rows])

    @staticmethod
    def concatenate(parts: Sequence[Parts]) -> Parts:
        """The documents of several `Parts`, one after the other."""
        return Parts(
            np.concatenate([p.text_BD for p in parts]), np.concatenate([p.image_BD for p in parts])
        )
