"""Seeds made of seeds: whatever is drawn is a function of the experiment's seed and of a position, never of a state."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Number = TypeVar("Number", int, np.ndarray)
"""An int, or an array (B,) of uint64: one body of code serves both, as arithmetic on the latter is modulo 2^64."""

GOLDEN = 0x9E3779B97F4A7C15
"""What the states of SplitMix64 are apart, 2^64 over the golden ratio."""
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Of SplitMix64's output function."""
LOW_64 = (1 << 64) - 1


def wrapped(seed: int, bits: int = 64) -> int:
    """A seed of so many bits (64 for torch, 31 for FAISS): the number itself where it fits, modulo 2^bits else.

    Whatever is computed from an experiment's seed (of 64 bits) passes through it on its way to a library.
    """
    return seed % (1 << bits)


def nth_seed(seed: int, number: int) -> int:
    """The seed of a numbered thing, such as a training step or a row, within 64 bits."""
    return wrapped(seed * 1_000_003 + number)


def mixed(*numbers: int) -> int:
    """64 bits that look random, a function of the numbers and their order: a seed made of seeds."""
    key = 0
    for number in numbers:
        key = split_mix((key + number) & LOW_64)
    return key


def split_mix(x: Number) -> Number:
    """The output function of SplitMix64: a bijection of 64 bits in which each bit depends on all others.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014.
    """
    x = (x + GOLDEN) & LOW_64
    x = ((x ^ (x >> 30)) * MULTIPLIERS[0]) & LOW_64
    x = ((x ^ (x >> 27)) * MULTIPLIERS[1]) & LOW_64
    return x ^ (x >> 31)
