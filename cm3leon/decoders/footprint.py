"""What a decoder takes to draw images, by arithmetic: memory by part,
and the least time of an image.

Each step of the decoding reads all weights that a token is multiplied by, and the keys and values
of what stands before it. An image alone leaves a GPU's products idle, so that the time is at least
that of reading (the weights are read once for all images that are drawn together).
"""

from __future__ import annotations

from dataclasses import dataclass

from cm3leon.models.base import Model

STREAMS = 2
"""Rows of an image under guidance: with its conditions and without."""


@dataclass(frozen=True)
class Footprint:
    """Of a decoder that is asked for images with guidance; bytes and seconds,
    by precision of the weights."""

    ids: int
    """Of an image, with what closes its rows."""
    weights: dict[str, float]
    cache: float
    """Keys and values of an image alone."""
    full_cache: float
    """Those of an image whose retrieved documents fill the context."""
    seconds: dict[str, float]
    """Of an image alone, at least: nothing but reading is counted, and one code a step."""


def footprint(model: Model, ids: int, bandwidth: float) -> Footprint:
    """What a decoder takes for images of so many ids.

    Args:
        bandwidth: bytes that the GPU reads from its memory in a second.
    """
    matrices = model.matrix_weights - model.head.weight.numel()
    total = sum(weight.numel() for weight in model.parameters())
    head, embedding = model.head.weight.numel(), model.embedding.weight.numel()
    rest = total - matrices - head - embedding
    # As `keep_weights` keeps them: tables in float32, the head in bf16, the layers as is said.
    weights = {"bf16": 2.0 * matrices}
    if model.matrices:
        weights["int8"] = 1.0 * matrices
    read = {kind: size + 2 * head for kind, size in weights.items()}
    cache = 2 * STREAMS * model.cache_numbers
    return Footprint(
        ids=ids,
        weights={kind: size + 4 * (embedding + rest) for kind, size in read.items()},
        cache=float(cache * ids),
        full_cache=float(cache * model.seq_len),
        seconds={kind: ids * (size + cache * ids / 2) / bandwidth for kind, size in read.items()},
    )
