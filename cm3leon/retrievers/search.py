"""Search through the vectors of a bank: all of them, or the best candidates by their codes.

Candidates found by codes are ordered by their exact vectors, so the codes only decide which
documents are considered.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cm3leon.retrievers.mips import Searcher, largest
from cm3leon.retrievers.strategy import NONE
from cm3leon.retrievers.vectors import VectorShards

PIECE = 2**18
"""Vectors that exact search compares with the queries at a time."""


def exact_search(
    vectors: VectorShards, queries_QD: np.ndarray, count: int, pairs_only: bool = False
) -> np.ndarray:
    """Rows (Q, count) of the best documents by inner product, in one pass through all shards."""
    best_QK = np.full((len(queries_QD), count), NONE, np.int64)
    scores_QK = np.full((len(queries_QD), count), -np.inf, np.float32)
    for number in range(vectors.count):
        parts = vectors.shard(number)
        places = parts.searched(pairs_only)
        rows_M, vectors_MD = vectors.first(number) + places, parts.mean()[places]

        # Keep the best of what was found before and of each piece.
        for start in range(0, len(vectors_MD), PIECE):
            piece_MD = vectors_MD[start : start + PIECE]
            scores_QM, places_QM = largest(queries_QD, piece_MD, min(count, len(piece_MD)))
            scores_QK, best_QK = best(
                np.concatenate([scores_QK, scores_QM], axis=1),
                np.concatenate([best_QK, rows_M[start + places_QM]], axis=1),
                count,
            )
    return best_QK


def best(scores_QM: np.ndarray, rows_QM: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest scores of each query in falling order, with their rows."""
    if scores_QM.shape[1] > count:
        chosen = np.argpartition(-scores_QM, count - 1, axis=1)[:, :count]
        scores_QM = np.take_along_axis(scores_QM, chosen, axis=1)
        rows_QM = np.take_along_axis(rows_QM, chosen, axis=1)
    order = np.argsort(-scores_QM, axis=1, kind="stable")
    return np.take_along_axis(scores_QM, order, axis=1), np.take_along_axis(rows_QM, order, axis=1)


@dataclass(frozen=True, eq=False)
class CodeSearch:
    """Search by codes in inverted lists; the exact vectors
    of the best candidates decide their order."""

    searcher: Searcher
    vectors: VectorShards
    lists: int
    """Inverted lists of the index."""
    rescored: int
    """Candidates that are ordered by their exact vectors, at least as many as are asked for."""

    def __call__(self, query_QD: np.ndarray, count: int, *, nprobe: int) -> np.ndarray:
        """Rows (Q, count) of the best documents, the best first; -1 if there are fewer.

        Queries whose `nprobe` lists hold fewer than `count` documents probe more lists.
        """
        most = max(count, self.rescored)
        candidates_QM = self.searcher.search(query_QD, most, nprobe=nprobe)
        while nprobe < self.lists:
            short = np.flatnonzero(candidates_QM[:, count - 1] == NONE)
            if not len(short):
                break
            nprobe = min(2 * nprobe, self.lists)
            candidates_QM[short] = self.searcher.search(query_QD[short], most, nprobe=nprobe)

        # Order the candidates by their exact vectors.
        scores_QM = np.einsum("qmd,qd->qm", self.vectors.parts(candidates_QM).mean(), query_QD)
        scores_QM = np.where(candidates_QM == NONE, -np.inf, scores_QM)
        return best(scores_QM, candidates_QM, count)[1]
