"""Base classes of the retrievers: an encoder's vectors, inner products, and the strategy on top."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from cm3leon.config import NonNegativeInt, PositiveInt, Probability
from cm3leon.retrievers.bank import Bank
from cm3leon.retrievers.parts import Parts
from cm3leon.retrievers.strategy import NONE, Rules, select, total
from cm3leon.types import Modality

MOST_CANDIDATES = 2048
"""Most candidates of a query unless more are configured: as many as a search on a GPU returns."""
AT_ONCE = 2**16
"""Candidates, of all queries together, whose vectors are held at a time."""


@dataclass(kw_only=True)
class StrategyConfig:
    """The strategy of the paper's section 2.2."""

    threshold: float = 0.9
    """Candidates with a higher cosine to the query, or to a document already taken, are skipped."""
    both_modalities: bool = True
    """Take only documents that have both text and image; the others are not in the index."""
    candidates: PositiveInt = 64
    """Candidates that the search first hands to the strategy. If its rules leave too few documents,
    it is given twice as many, and so on up to 2,048."""
    per_modality: PositiveInt = 2
    """Documents retrieved with the text as query, and as many with the image,
    for each training document."""
    max_documents: NonNegativeInt = 3
    """Most of them that are drawn for a training sample."""
    random_count: bool = True
    """Draw the number of documents uniformly from 0 to max_documents (RA-CM3), so that the model
    also works without documents."""
    query_dropout: Probability = 0.2
    """Share of the query's tokens (BPE pieces, image patches) dropped before encoding,
    only in training."""
    dropout_variants: PositiveInt = 4
    """Queries with different tokens dropped, for each training document;
    an epoch draws one of them."""


class Encoder(nn.Module):
    """Base of the encoders: unit vectors of texts and of images."""

    embed_dim: int
    """Size of a vector."""
    joint: bool = False
    """Whether the inner product of a text and an image measures how well they fit."""

    def encode_texts(self, texts: list[str], *, dropout: float = 0.0, seed: int = 0) -> np.ndarray:
        """Unit vectors (B, D), float32. `dropout` is the share of each text to leave out,
        drawn by `seed`."""
        raise NotImplementedError

    def encode_images(
        self, images_BHWC: np.ndarray, *, dropout: float = 0.0, seed: int = 0
    ) -> np.ndarray:
        """Unit vectors (B, D), float32, of uint8 images.
        `dropout` is the share of each image to leave out."""
        raise NotImplementedError

    def loss(
        self, texts: list[str], images_BHWC: Tensor
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of a trained encoder on pairs of a text and an image, with figures to record."""
        raise NotImplementedError

    def fit(self, texts: Sequence[str]) -> None:
        """Compute from the training documents' texts what an untrained encoder needs."""
        raise NotImplementedError


class Retriever:
    """Maximum inner product search over an encoder's vectors, with the paper's strategy."""

    trained: ClassVar[bool] = True
    """Whether the encoder is trained by gradient with its method `loss`; otherwise its method
    `fit(texts)` is called once."""
    encoder: Encoder

    def __init__(self, config: StrategyConfig) -> None:
        self.config = config
        self.rules = Rules(config.threshold, config.both_modalities)

    @classmethod
    def without_weights(cls, config: Any) -> Any:
        """Settings that build an encoder of the same shape without weights,
        which are then read from a run."""
        return config

    @classmethod
    def vector_width(cls, config: Any) -> int:
        """Size of its encoder's vectors."""
        return cls(config).encoder.embed_dim

    def parts(
        self,
        texts: Sequence[str] | None,
        images_BHWC: np.ndarray | None,
        *,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> Parts:
        """Vectors of the parts of documents or queries; None for a part gives zero vectors."""
        text_BD = image_BD = None
        if texts is not None:
            text_BD = self.encoder.encode_texts(list(texts), dropout=dropout, seed=seed)
        if images_BHWC is not None:
            image_BD = self.encoder.encode_images(images_BHWC, dropout=dropout, seed=seed)

        if text_BD is None:
            if image_BD is None:
                raise ValueError("a query needs texts or images")
            text_BD = np.zeros_like(image_BD)
        if image_BD is None:
            image_BD = np.zeros_like(text_BD)
        return Parts(text_BD, image_BD)

    def retrieve(
        self,
        bank: Bank,
        queries: Parts,
        by: Modality,
        *,
        count: int,
        exclude_Q: np.ndarray | None = None,
        like: Parts | None = None,
        taken_QT: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Counter[str]]:
        """Rows of the bank to use for each query, the most relevant first,
        and the strategy's verdicts.

        Args:
            queries: parts of the queries; `by` names the part to search with. Nothing is found for
                a query without it.
            exclude_Q: row of each query's own document, -1 if it is not in the bank; None: no
                query's is.
            like: parts of the documents whose copies must not be found; None: the queries'. A query
                that lost tokens to dropout cannot recognise copies of its own document.
            taken_QT: rows that each query already has, padded with -1. Neither they nor similar
                documents are found. None: no rows.

        Returns:
            rows (Q, count), padded with -1, and how many candidates each rule rejected.
        """
        vectors_QD = queries.text_BD if by == "text" else queries.image_BD
        Q = len(vectors_QD)
        if like is None:
            like = queries
        if exclude_Q is None:
            exclude_Q = np.full(Q, NONE)
        if taken_QT is None:
            taken_QT = np.zeros((Q, 0), np.int64)
        rows_QN = np.full((Q, count), NONE, np.int64)
        verdicts: Counter[str] = Counter()

        # Queries that find too few among their candidates are asked again for twice as many.
        wanted = self.config.candidates
        limit = min(bank.searchable, max(wanted, MOST_CANDIDATES))
        pending = np.flatnonzero(queries.has(by)) if count else np.zeros(0, np.int64)
        while len(pending):
            candidates_PK = bank.search(vectors_QD[pending], wanted)
            short = []

            # The candidates' vectors are read for some queries at a time, to bound the memory.
            step = max(1, AT_ONCE // wanted)
            for start in range(0, len(pending), step):
                chosen = pending[start : start + step]
                candidates_QK = candidates_PK[start : start + step]
                rows_QN[chosen], counted = select(
                    candidates_QK,
                    bank.parts_of(candidates_QK),
                    like.rows(chosen),
                    exclude_Q=exclude_Q[chosen],
                    count=count,
                    rules=self.rules,
                    taken_QT=taken_QT[chosen],
                    taken=bank.parts_of(taken_QT[chosen]),
                )
                done = (rows_QN[chosen, -1] != NONE) | (wanted >= limit)

                # A query that is asked again is counted only the last time.
                verdicts += total(counted, done)
                short.append(chosen[~done])
            pending = np.concatenate(short)
            wanted = min(2 * wanted, limit)
        return rows_QN, verdicts
