"""Causal self-attention over packed samples, by one of several backends that compute the same."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.config import NoSettings, choices
from cm3leon.models.packed import Packing, attend_packed, one_sample_a_row, packing_of
from cm3leon.registry import ATTENTIONS
from cm3leon.types import UserError


class Attention:
    """Base of the attention backends.

    All compute causal softmax attention, scaled by 1/sqrt(E), inside the samples of packed blocks.
    """

    Config = NoSettings

    def __init__(self, config: Any = None) -> None:
        pass

    @staticmethod
    def missing(device: torch.device) -> str:
        """Say in a few words what training with it on the device lacks; "" if nothing."""
        return ""

    def plan(self, sample_BT: Tensor, device: torch.device) -> Any:
        """Compute once for each forward pass what all layers need to know of the samples' bounds.

        The plan is an argument of compiled layers and consists of tensors. A Python number in it
        would be compiled in as a constant, and another packing would compile the layers again.

        Args:
            sample_BT: number of the sample at each position, on the device or on the CPU. Reading
                the numbers from the CPU waits for no device.
            device: where attention is computed.
        """
        raise NotImplementedError

    def __call__(self, q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor, plan: Any) -> Tensor:
        """Return the attended values (B, A, T, E); a `plan` of None means one sample a row."""
        raise NotImplementedError


def packed_mask(sample_BT: Tensor) -> Tensor:
    """Let each position attend to itself and to earlier positions of its sample.

    Two samples of two tokens each in a block of four give this mask, one row per query:

        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1

    Args:
        sample_BT: number of the sample at each position. Any integers will do; padding has -1.

    Returns:
        Boolean mask (B, 1, T, T), True = may attend.
    """
    T = sample_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=sample_BT.device).tril()
    return ((sample_BT[:, :, None] == sample_BT[:, None, :]) & causal_TT)[:, None]


def run_lengths(sample_BT: Tensor) -> list[int]:
    """Return the lengths of the runs of equal numbers, row after row; a run ends with its row.

    >>> run_lengths(torch.tensor([[0, 0, 1, -1], [-1, 0, 0, 0]]))
    [2, 1, 1, 1, 3]
    """
    return packing_of(sample_BT, torch.device("cpu")).starts_cpu.diff().tolist()


@ATTENTIONS.register("naive")
class Naive(Attention):
    """The formula as it is written, with a mask of all pairs of positions.

    It works in every precision and on every device.
    """

    def plan(self, sample_BT: Tensor, device: torch.device) -> Tensor:
        return packed_mask(sample_BT.to(device, non_blocking=True))

    def __call__(
        self, q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor, plan: Tensor | None
    ) -> Tensor:
        mask = packed_mask(q_BATE.new_zeros(1, q_BATE.shape[2])) if plan is None else plan
        scores_BATT = q_BATE @ k_BATE.transpose(2, 3) / math.sqrt(q_BATE.shape[3])
        return scores_BATT.masked_fill(~mask, -math.inf).softmax(3) @ v_BATE


LONG = 1024
"""Positions of a block from which a CPU computes one sample after the other.

This is 1.8 times as fast as the mask at 1024 positions, and 5 times at 4096.
"""


@ATTENTIONS.register("sdpa")
class Sdpa(Attention):
    """torch's scaled_dot_product_attention, with a mask of all pairs of positions.

    Long blocks on a CPU are computed sample by sample, because there the mask would save no work.
    """

    def plan(self, sample_BT: Tensor, device: torch.device) -> Tensor | Packing:
        if device.type == "cpu" and sample_BT.shape[1] >= LONG:
            return packing_of(sample_BT, device)
        return packed_mask(sample_BT.to(device, non_blocking=True))

    def __call__(
        self, q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor, plan: Tensor | Packing | None
    ) -> Tensor:
        if isinstance(plan, Packing):
            return attend_packed(*_alike(q_BATE, k_BATE, v_BATE), plan)
        return F.scaled_dot_product_attention(
            q_BATE, k_BATE, v_BATE, attn_mask=plan, is_causal=plan is None
        )


@ATTENTIONS.register("flex")
class Flex(Attention):
    """torch's FlexAttention, which skips blocks of positions that have no sample in common.

    It trains on CUDA only.
    """

    @staticmethod
    def missing(device: torch.device) -> str:
        if device.type == "cuda":
            return ""
        return "a CUDA device: FlexAttention has no gradients elsewhere"

    def plan(self, sample_BT: Tensor, device: torch.device) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        sample_BT = sample_BT.to(device, non_blocking=True)

        def same_and_earlier(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (sample_BT[b, q] == sample_BT[b, k])

        B, T = sample_BT.shape
        return create_block_mask(same_and_earlier, B, None, T, T, device=str(device))

    def __call__(self, q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor, plan: Any) -> Tensor:
        device = q_BATE.device
        if plan is None:
            zeros_BT = torch.zeros(len(q_BATE), q_BATE.shape[2], dtype=torch.int64, device=device)
            plan = self.plan(zeros_BT, device)
        from torch.nn.attention.flex_attention import flex_attention

        # A compiled layer compiles it along. Outside of one it is compiled here, for it would be
        # slow on CUDA otherwise.
        attend: Callable[..., Any] = flex_attention
        if device.type == "cuda" and not torch.compiler.is_compiling():
            attend = _compiled_flex_attention()
        return attend(*_alike(q_BATE, k_BATE, v_BATE), block_mask=plan)


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@ATTENTIONS.register("xformers")
class Xformers(Attention):
    """xformers' memory_efficient_attention.

    All samples of all blocks form one row under a block-diagonal mask.
    """

    @staticmethod
    def missing(device: torch.device) -> str:
        if device.type != "cuda":
            return "a CUDA device: memory_efficient_attention has no operator elsewhere"
        return _missing_of_xformers()

    def plan(self, sample_BT: Tensor, device: torch.device) -> Packing:
        return packing_of(sample_BT, device)

    def __call__(
        self, q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor, plan: Packing | None
    ) -> Tensor:
        if plan is None:
            plan = one_sample_a_row(len(q_BATE), q_BATE.shape[2], q_BATE.device)
        return attend_packed(*_alike(q_BATE, k_BATE, v_BATE), plan)


def _alike(q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give queries and keys the precision of the values.

    Under autocast the norms of queries and keys return float32, whereas the product that gives the
    values returns bf16.
    """
    return q_BATE.to(v_BATE.dtype), k_BATE.to(v_BATE.dtype), v_BATE


