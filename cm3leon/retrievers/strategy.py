"""Which of the candidates are used: relevance, modality, diversity (paper section 2.2)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from cm3leon.retrievers.bank import Parts


@dataclass(frozen=True)
class Rules:
    """`threshold`: a candidate more similar than this to the query, or to one already taken, is skipped."""

    threshold: float
    both_modalities: bool


def select(
    candidates_K: np.ndarray, candidate_parts: Parts, query: Parts, *, exclude: int | None, count: int, rules: Rules
) -> tuple[list[int], Counter[str]]:
    """Takes up to `count` candidates in order of relevance, skipping those that a rule rejects.

    Similarity is cosine within a modality: image to image where both have one, text to text otherwise. (A mean of
    normalised parts has a norm below 1, by which not even an exact copy would reach 0.9.)

    Args:
        candidates_K: rows of the bank, the most relevant first.
        candidate_parts: their parts, in the same order.
        query: the parts of the query, one row.
        exclude: row of the query's own document, which is never taken; None if it is not in the bank.

    Returns:
        the rows taken, and how many candidates were looked at (`seen`) and skipped by each rule (`itself`,
        `modality`, `like_query`, `like_taken`).
    """
    to_query_K = _similarity(candidate_parts, query)[:, 0]
    among_KK = _similarity(candidate_parts, candidate_parts)
    complete_K = candidate_parts.has("text") & candidate_parts.has("image")
    taken: list[int] = []
    verdicts: Counter[str] = Counter()
    for k, row in enumerate(candidates_K.tolist()):
        if len(taken) == count:
            break
        verdicts["seen"] += 1
        if row == exclude:
            verdicts["itself"] += 1
        elif rules.both_modalities and not complete_K[k]:
            verdicts["modality"] += 1
        elif to_query_K[k] > rules.threshold:
            verdicts["like_query"] += 1
        elif taken and among_KK[k, taken].max() > rules.threshold:
            verdicts["like_taken"] += 1
        else:
            taken.append(k)
    return [int(candidates_K[k]) for k in taken], verdicts


def _similarity(a: Parts, b: Parts) -> np.ndarray:
    """Cosine (A, B): of the images where both have one, else of the texts, else 0."""
    both_images = a.has("image")[:, None] & b.has("image")[None]
    return np.where(both_images, a.image_BD @ b.image_BD.T, a.text_BD @ b.text_BD.T)
