"""Recall of an index against exact search, and how many lists to probe for it."""

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
    """The fewest lists to probe for the target recall (or all lists),
    and the recall at `RECALL_AT`.

    Queries are documents' texts and images, as in training; the recall of each kind has to reach
    the target.

    Args:
        queries: documents whose texts, and as many whose images, are queries.
    """
    # A query finds its own document, which does not count; so one more is asked for.
    most = max(RECALL_AT) + 1
    asked, exact = {}, {}
    for by in MODALITIES:
        some = _queries(search.vectors, queries, seed, by)
        if len(some.own_Q):
            found_QK = exact_search(search.vectors, some.vectors_QD, most, pairs_only)
            asked[by], exact[by] = some, some.others(found_QK)

    # Double the lists until the recall is reached.
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
        """The found rows (Q, K - 1) without each query's own document, or without the last row."""
        # A stable sort by "is it the own document" moves that document to the end.
        order_QK = np.argsort(found_QK == self.own_Q[:, None], axis=1, kind="stable")
        return np.take_along_axis(found_QK, order_QK, axis=1)[:, :-1]


def _queries(vectors: VectorShards, count: int, seed: int, by: Modality) -> Queries:
    """One part of random documents that have it."""
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
