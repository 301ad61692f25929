"""What drawing images takes, by arithmetic: memory by part, and the least time of an image.

Each step of decoding reads all weights that a token is multiplied by, and the keys and values of
the tokens before it. One image alone leaves most of a GPU's arithmetic idle, so the time of reading
is a lower bound (images that are drawn together share one reading of the weights).
"""

from __future__ import annotations

from dataclasses import dataclass

from cm3leon.models.base import Model

STREAMS = 2
"""Rows of an image under guidance: with its conditions and without."""


@dataclass(frozen=True)
class Footprint:
    """Memory in bytes and time in seconds of drawing images with guidance,
    by precision of the weights."""

    ids: int
    """Tokens of an image, including those that close its rows."""
    weights: dict[str, float]
    cache: float
    """Keys and values of an image without retrieved documents."""
    full_cache: float
    """Keys and values of an image whose retrieved documents fill the context."""
    seconds: dict[str, float]
    """Lower bound for one image: only reading is counted, at one code a step."""


def footprint(model: Model, ids: int, bandwidth: float) -> Footprint:
    """Memory and time of drawing images of this many tokens.

    Args:
        bandwidth: bytes that the GPU reads from its memory in a second.
    """
    matrices = model.matrix_weights - model.head.weight.numel()
    total = sum(weight.numel() for weight in model.parameters())
    head, embedding = model.head.weight.numel(), model.embedding.weight.numel()
    rest = total - matrices - head - embedding

    # As `keep_weights` keeps them: tables in float32, the head in bf16, the layers' matrices in
    # the given precision. A step reads only the last two.
    of_layers = {"bf16": 2.0 * matrices}
    if model.matrices:
        of_layers["int8"] = 1.0 * matrices

    # On average, half of an image's keys and values stand before a token.
    cache = 2 * STREAMS * model.cache_numbers
    weights, seconds = {}, {}
    for kind, size in of_layers.items():
        read = size + 2 * head
        weights[kind] = read + 4 * (embedding + rest)
        seconds[kind] = ids * (read + cache * ids / 2) / bandwidth
    return Footprint(
        ids=ids,
        weights=weights,
        cache=float(cache * ids),
        full_cache=float(cache * model.seq_len),
        seconds=seconds,
    )
