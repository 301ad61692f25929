"""Small documents of ids, for the tests of what is done with them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import TokenDocument, TokenSegment

VOCAB = Vocab(text_size=40, image_size=16, sentinels=8)


def segment(modality: Any, length: int) -> TokenSegment:
    """Ids of the modality's range in rising order."""
    low, high = VOCAB.id_range(modality)
    return TokenSegment(modality, low + np.arange(length) % (high - low))


def document(*lengths: int, name: str = "document") -> TokenDocument:
    """Segments of these lengths, text and image in turn."""
    return TokenDocument(
        name, tuple(segment(("text", "image")[k % 2], n) for k, n in enumerate(lengths))
    )


segments = st.builds(segment, st.sampled_from(["text", "image"]), st.integers(0, 9))
documents = st.lists(segments, min_size=1, max_size=4).map(
    lambda parts: TokenDocument("any", tuple(parts))
)


def unrotate(ids_T: np.ndarray, vocab: Vocab) -> np.ndarray:
    """The sample that `rotate` was given, read off the ids alone. ValueError for ids that are no rotated sample."""
    sentinels = np.flatnonzero(vocab.is_sentinel(ids_T))
    count, odd = divmod(len(sentinels), 2)
    if odd or (ids_T[sentinels[:count]] != ids_T[sentinels[count:]]).any():
        raise ValueError("sentinels must occur twice each, in the same order")
    if not count:
        return ids_T
    tail = sentinels[count]
    pieces, position = [], 0
    for number in range(count):
        place, start = sentinels[number], sentinels[count + number]
        end = sentinels[count + number + 1] if number + 1 < count else len(ids_T)
        if ids_T[end - 1] != vocab.end_of_span:
            raise ValueError(f"span {number} does not end in <end_of_span>")
        pieces += [ids_T[position:place], ids_T[start + 1 : end - 1]]
        position = place + 1
    return np.concatenate([*pieces, ids_T[position:tail]])
