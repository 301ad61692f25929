"""Which of the candidates are used: relevance, modality, diversity (paper section 2.2)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from cm3leon.retrievers.bank import Parts

NONE = -1
"""Stands where there is no row."""


@dataclass(frozen=True)
class Rules:
    """`threshold`: a candidate more similar than this to the query, or to one already taken, is skipped."""

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
) -> tuple[np.ndarray, Counter[str]]:
    """For each query, takes up to `count` candidates in order of relevance, skipping those that a rule rejects.

    Similarity is cosine within a modality: image to image where both have one, text to text otherwise. (A mean of
    normalised parts has a norm below 1, by which not even an exact copy would reach 0.9.)

    Args:
        candidates_QK: rows of the bank, the most relevant first; `NONE` where there are fewer.
        candidates: their parts, (Q, K, D) each.
        queries: the parts of the queries, (Q, D) each.
        exclude_Q: row of each query's own document, which is never taken; `NONE` if it is not in the bank.

    Returns:
        the rows taken (Q, count), filled up with `NONE`, and how many candidates were looked at (`seen`) and skipped by
        each rule (`itself`, `modality`, `like_query`, `like_taken`).
    """
    Q, K = candidates_QK.shape
    own = Parts(queries.text_BD[:, None], queries.image_BD[:, None])
    to_query_QK = _similarity(candidates, own)[:, :, 0]
    among_QKK = _similarity(candidates, candidates)
    complete_QK = candidates.has("text") & candidates.has("image")
    taken_QK = np.zeros((Q, K), bool)
    rows = np.full((Q, count), NONE, np.int64)
    verdicts: Counter[str] = Counter()
    for k in range(K):
        left = (taken_QK.sum(axis=1) < count) & (candidates_QK[:, k] != NONE)
        verdicts["seen"] += int(left.sum())
        like_taken = np.where(taken_QK, among_QKK[:, k], -np.inf).max(axis=1) > rules.threshold
        for rule, rejected in (
            ("itself", candidates_QK[:, k] == exclude_Q),
            ("modality", ~complete_QK[:, k] & rules.both_modalities),
            ("like_query", to_query_QK[:, k] > rules.threshold),
            ("like_taken", like_taken),
        ):
            verdicts[rule] += int((left & rejected).sum())
            left &= ~rejected
        rows[left, taken_QK[left].sum(axis=1)] = candidates_QK[left, k]
        taken_QK[:, k] = left
    return rows, +verdicts  # + leaves out the rules that rejected nothing


def _similarity(a: Parts, b: Parts) -> np.ndarray:
    """Cosine (..., A, B): of the images where both have one, else of the texts, else 0."""
    both_images = a.has("image")[..., :, None] & b.has("image")[..., None, :]
    return np.where(
        both_images,
        a.image_BD @ b.image_BD.swapaxes(-1, -2),
        a.text_BD @ b.text_BD.swapaxes(-1, -2),
    )
