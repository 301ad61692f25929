"""What all retrievers share: vectors of texts and images by an encoder, inner products,
and the strategy on top."""

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
"""Most candidates of a query, if more are not asked for: as many as a search on a GPU returns."""
AT_ONCE = 2**16
"""Candidates of all queries together whose vectors are held at a time."""


@dataclass(kw_only=True)
class StrategyConfig:
    """The strategy of the paper's section 2.2."""

    threshold: float = 0.9
    """A candidate whose cosine to the query, or to a document already taken,
    is above this is skipped."""
    both_modalities: bool = True
    """Take only documents that have both text and image; others are not in the index."""
    candidates: PositiveInt = 64
    """Candidates that the search hands to the strategy at first. Where its rules leave too few
    documents, twice as many are looked at, and so on up to 2,048."""
    per_modality: PositiveInt = 2
    """Documents retrieved by the text as query, and as many by the image,
    for each training document."""
    max_documents: NonNegativeInt = 3
    """Most of those drawn for a training sample."""
    random_count: bool = True
    """Draw how many are used uniformly from 0 to max_documents (RA-CM3),
    so that the model works without any."""
    query_dropout: Probability = 0.2
    """Share of the query's tokens (BPE pieces, image patches) dropped before encoding,
    in training only."""
    dropout_variants: PositiveInt = 4
    """Differently dropped-out queries a training document has; one is drawn in each epoch."""


class Encoder(nn.Module):
    """Base of the encoders: unit vectors of texts and of images."""

    embed_dim: int
    """Numbers of a vector."""
    joint: bool = False
    """Whether the inner product of a text and an image says how well they fit."""

    def encode_texts(self, texts: list[str], *, dropout: float = 0.0, seed: int = 0) -> np.ndarray:
        """Vectors (B, D), float32. `dropout` is the share of each text that is left out,
        drawn by `seed`."""
        raise NotImplementedError

    def encode_images(
        self, images_BHWC: np.ndarray, *, dropout: float = 0.0, seed: int = 0
    ) -> np.ndarray:
        """Vectors (B, D), float32, of uint8 images.
        `dropout` is the share of each image that is left out."""
        raise NotImplementedError

    def loss(
        self, texts: list[str], images_BHWC: Tensor
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """What a trained encoder minimises over pairs of a text and an image,
        with the figures to record."""
        raise NotImplementedError

    def fit(self, texts: Sequence[str]) -> None:
        """Takes from the training documents' texts what an encoder needs that is not trained."""
        raise NotImplementedError


class Retriever:
    """Maximum inner product search by an encoder's vectors; relevance, modality, diversity,
    query dropout."""

    trained: ClassVar[bool] = True
    """Whether the encoder is trained by gradient, by its method `loss`; else its method
    `fit(texts)` is called once."""
    encoder: Encoder

    def __init__(self, config: StrategyConfig) -> None:
        self.config = config
        self.rules = Rules(config.threshold, config.both_modalities)

    @classmethod
    def without_weights(cls, config: Any) -> Any:
        """The settings by which an encoder of the same shape is built
        whose weights are read from a run."""
        return config

    @classmethod
    def vector_width(cls, config: Any) -> int:
        """The width of its encoder's vectors."""
        return cls(config).encoder.embed_dim

    def parts(
        self,
        texts: Sequence[str] | None,
        images_BHWC: np.ndarray | None,
        *,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> Parts:
        """Vectors of documents' or queries' parts;
        a part that is None is a zero row in every document."""
        text_BD = (
            None
            if texts is None
            else self.encoder.encode_texts(list(texts), dropout=dropout, seed=seed)
        )
        image_BD = (
            None
            if images_BHWC is None
            else self.encoder.encode_images(images_BHWC, dropout=dropout, seed=seed)
        )
        if text_BD is None:
            if image_BD is None:
                raise ValueError("a query needs texts or images")
            text_BD = np.zeros_like(image_BD)
        return Parts(text_BD, np.zeros_like(text_BD) if image_BD is None else image_BD)

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
        """For each query, rows of the bank to use, the most relevant first,
        and the strategy's verdicts in all.

        Args:
            queries: parts of the queries; `by` names the one that is searched with. For a query
                without it nothing is found.
            exclude_Q: row of each query's own document, -1 for one that is not in the bank; None =
                none is.
            like: parts of the documents whose copies are not to be found; None = the queries'. A
                query that lost tokens to dropout no longer tells its own document's copies.
            taken_QT: rows that each query has already, -1 where there are fewer; neither they nor
                what is like them is found. None = none.

        Returns:
            rows (Q, count), filled up with -1, and the verdicts.
        """
        vectors_QD = queries.text_BD if by == "text" else queries.image_BD
        like = queries if like is None else like
        Q = len(vectors_QD)
        exclude_Q = np.full(Q, NONE) if exclude_Q is None else exclude_Q
        taken_QT = np.zeros((Q, 0), np.int64) if taken_QT is None else taken_QT
        rows_QN = np.full((Q, count), NONE, np.int64)
        verdicts: Counter[str] = Counter()

        # Queries that find too few among their candidates are asked again for twice as many.
        wanted = self.config.candidates
        limit = min(bank.searchable, max(wanted, MOST_CANDIDATES))
        pending = np.flatnonzero(queries.has(by)) if count else np.zeros(0, np.int64)
        while len(pending):
            candidates_PK = bank.search(vectors_QD[pending], wanted)
            short = []
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
                verdicts += total(counted, done)
                short.append(chosen[~done])
            pending = np.concatenate(short)
            wanted = min(2 * wanted, limit)
        return rows_QN, verdicts
