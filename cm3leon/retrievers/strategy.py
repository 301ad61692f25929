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
VERDICTS = ("seen", "itself", "modality", "like_query", "like_taken")
"""What is counted: candidates that were considered, and those that each rule rejected."""


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
    if taken_QT is None or taken is None:
        taken_QT, taken = np.zeros((Q, 0), np.int64), candidates.rows(np.s_[:, :0])
    T = taken_QT.shape[1]

    # Columns of what was taken before, then columns to fill now.
    rows_QN = np.concatenate([taken_QT, np.full((Q, count), NONE, np.int64)], axis=1)
    room_QRD = np.zeros((Q, count, candidates.text_BD.shape[-1]), np.float32)
    text_QND = np.concatenate([taken.text_BD, room_QRD], axis=1)
    image_QND = np.concatenate([taken.image_BD, room_QRD], axis=1)

    own = Parts(queries.text_BD[:, None], queries.image_BD[:, None])
    to_query_QK = _similarity(candidates, own)[:, :, 0]
    complete_QK = candidates.has("text") & candidates.has("image")

    # One candidate of all queries at a time, the most relevant first.
    found_Q = np.zeros(Q, np.int64)
    verdicts = {rule: np.zeros(Q, np.int64) for rule in VERDICTS}
    for k in range(K):
        row_Q = candidates_QK[:, k]
        left = (found_Q < count) & (row_Q != NONE)
        if not left.any():
            break
        verdicts["seen"] += left

        # Similarity to what is taken; for all candidates at once it would not fit the memory.
        candidate = candidates.rows(np.s_[:, k : k + 1])
        to_taken_QN = _similarity(candidate, Parts(text_QND, image_QND))[:, 0]
        to_taken_QN[rows_QN == NONE] = -np.inf
        like_taken = to_taken_QN.max(axis=1, initial=-np.inf) > rules.threshold
        like_taken |= (rows_QN == row_Q[:, None]).any(axis=1)

        # A candidate counts for the first rule that rejects it.
        for rule, rejected in (
            ("itself", row_Q == exclude_Q),
            ("modality", ~complete_QK[:, k] & rules.both_modalities),
            ("like_query", to_query_QK[:, k] > rules.threshold),
            ("like_taken", like_taken),
        ):
            verdicts[rule] += left & rejected
            left &= ~rejected

        # What is left is taken.
        column_L = T + found_Q[left]
        rows_QN[left, column_L] = row_Q[left]
        text_QND[left, column_L] = candidates.text_BD[left, k]
        image_QND[left, column_L] = candidates.image_BD[left, k]
        found_Q += left
    return rows_QN[:, T:], verdicts


def total(verdicts: dict[str, np.ndarray], chosen_Q: np.ndarray) -> Counter[str]:
    """Sum the verdicts over some queries, without rules that rejected nothing."""
    return +Counter({rule: int(count_Q[chosen_Q].sum()) for rule, count_Q in verdicts.items()})


def _similarity(a: Parts, b: Parts) -> np.ndarray:
    """Cosine (..., A, B): of the images if both have one, else of the texts, else 0."""
    both_images = a.has("image")[..., :, None] & b.has("image")[..., None, :]
    return np.where(
        both_images,
        a.image_BD @ b.image_BD.swapaxes(-1, -2),
        a.text_BD @ b.text_BD.swapaxes(-1, -2),
    )
