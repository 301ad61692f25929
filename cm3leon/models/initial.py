"""Initial weights from one stream of random numbers, of which each rank draws its own shards only.

A seed gives the same initial model on any number of ranks: the one that a single process draws,
parameter after parameter, from torch's generator on the CPU. That is a Mersenne Twister (MT19937;
Matsumoto and Nishimura 1998), whose k-th number is a linear function of its state over the field of
two elements. A generator can therefore jump to any index of the stream without drawing the numbers
before it:

    stream      | layer 0: qkv ........ | out .... | up ............ | ...
    rank 1 of 4       ^^^^ jump here, draw     ^ jump, draw

The k-th state is t^k modulo the generator's characteristic polynomial, applied to the words of the
state (Haramoto et al. 2008). Polynomials are Python integers; bit i is the coefficient of t^i, so
t^3 + t + 1 is 0b1011, its product with t is 0b10110, and a sum is an exclusive or.
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
"""Words of the state, and the constants of the recurrence.

Word k + 624 is computed from the words k + 397, k + 1 and k.
"""
DEGREE = 19937
"""Bits of the state that matter: all but the lower 31 of the first word."""


class First(NamedTuple):
    """Initialisation of one parameter. In a list, the last one of a parameter holds."""

    name: str
    rule: Literal["normal", "zeros", "ones"]
    std: float = 0.0
    """Standard deviation of the normal distribution, which is cut off at three of them."""


def fill(weight: Tensor, first: First, generator: torch.Generator | None = None) -> None:
    """Initialise a parameter, or rows of it, in place.

    Each number of the stream gives one normal number, by the inverse of the cumulative distribution
    function, as torch's `trunc_normal_` did up to 2.9. Later versions of it draw again until all
    numbers of a tensor are within the bounds, so parts of a tensor could not be drawn alone.
    """
    if first.rule != "normal":
        nn.init.constant_(weight, float(first.rule == "ones"))
        return
    share = math.erf(3 / math.sqrt(2))
    with torch.no_grad():
        weight.uniform_(-share, share, generator=generator).erfinv_()
        weight.mul_(first.std * math.sqrt(2)).clamp_(-3 * first.std, 3 * first.std)


Rows = Callable[[nn.Parameter], tuple[Tensor, int]]
"""Parameter -> this rank's rows of it, to be written into, and the index of the first of them."""


class Beginning:
    """Initialisation of a module, and how much of the stream it takes.

    Building a module draws twice: torch initialises each part in its own way, which is overwritten,
    and then come the `firsts`.

    Args:
        module: read for its shapes only, so it may be on the meta device.
        firsts: in the order in which they are drawn.
    """

    def __init__(self, module: nn.Module, firsts: list[First]) -> None:
        self.firsts = firsts
        self.shapes = {name: weight.shape for name, weight in module.named_parameters()}
        self.by_torch = sum(_drawn_by_torch(part) for part in module.modules())

    def end(self) -> int:
        """Return how many numbers of the stream building the module takes."""
        normal = [self.shapes[each.name] for each in self.firsts if each.rule == "normal"]
        return self.by_torch + sum(shape.numel() for shape in normal)


def generator_at(state: Tensor, place: int) -> torch.Generator:
    """Build a CPU generator that is `place` numbers after a state (`torch.get_rng_state`)."""
    generator = torch.Generator()
    generator.set_state(state)
    skip(generator, place)
    return generator


