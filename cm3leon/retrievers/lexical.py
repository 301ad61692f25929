"""Retrieval without learning: by shared rare words, or by the colours of an image's cells."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from cm3leon.registry import RETRIEVERS
from cm3leon.retrievers.base import Encoder, Retriever, StrategyConfig

TEXT_DIM = 256
"""Dimensions that words are projected to: inner products of unit vectors keep to 1/sqrt(256) = 0.06
(Johnson and Lindenstrauss 1984)."""
CELLS = 8
"""Cells along a side of an image."""
IMAGE_DIM = CELLS * CELLS * 3 + 1
"""The last number is a constant, so that an image of one colour has a vector too."""
CONSTANT = 0.1
BUCKETS = 1 << 18
"""Size of the hash table that counts the documents with each word."""


@RETRIEVERS.register("lexical")
class LexicalRetriever(Retriever):
    """TF-IDF of words and mean colours of cells; finds names that no encoder was trained on."""

    trained = False

    @dataclass(kw_only=True)
    class Config(StrategyConfig):
        """The strategy of the paper's section 2.2."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.encoder = LexicalEncoder()


class LexicalEncoder(Encoder):
    """Texts as randomly projected TF-IDF vectors; images as the mean colours of cells, less the
    colour of the whole image.

    Texts and images have separate dimensions, so the inner product of a text and an image is zero,
    and a search by text among means of both finds what a search among texts would.
    """

    embed_dim = TEXT_DIM + IMAGE_DIM

    documents: torch.Tensor
    documents_with_H: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("documents", torch.zeros(()))
        self.register_buffer("documents_with_H", torch.zeros(BUCKETS))

    def fit(self, texts: Sequence[str]) -> None:
        """Count the documents that contain each word."""
        counts_H = np.zeros(BUCKETS, np.float32)
        for text in texts:
            counts_H[list({_bucket(word) for word in _words(text)})] += 1
        self.documents.fill_(len(texts))
        self.documents_with_H.copy_(torch.from_numpy(counts_H))

    def encode_texts(self, texts: list[str], *, dropout: float = 0.0, seed: int = 0) -> np.ndarray:
        """Unit vectors (B, D), float32. `dropout` is the share of each text's words to leave out;
        at least one word stays."""
        rng = np.random.default_rng(seed)
        total, with_H = float(self.documents), self.documents_with_H.cpu().numpy()
        vectors_BD = np.zeros((len(texts), self.embed_dim), np.float32)
        for vector_D, text in zip(vectors_BD, texts, strict=True):
            words = _words(text)
            if dropout and words:
                kept = len(words) - min(round(dropout * len(words)), len(words) - 1)
                words = [words[index] for index in np.sort(rng.permutation(len(words))[:kept])]

            for word in words:
                # Smoothed as in scikit-learn's TfidfTransformer, so that a word of every document
                # still counts a little.
                idf = 1 + np.log((1 + total) / (1 + with_H[_bucket(word)]))
                vector_D[:TEXT_DIM] += idf * direction(word)
        return _unit(vectors_BD)

    def encode_images(
        self, images_BHWC: np.ndarray, *, dropout: float = 0.0, seed: int = 0
    ) -> np.ndarray:
        """Unit vectors (B, D), float32, of uint8 images. `dropout` is the share of each image's
        cells to leave out."""
        colours_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 255
        cells_BCN = F.adaptive_avg_pool2d(colours_BCHW, CELLS).flatten(2).numpy()
        cells_BCN -= cells_BCN.mean(axis=2, keepdims=True)

        # The cells in a random order; the first ones are left out.
        if dropout:
            random_BN = np.random.default_rng(seed).random((len(cells_BCN), CELLS * CELLS))
            order_BN = random_BN.argsort(axis=1)
            cells_BCN *= (order_BN >= round(dropout * CELLS * CELLS))[:, None]

        vectors_BD = np.zeros((len(images_BHWC), self.embed_dim), np.float32)
        vectors_BD[:, TEXT_DIM:-1] = cells_BCN.reshape(len(cells_BCN), IMAGE_DIM - 1)
        vectors_BD[:, -1] = CONSTANT
        return _unit(vectors_BD)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _bucket(word: str) -> int:
    return zlib.crc32(word.encode()) % BUCKETS


@lru_cache(maxsize=1 << 16)
def direction(word: str) -> np.ndarray:
    """A word's direction, of expected length 1: normal numbers seeded by the word."""
    seed = list(word.encode())
    return np.random.default_rng(seed).standard_normal(TEXT_DIM, np.float32) / np.float32(
        np.sqrt(TEXT_DIM)
    )


def _unit(vectors_BD: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a text without words stays zero, as if the document had no text."""
    return vectors_BD / np.maximum(np.linalg.norm(vectors_BD, axis=1, keepdims=True), 1e-12)
