"""Seeds from seeds: a draw depends on the experiment's seed and a position, never on a state."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Number = TypeVar("Number", int, np.ndarray)
"""An int, or an array (B,) of uint64, whose arithmetic is modulo 2^64 anyway."""

GOLDEN = 0x9E3779B97F4A7C15
"""Distance between successive states of SplitMix64: 2^64 over the golden ratio."""
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Factors of SplitMix64's output function."""
LOW_64 = (1 << 64) - 1


def wrapped(seed: int, bits: int = 64) -> int:
    """Reduce a seed modulo 2^bits: 64 bits for torch, 31 for FAISS.

    Every number computed from an experiment's seed (of 64 bits) passes through here on its way to a
    library.
    """
    return seed % (1 << bits)


def nth_seed(seed: int, number: int) -> int:
    """Return the seed of a numbered item, such as a training step or a row, within 64 bits."""
    return wrapped(seed * 1_000_003 + number)


def mixed(*numbers: int) -> int:
    """Hash numbers, in their order, to a seed of 64 bits."""
    key = 0
    for number in numbers:
        key = split_mix((key + number) & LOW_64)
    return key


def split_mix(x: Number) -> Number:
    """Apply SplitMix64's output function, a bijection whose output bits depend on all input bits.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014.
    """
    x = (x + GOLDEN) & LOW_64
    x = ((x ^ (x >> 30)) * MULTIPLIERS[0]) & LOW_64
    x = ((x ^ (x >> 27)) * MULTIPLIERS[1]) & LOW_64
    return x ^ (x >> 31)
