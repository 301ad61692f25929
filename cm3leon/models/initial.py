"""First weights from one stream of random numbers, of which each rank draws only what its shards are made of.

What a model of a seed begins with is what one process draws, parameter after parameter, from torch's generator on the
CPU, a Mersenne Twister (MT19937; Matsumoto and Nishimura 1998). Its k-th number is a linear function of its state over
the field of two elements, so a generator can be set to any place of the stream without drawing what comes before:

    stream      | layer 0: qkv ........ | out .... | up ............ | ...
    rank 1 of 4       ^^^^ jump here, draw     ^ jump, draw

The k-th state is t^k modulo the generator's characteristic polynomial, applied to the words of the state (Haramoto et
al. 2008). Polynomials are Python integers, bit i the coefficient of t^i.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

WORDS, MIDDLE, TWIST = 624, 397, 0x9908B0DF
"""Words of the state, and constants of the recurrence: word k + 624 is made of words k + 397, k + 1 and k."""
DEGREE = 19937
"""Bits of the state that count: the lower 31 of the first word do not."""


class First(NamedTuple):
    """How a parameter begins; a later one of the same parameter takes its place."""

    name: str
    rule: Literal["normal", "zeros", "ones"]
    std: float = 0.0
    """Of a normal distribution that is cut off at three of them."""


def fill(weight: Tensor, first: First, generator: torch.Generator | None = None) -> None:
    """Gives a parameter, or rows of it, the numbers that it begins with.

    One number of the stream makes one of the normal distribution, by the inverse of its cumulative function, as
    torch's `trunc_normal_` did up to 2.9. Later ones draw until all numbers of a tensor lie inside the bounds, so that
    its parts could not be drawn alone.
    """
    if first.rule != "normal":
        nn.init.constant_(weight, float(first.rule == "ones"))
        return
    share = math.erf(3 / math.sqrt(2))
    with torch.no_grad():
        weight.uniform_(-share, share, generator=generator).erfinv_()
        weight.mul_(first.std * math.sqrt(2)).clamp_(-3 * first.std, 3 * first.std)


Rows = Callable[[nn.Parameter], tuple[Tensor, int]]
"""Parameter -> the rows of it that are this rank's, to be written into, and the number of the first of them."""


class Beginning:
    """What a module begins with, and where in the stream; from its shapes, which may be on the meta device.

    Building draws twice: torch's own initialisation of each part, of which nothing is left, and then `firsts`.

    Args:
        firsts: in the order in which they are drawn.
    """

    def __init__(self, module: nn.Module, firsts: list[First]) -> None:
        self.firsts = firsts
        self.shapes = {name: weight.shape for name, weight in module.named_parameters()}
        self.by_torch = sum(_drawn_by_torch(part) for part in module.modules())

    def end(self) -> int:
        """Numbers of the stream that building takes."""
        normal = [self.shapes[each.name] for each in self.firsts if each.rule == "normal"]
        return self.by_torch + sum(shape.numel() for shape in normal)


def generator_at(state: Tensor, place: int) -> torch.Generator:
    """A generator on the CPU so many numbers behind a state (`torch.get_rng_state`)."""
    generator = torch.Generator()
    generator.set_state(state)
    skip(generator, place)
    return generator


