"""The retrieval strategy: which candidates are used (paper section 2.2).

Relevance, modality, diversity. A query about a red dog, threshold 0.9, two documents wanted:

    candidate  score  rule                                          verdict
    40         0.98   its own document                              itself
    7          0.95   cosine 0.97 to the query: a copy of it        like_query
    12         0.81                                                 taken
    13         0.80   cosine 0.96 to 12: nothing new                like_taken
    9          0.74   has no image                                  modality
    31         0.70                                                 taken
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from cm3leon.retrievers.parts import Parts

NONE = -1
"""Stands for a missing row."""


@dataclass(frozen=True)
class Rules:
    """The rules of a strategy.

    `threshold`: candidates more similar than this to the query, or to one already taken,
    are skipped.
    """

    threshold: float
    both_modalities: bool


def select(
    candidates_QK: np.ndarray,
    candidates: Parts,
    queries: Parts,
    *,
    exclude_Q: np.ndarray,
    count: int,
    rules: Rules,
    taken_QT: np.ndarray | None = None,
    taken: Parts | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Take up to `count` candidates for each query in order of relevance, skipping rejected ones.

    Similarity is the cosine within a modality: of the images if both have one, otherwise of the
    texts. (The mean of two unit vectors is shorter than 1, so not even an exact copy would reach a
    threshold of 0.9 with it.)

    Args:
        candidates_QK: rows of the bank, the most relevant first, padded with `NONE`.
        candidates: their parts, (Q, K, D) each.
        queries: the parts of the queries, (Q, D) each.
        exclude_Q: row of each query's own document, which is never taken; `NONE` if it is not in
            the bank.
        taken_QT: rows that each query already has, padded with `NONE`; neither they nor similar
            documents are taken.
        taken: their parts, (Q, T, D) each.

    Returns:
        the rows taken now (Q, count), padded with `NONE`, and for each query (Q,) how many
        candidates were considered (`seen`) and skipped by each rule (`itself`, `modality`,
        `like_query`, `like_taken`).
    """
    Q, K = candidates_QK.shape
    own = Parts(queries.text_BD[:, None], queries.image_BD[:, None])

    # A candidate counts for the first rule that rejects it.
    like_taken_QK = np.zeros((Q, K), bool)
    rejected = {
        "itself": candidates_QK == exclude_Q[:, None],
        "modality": rules.both_modalities & ~(candidates.has("text") & candidates.has("image")),
        "like_query": _similarity(candidates, own)[:, :, 0] > rules.threshold,
        "like_taken": like_taken_QK,
    }
    if taken_QT is not None and taken is not None:
        same_QKT = candidates_QK[:, :, None] == taken_QT[:, None]
        like_QKT = _similarity(candidates, taken) > rules.threshold
        like_taken_QK |= (same_QKT | like_QKT & (taken_QT != NONE)[:, None]).any(axis=2)

    # The first candidate that is left is taken, which may reject some behind it.
    left_QK = (candidates_QK != NONE) & ~np.any(list(rejected.values()), axis=0)
    rows_QN = np.full((Q, count), NONE, np.int64)
    last_Q = np.full(Q, -1)
    for n in range(count):
        found_Q, first_Q = left_QK.any(axis=1), left_QK.argmax(axis=1)
        rows_QN[:, n] = np.where(found_Q, candidates_QK[np.arange(Q), first_Q], NONE)
        last_Q = np.where(found_Q, first_Q, last_Q)

        chosen = candidates.rows((np.arange(Q), first_Q, None))
        like_QK = _similarity(candidates, chosen)[:, :, 0] > rules.threshold
        like_QK |= candidates_QK == rows_QN[:, n, None]
        behind_QK = found_Q[:, None] & (np.arange(K) > first_Q[:, None])
        like_taken_QK |= like_QK & behind_QK
        left_QK &= behind_QK & ~like_taken_QK

    # Those behind the last one that was wanted were not considered.
    full_Q1 = (rows_QN != NONE).all(axis=1, keepdims=True)
    considered_QK = (candidates_QK != NONE) & (~full_Q1 | (np.arange(K) <= last_Q[:, None]))
    verdicts = {"seen": considered_QK.sum(axis=1)}
    for rule, rejected_QK in rejected.items():
        verdicts[rule] = (considered_QK & rejected_QK).sum(axis=1)
        considered_QK &= ~rejected_QK
    return rows_QN, verdicts


def total(verdicts: dict[str, np.ndarray], chosen_Q: np.ndarray) -> Counter[str]:
    """Sum the verdicts over some queries, without rules that rejected nothing."""
    return +Counter({rule: int(count_Q[chosen_Q].sum()) for rule, count_Q in verdicts.items()})


def _similarity(a: Parts, b: Parts) -> np.ndarray:
    """Cosine (..., A, B): of the images if both have one, else of the texts, else 0."""
    both_images = a.has("image")[..., :, None] & b.has("image")[..., None, :]
    image_similarity = a.image_BD @ b.image_BD.swapaxes(-1, -2)
    if both_images.all():
        return image_similarity
    return np.where(both_images, image_similarity, a.text_BD @ b.text_BD.swapaxes(-1, -2))
