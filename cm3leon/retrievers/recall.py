"""How well an index finds what exact search finds, and how many lists it has to probe for that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cm3leon.retrievers.parts import MODALITIES
from cm3leon.retrievers.search import CodeSearch, exact_search
from cm3leon.retrievers.strategy import NONE
from cm3leon.retrievers.vectors import VectorShards
from cm3leon.types import Modality

RECALL_AT = (2, 10)


def lists_to_probe(
    search: CodeSearch, *, target: float, queries: int, seed: int, pairs_only: bool
) -> tuple[int, dict[str, dict[str, float]]]:
    """The fewest lists to probe for the recall that is aimed at, or all,
    with the recall at `RECALL_AT`.

    Queries are texts and images of documents, as training asks them;
    the recall of each kind has to reach the target.

    Args:
        queries: documents whose texts, and as many whose images, are asked for.
    """
    # A query's own document is among the found ones, and does not count: one more is looked for.
    most = max(RECALL_AT) + 1
    asked = {by: _queries(search.vectors, queries, seed, by) for by in MODALITIES}
    asked = {by: some for by, some in asked.items() if len(some.own_Q)}
    exact = {
        by: some.others(exact_search(search.vectors, some.vectors_QD, most, pairs_only))
        for by, some in asked.items()
    }

    nprobe = 1
    while True:
        recall: dict[str, dict[str, float]] = {}
        for by, some in asked.items():
            found_QK = some.others(search(some.vectors_QD, most, nprobe=nprobe))
            recall[by] = {str(k): recall_at(exact[by], found_QK, k) for k in RECALL_AT}
        reached = min((of[str(RECALL_AT[0])] for of in recall.values()), default=1.0)
        if reached >= target or nprobe >= search.lists:
            return nprobe, recall
        nprobe = min(2 * nprobe, search.lists)


@dataclass(frozen=True, eq=False)
class Queries:
    """Vectors (Q, D) of one part of documents, and the documents' rows (Q,)."""

    vectors_QD: np.ndarray
    own_Q: np.ndarray

    def others(self, found_QK: np.ndarray) -> np.ndarray:
        """The found rows (Q, K - 1) without each query's own document, or without the last."""
        order_QK = np.argsort(found_QK == self.own_Q[:, None], axis=1, kind="stable")
        return np.take_along_axis(found_QK, order_QK, axis=1)[:, :-1]


def _queries(vectors: VectorShards, count: int, seed: int, by: Modality) -> Queries:
    """One part of random documents, of those that have it."""
    rows = np.random.default_rng([seed, 1]).choice(
        len(vectors), min(count, len(vectors)), replace=False
    )
    parts = vectors.parts(rows)
    has_Q = parts.has(by)
    return Queries((parts.text_BD if by == "text" else parts.image_BD)[has_Q], rows[has_Q])


def recall_at(exact_QK: np.ndarray, found_QK: np.ndarray, k: int) -> float:
    """Share of the exact best `k` that are among the found best `k`."""
    hits = (exact_QK[:, :k, None] == found_QK[:, None, :k]) & (exact_QK[:, :k, None] != NONE)
    return float(hits.any(axis=2).sum() / max(1, (exact_QK[:, :k] != NONE).sum()))