def draw(module: nn.Module, beginning: Beginning, state: Tensor, rows: Rows) -> None:
    """Draws a rank's rows of all parameters, as building the module on the CPU would have drawn them from `state` on.

    Args:
        module: with the parameters of `beginning`; others are left as they are.
        state: of a generator on the CPU (`torch.get_rng_state`).
    """
    parameters = dict(module.named_parameters())
    place, firsts = beginning.by_torch, beginning.firsts
    at = 0
    generator = generator_at(state, 0)
    last = {first.name: number for number, first in enumerate(firsts)}
    for number, first in enumerate(firsts):
        parameter = parameters[first.name]
        if last[first.name] == number:
            wanted, row = rows(parameter)
            if first.rule == "normal" and wanted.numel():
                start = place + row * (parameter.numel() // len(parameter))
                skip(generator, start - at)
                drawn = torch.empty(wanted.shape, dtype=wanted.dtype)
                fill(drawn, first, generator)
                at = start + drawn.numel()
                wanted.copy_(drawn)
            elif first.rule != "normal":
                fill(wanted, first)
        place += parameter.numel() if first.rule == "normal" else 0


def _drawn_by_torch(part: nn.Module) -> int:
    """Numbers that torch takes from the stream when it builds a part of a model."""
    if isinstance(part, nn.Embedding):
        # Normal numbers are made sixteen at a time; the last sixteen are made again where they do not come out even.
        count = part.weight.numel()
        return count + (16 if count % 16 else 0)
    return part.weight.numel() if isinstance(part, nn.Linear) else 0


# ------------------------------------------------------------------------------------------------ the jump


def skip(generator: torch.Generator, count: int) -> None:
    """Sets a generator on the CPU `count` numbers of 32 bits ahead."""
    if not count:
        return
    state = bytearray(generator.get_state().numpy().tobytes())
    left, _, following = struct.unpack_from("<iiQ", state, 8)
    words = np.frombuffer(state, np.uint64, WORDS, 24).astype(np.uint32)

    # The state's words are followed by those that it makes; the next number is made of word `following` of them all.
    following = WORDS if left == 1 else following
    jump = following + count - WORDS
    if jump < 0:
        struct.pack_into("<iiQ", state, 8, WORDS + 1 - following - count, 1, following + count)
    else:
        words = _words_at(words, jump)
        struct.pack_into("<iiQ", state, 8, 1, 1, 0)
        state[24 : 24 + 8 * WORDS] = words.astype(np.uint64).tobytes()
    generator.set_state(torch.frombuffer(state, dtype=torch.uint8))


def _words_at(words: np.ndarray, jump: int) -> np.ndarray:
    """The words of the state so many words later."""
    made = _continued(words, DEGREE + WORDS)
    wanted = _bits(_power(jump), DEGREE)
    windows = np.lib.stride_tricks.sliding_window_view(made, WORDS)
    found = np.zeros(WORDS, np.uint32)
    for start in range(0, DEGREE, 1024):  # a few at a time, which stay in the cache
        part = slice(start, min(start + 1024, DEGREE))
        found ^= np.bitwise_xor.reduce(windows[part][wanted[part]], axis=0)
    return found


def _continued(words: np.ndarray, count: int) -> np.ndarray:
    """The words and those that follow, `count` in all."""
    made = np.empty(count, np.uint32)
    made[:WORDS] = words
    step = WORDS - MIDDLE
    for start in range(0, count - WORDS, step):
        size = min(step, count - WORDS - start)
        first, second = made[start : start + size], made[start + 1 : start + 1 + size]
        mixed = (first & np.uint32(0x80000000)) | (second & np.uint32(0x7FFFFFFF))
        twisted = (mixed >> np.uint32(1)) ^ np.where(mixed & 1, np.uint32(TWIST), np.uint32(0))
        middle = made[start + MIDDLE : start + MIDDLE + size]
        made[start + WORDS : start + WORDS + size] = middle ^ twisted.astype(np.uint32)
    return made


@cache
def _power(exponent: int) -> int:
    """t^exponent modulo the characteristic polynomial."""
    power = 1
    for digit in f"{exponent:b}":
        power = _reduced(_squared(power))
        if digit == "1":
            power = _reduced(power << 1)
    return power


@cache
def _characteristic() -> tuple[int, ...]:
    """Exponents of the characteristic polynomial below its degree, by the formula of the generator's authors (1998)."""
    first = 1 << WORDS | 1 << MIDDLE
    second = 1 << (WORDS - 1) | 1 << (MIDDLE - 1)
    powers = [1]
    for _ in range(31):
        powers.append(_product(powers[-1], second))
    polynomial = _product(first, powers[31])
    for bit in range(31):
        if TWIST >> bit & 1:
            polynomial ^= _product(first, powers[30 - bit])
    polynomial ^= TWIST >> 31
    return tuple(np.flatnonzero(_bits(polynomial, DEGREE)).tolist())


def _product(one: int, other: int) -> int:
    """Of two polynomials, the second of few terms."""
    product = 0
    for exponent in np.flatnonzero(_bits(other, other.bit_length())):
        product ^= one << int(exponent)
    return product


def _squared(polynomial: int) -> int:
    """Over two elements the square has the same coefficients, at twice the exponents."""
    bits = _bits(polynomial, polynomial.bit_length())
    spread = np.zeros(2 * len(bits), np.uint8)
    spread[::2] = bits
    return int.from_bytes(np.packbits(spread, bitorder="little").tobytes(), "little")


def _reduced(polynomial: int) -> int:
    """The remainder by the characteristic polynomial."""
    low = (1 << DEGREE) - 1
    while high := polynomial >> DEGREE:
        polynomial &= low
        for exponent in _characteristic():
            polynomial ^= high << exponent
    return polynomial


def _bits(polynomial: int, count: int) -> np.ndarray:
    """Coefficients of t^0 to t^(count - 1), booleans."""
    content = np.frombuffer(
        (polynomial & (1 << count) - 1).to_bytes(count // 8 + 1, "little"), np.uint8
    )
    return np.unpackbits(content, bitorder="little")[:count].astype(bool)
