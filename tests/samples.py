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