@cache
def _missing_of_xformers() -> str:
    """Say what keeps xformers' operators from training here; "" if nothing does.

    Each of its wheels is built for one version of torch, and fails with another.
    """
    if importlib.util.find_spec("xformers") is None:
        return "the package xformers (pip install xformers)"
    try:
        from xformers.ops import fmha
    # An extension that was built for another torch may raise anything.
    except Exception as error:
        return (
            f"an xformers that imports with torch {torch.__version__} "
            f"({type(error).__name__}: {error})"
        )

    forward = any(operator.is_available() for operator in fmha.ALL_FW_OPS)
    if forward and any(operator.is_available() for operator in fmha.ALL_BW_OPS):
        return ""
    installed = importlib.metadata.version("xformers")
    return (
        f"an xformers whose operators load with torch {torch.__version__}: "
        f"those of {installed} do not"
    )


PREFERRED = ("xformers", "flex", "sdpa")
"""Order of `auto`: it takes the first of these backends that can train on the device."""


class ChosenAttention(NamedTuple):
    """The backend in use. Printed, it is a line for the log with the reasons against the others."""

    name: str
    attention: Attention
    passed_over: tuple[str, ...] = ()
    """Why `auto` did not take the backends that it prefers, a clause for each."""

    def __str__(self) -> str:
        if not self.passed_over:
            return self.name
        return f"{self.name} ({'; '.join(self.passed_over)})"


def check_name(name: str) -> None:
    """Raise UserError for a name that is neither a backend nor `auto`."""
    allowed = ["auto", *ATTENTIONS.names()]
    if name not in allowed:
        raise UserError(f"attention is {name}, which is not known; {choices(name, allowed)}")


@cache
def choose(name: str, device: torch.device) -> ChosenAttention:
    """Return the backend of that name, or for `auto` the first of `PREFERRED` that can be used.

    Raises:
        UserError: for a backend that cannot be used on the device.
    """
    if name != "auto":
        missing = ATTENTIONS.get(name).missing(device)
        if missing:
            raise UserError(
                f"model.attention is {name}, which needs {missing}; take model.attention=auto"
            )
        return ChosenAttention(name, ATTENTIONS.build(name))

    passed_over: list[str] = []
    for each in PREFERRED:
        missing = ATTENTIONS.get(each).missing(device)
        if not missing:
            return ChosenAttention(each, ATTENTIONS.build(each), tuple(passed_over))
        passed_over.append(f"{each} lacks {missing}")
    raise AssertionError(f"{PREFERRED[-1]} runs everywhere")


def attend_by(
    name: str, ids_BT: Tensor, sample_BT: Tensor | None, *, cached: bool
) -> tuple[Attention, Any]:
    """Return the backend for a forward pass, and its plan; the plan is None without packed samples.

    Args:
        name: the requested backend.
        ids_BT: the ids of the pass, on the device that computes it.
        sample_BT: number of the sample at each position, or None.
        cached: whether a cache's pass computes attention instead. The backend then goes unused, so
            the one that runs everywhere is taken.
    """
    attention = choose("sdpa" if cached else name, ids_BT.device).attention
    if sample_BT is None:
        return attention, None
    return attention, attention.plan(sample_BT, ids_BT.device)
