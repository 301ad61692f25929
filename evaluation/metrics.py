"""Metrics as pure functions of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

Z95 = 1.959963984540054
"""Quantile of the standard normal distribution for a two-sided interval of 95 %."""


@dataclass(frozen=True)
class Measured:
    """A figure with its 95 % interval, from `n` items."""

    value: float
    low: float
    high: float
    n: int


def proportion(hits_B: np.ndarray) -> Measured:
    """Share of True, with the Wilson score interval (Wilson 1927). Raises ValueError for no items."""
    n = len(hits_B)
    if not n:
        raise ValueError("a proportion of no items is undefined")
    p = float(np.mean(hits_B))
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return Measured(p, max(0.0, centre - half), min(1.0, centre + half), n)


def average(values_B: np.ndarray) -> Measured:
    """Mean, with the normal interval of its standard error. Raises ValueError for no items."""
    n = len(values_B)
    if not n:
        raise ValueError("a mean of no items is undefined")
    mean = float(np.mean(values_B))
    half = Z95 * float(np.std(values_B, ddof=1)) / sqrt(n) if n > 1 else float("inf")
    return Measured(mean, mean - half, mean + half, n)


def psnr(images_BHWC: np.ndarray, reconstructed_BHWC: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images, from the squared error of all of them together."""
    error = np.mean((images_BHWC.astype(np.float64) - reconstructed_BHWC.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def codebook_use(codes_BN: np.ndarray, codebook_size: int) -> tuple[float, float]:
    """Share of the codes that occur, and the perplexity of their distribution."""
    counts_V = np.bincount(codes_BN.ravel(), minlength=codebook_size)
    p_V = counts_V[counts_V > 0] / codes_BN.size
    return float((counts_V > 0).mean()), float(np.exp(-(p_V * np.log(p_V)).sum()))


def equal_to_any(codes_BN: np.ndarray, known_MN: np.ndarray) -> np.ndarray:
    """Which rows of `codes_BN` occur as rows of `known_MN`, boolean (B,)."""
    known = {row.tobytes() for row in np.ascontiguousarray(known_MN, dtype=np.int64)}
    return np.array(
        [row.tobytes() in known for row in np.ascontiguousarray(codes_BN, dtype=np.int64)],
        dtype=bool,
    )