def draw(module: nn.Module, beginning: Beginning, state: Tensor, rows: Rows) -> None:
    """Draw a rank's rows of all parameters, with the numbers of a module built whole on the CPU.

    Args:
        module: has the parameters of `beginning`; others are left as they are.
        beginning: initialisation of the module.
        state: of the CPU generator before building (`torch.get_rng_state`).
        rows: finds this rank's rows.
    """
    parameters = dict(module.named_parameters())
    generator = generator_at(state, 0)
    last = {first.name: number for number, first in enumerate(beginning.firsts)}

    # `place` is the index in the stream of the present parameter's first number, `at` the index of
    # the generator's next number.
    place, at = beginning.by_torch, 0
    for number, first in enumerate(beginning.firsts):
        parameter = parameters[first.name]
        if last[first.name] == number:
            wanted, row = rows(parameter)
            if first.rule == "normal" and wanted.numel():
                # Jump over everything before this rank's first row.
                start = place + row * (parameter.numel() // len(parameter))
                skip(generator, start - at)
                drawn = torch.empty(wanted.shape, dtype=wanted.dtype)
                fill(drawn, first, generator)
                at = start + drawn.numel()
                wanted.copy_(drawn)
            elif first.rule != "normal":
                fill(wanted, first)

        # Numbers that a later initialisation overwrites are part of the stream, too.
        if first.rule == "normal":
            place += parameter.numel()


def _drawn_by_torch(part: nn.Module) -> int:
    """Return how many numbers of the stream torch takes to build a part of a model."""
    if isinstance(part, nn.Embedding):
        # torch draws normal numbers sixteen at a time. Where the count is no multiple of sixteen,
        # it draws the last sixteen a second time.
        count = part.weight.numel()
        return count + (16 if count % 16 else 0)
    return part.weight.numel() if isinstance(part, nn.Linear) else 0


# ------------------------------------------------------------------------------------------------ the jump


def skip(generator: torch.Generator, count: int) -> None:
    """Advance a CPU generator by `count` numbers of 32 bits."""
    if not count:
        return
    state = bytearray(generator.get_state().numpy().tobytes())
    left, _, following = struct.unpack_from("<iiQ", state, 8)
    words = np.frombuffer(state, np.uint64, WORDS, 24).astype(np.uint32)

    # Number the state's words 0 to 623, and those that it will generate from 624 on. The next number
    # comes from word `following`. To advance is to make the state hold word `following + count`.
    following = WORDS if left == 1 else following
    jump = following + count - WORDS
    if jump < 0:
        # The wanted word is in the present state.
        struct.pack_into("<iiQ", state, 8, WORDS + 1 - following - count, 1, following + count)
    else:
        words = _words_at(words, jump)
        struct.pack_into("<iiQ", state, 8, 1, 1, 0)
        state[24 : 24 + 8 * WORDS] = words.astype(np.uint64).tobytes()
    generator.set_state(torch.frombuffer(state, dtype=torch.uint8))


def _words_at(words: np.ndarray, jump: int) -> np.ndarray:
    """Return the 624 words of the state after `jump` more words.

    It is the exclusive or of those windows of 624 words, among the next 19937, whose index is an
    exponent of t^jump modulo the characteristic polynomial.
    """
    made = _continued(words, DEGREE + WORDS)
    wanted = _bits(_power(jump), DEGREE)
    windows = np.lib.stride_tricks.sliding_window_view(made, WORDS)
    found = np.zeros(WORDS, np.uint32)
    for start in range(0, DEGREE, 1024):  # so many windows stay in the processor's cache
        part = slice(start, min(start + 1024, DEGREE))
        found ^= np.bitwise_xor.reduce(windows[part][wanted[part]], axis=0)
    return found


def _continued(words: np.ndarray, count: int) -> np.ndarray:
    """Extend the words by those that the generator makes of them, to `count` in all."""
    made = np.empty(count, np.uint32)
    made[:WORDS] = words

    # Words that do not depend on each other are made together.
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
    """Compute t^exponent modulo the characteristic polynomial, by squaring."""
    power = 1
    for digit in f"{exponent:b}":
        power = _reduced(_squared(power))
        if digit == "1":
            power = _reduced(power << 1)
    return power


@cache
def _characteristic() -> tuple[int, ...]:
    """Return the exponents of the characteristic polynomial that are below its degree.

    The formula is that of the generator's authors (Matsumoto and Nishimura 1998).
    """
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
    """Multiply two polynomials, of which the second has few terms."""
    product = 0
    for exponent in np.flatnonzero(_bits(other, other.bit_length())):
        product ^= one << int(exponent)
    return product


def _squared(polynomial: int) -> int:
    """Square a polynomial: over two elements, its exponents double and nothing else changes."""
    bits = _bits(polynomial, polynomial.bit_length())
    spread = np.zeros(2 * len(bits), np.uint8)
    spread[::2] = bits
    return int.from_bytes(np.packbits(spread, bitorder="little").tobytes(), "little")


def _reduced(polynomial: int) -> int:
    """Return the remainder of a division by the characteristic polynomial."""
    low = (1 << DEGREE) - 1
    while high := polynomial >> DEGREE:
        polynomial &= low
        for exponent in _characteristic():
            polynomial ^= high << exponent
    return polynomial


def _bits(polynomial: int, count: int) -> np.ndarray:
    """Return the coefficients of t^0 to t^(count - 1) as booleans."""
    content = np.frombuffer(
        (polynomial & (1 << count) - 1).to_bytes(count // 8 + 1, "little"), np.uint8
    )
    return np.unpackbits(content, bitorder="little")[:count].astype(bool)
