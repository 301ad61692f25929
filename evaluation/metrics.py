"""Metrics as pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Share of True values, with the interval of `wilson`. Raises ValueError for no values."""
    n = len(hits_B)
    if not n:
        raise ValueError("a proportion of no items is undefined")
    p = float(np.mean(hits_B))
    return Measured(p, *wilson(p, n), n)


def wilson(p: float, n: int) -> tuple[float, float]:
    """The Wilson score interval of 95 % of a share p of n items (Wilson 1927)."""
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    # The share lies inside its interval, and rounding must not put it outside.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def average(values_B: np.ndarray) -> Measured:
    """Mean, with the normal interval of its standard error. Raises ValueError for no values."""
    n = len(values_B)
    if not n:
        raise ValueError("a mean of no items is undefined")
    mean = float(np.mean(values_B))
    half = float("inf")  # a single value says nothing of its spread
    if n > 1:
        half = Z95 * float(np.std(values_B, ddof=1)) / sqrt(n)
    return Measured(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class OverRuns:
    """How a figure varies over runs with different seeds."""

    deviation: float
    """Sample standard deviation (n - 1) of a run's figure."""
    low: float
    """Lower end of the 95 % interval of the mean over seeds."""
    high: float
    """Upper end of the interval."""


_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045),
)
"""Quantiles of Student's t for a two-sided interval of 95 %, for 1, 2, ... degrees of freedom."""
MOST_RUNS = len(_T95) + 1
"""Most runs that `over_runs` accepts."""


def over_runs(values: Sequence[float]) -> OverRuns:
    """Spread of a figure over runs, and the interval of its mean by Student's t (Student 1908).

    Raises:
        ValueError: for fewer than 2 values, or more than `MOST_RUNS`.
    """
    n = len(values)
    if not 2 <= n <= MOST_RUNS:
        raise ValueError(f"there are {n} runs; there must be 2 to {MOST_RUNS}")
    deviation = float(np.std(values, ddof=1))
    half = _T95[n - 2] * deviation / sqrt(n)
    mean = float(np.mean(values))
    return OverRuns(deviation, mean - half, mean + half)


def psnr_each(images_BHWC: np.ndarray, reconstructed_BHWC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each uint8 image in dB, (B,); infinite for identical images."""
    error_B = np.square(images_BHWC.astype(np.float64) - reconstructed_BHWC).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error_B)


def psnr(images_BHWC: np.ndarray, reconstructed_BHWC: np.ndarray) -> float:
    """Mean over images of their PSNR in dB, as on every page and in every record.

    Images that come back exactly have no PSNR and do not count; if all come back so, the mean is
    infinite.
    """
    psnr_B = psnr_each(images_BHWC, reconstructed_BHWC)
    known_B = np.isfinite(psnr_B)
    if not known_B.any():
        return float("inf")
    return float(psnr_B[known_B].mean())


def codebook_use(codes_BN: np.ndarray, codebook_size: int) -> tuple[float, float]:
    """Share of the codes that occur, and the perplexity of their distribution."""
    counts_V = np.bincount(codes_BN.ravel(), minlength=codebook_size)
    p_V = counts_V[counts_V > 0] / codes_BN.size
    return float((counts_V > 0).mean()), float(np.exp(-(p_V * np.log(p_V)).sum()))


def equal_to_any(codes_BN: np.ndarray, known_MN: np.ndarray) -> np.ndarray:
    """Which rows of `codes_BN` occur as rows of `known_MN`, boolean (B,)."""
    known = {row.tobytes() for row in np.ascontiguousarray(known_MN, dtype=np.int64)}
    asked = np.ascontiguousarray(codes_BN, dtype=np.int64)
    return np.array([row.tobytes() in known for row in asked], dtype=bool)
