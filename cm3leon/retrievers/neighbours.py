"""Neighbours of the training documents, found once, from which every epoch draws anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cm3leon.retrievers.bank import MemoryBank
from cm3leon.retrievers.dense import DenseRetriever
from cm3leon.types import Modality

NONE = -1
MODALITIES: tuple[Modality, ...] = ("text", "image")


@dataclass(frozen=True, eq=False)
class Neighbours:
    """`rows_VBK`: for each dropout variant and training document the rows of the bank found by its text, then those
    found by its image; -1 where the strategy left fewer. Most relevant first within each half."""

    rows_VBK: np.ndarray

    def draw(self, document: int, *, most: int, random_count: bool, rng: np.random.Generator) -> list[int]:
        """Rows of the bank for one training sample, the most relevant last (next to the query).

        One variant is drawn, `most` of its distinct neighbours at random, and of those a uniform number from 0 to all
        of them if `random_count`.
        """
        rows_K = self.rows_VBK[rng.integers(len(self.rows_VBK)), document]
        distinct = np.array(list(dict.fromkeys(rows_K[rows_K != NONE].tolist())), dtype=np.int64)
        count = min(most, len(distinct))
        if random_count:
            count = int(rng.integers(count + 1))
        chosen = np.sort(rng.permutation(len(distinct))[:count])
        return distinct[chosen][::-1].tolist()

    def save(self, path: Path) -> None:
        """Writes one .npy file."""
        np.save(path, self.rows_VBK)

    @classmethod
    def load(cls, path: Path) -> Neighbours:
        """Reads what `save` wrote."""
        return cls(np.load(path, allow_pickle=False))


def find_neighbours(
    retriever: DenseRetriever,
    bank: MemoryBank,
    *,
    ids: Sequence[str],
    texts: Sequence[str],
    images_BHWC: np.ndarray,
    seed: int,
) -> tuple[Neighbours, Counter[str]]:
    """Neighbours of the documents under every dropout variant, and the strategy's verdicts in all."""
    config = retriever.config
    rows_VBK = np.full((config.dropout_variants, len(ids), 2 * config.per_modality), NONE, dtype=np.int64)
    verdicts: Counter[str] = Counter()
    for variant in range(config.dropout_variants):
        queries = retriever.parts(texts, images_BHWC, dropout=config.query_dropout, seed=seed + variant)
        for half, modality in enumerate(MODALITIES):
            results, seen = retriever.retrieve(bank, queries, modality, ids=ids, count=config.per_modality)
            verdicts += seen
            for document, rows in enumerate(results):
                start = half * config.per_modality
                rows_VBK[variant, document, start : start + len(rows)] = rows
    return Neighbours(rows_VBK), verdicts
