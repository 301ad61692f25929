"""Small documents of token ids, and a strategy that draws them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import TokenDocument, TokenSegment

VOCAB = Vocab(text_size=40, image_size=16, sentinels=8)


def segment(modality: Any, length: int) -> TokenSegment:
    """Ids of the modality's range in rising order, from its first one again after its last."""
    low, high = VOCAB.id_range(modality)
    return TokenSegment(modality, low + np.arange(length) % (high - low))


def document(*lengths: int, name: str = "document") -> TokenDocument:
    """Segments of these lengths, text and image in turn."""
    parts = []
    for number, length in enumerate(lengths):
        modality = "image" if number % 2 else "text"
        parts.append(segment(modality, length))
    return TokenDocument(name, tuple(parts))


segments = st.builds(segment, st.sampled_from(["text", "image"]), st.integers(0, 9))
documents = st.lists(segments, min_size=1, max_size=4).map(
    lambda parts: TokenDocument("any", tuple(parts))
)


def unrotate(ids_T: np.ndarray, vocab: Vocab) -> np.ndarray:
    """The sample that `rotate` was given, read off the rotated ids alone.

    Raises:
        ValueError: if the ids are no rotated sample.
    """
    sentinels = np.flatnonzero(vocab.is_sentinel(ids_T))
    count, odd = divmod(len(sentinels), 2)

    # Each sentinel stands once where its span was, and once in front of the span itself.
    if odd or (ids_T[sentinels[:count]] != ids_T[sentinels[count:]]).any():
        raise ValueError("sentinels must occur twice each, in the same order")
    if not count:
        return ids_T

    tail = sentinels[count]
    pieces, position = [], 0
    for number in range(count):
        hole, start = sentinels[number], sentinels[count + number]
        end = sentinels[count + number + 1] if number + 1 < count else len(ids_T)
        if ids_T[end - 1] != vocab.end_of_span:
            raise ValueError(f"span {number} does not end in <end_of_span>")
        pieces += [ids_T[position:hole], ids_T[start + 1 : end - 1]]
        position = hole + 1

    return np.concatenate([*pieces, ids_T[position:tail]])
