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
    """Base of the backends: softmax attention, scaled by 1/sqrt(E), inside the samples of packed blocks."""

    Config = NoSettings

    def __init__(self, config: Any = None) -> None:
        pass

    @staticmethod
    def missing(device: torch.device) -> str:
        """What is missing to train with it on that device, in a few words; "" if nothing is."""
        return ""

    def plan(self, sample_BT: Tensor, device: torch.device) -> Any:
        """What all layers need of the samples' places, on that device: computed once a forward pass.

        Compiled layers get it as an argument, so it is made of tensors: what is a Python number in it is taken for a
        constant, and another packing would have them compiled again.

        Args:
            sample_BT: on the device, or on the CPU, where looking at the numbers waits for no device.
        """
        raise NotImplementedError

    def __call__(self, q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor, plan: Any) -> Tensor:
        """The values attended to, (B, A, T, E); `plan` None means one sample a row."""
        raise NotImplementedError


def packed_mask(sample_BT: Tensor) -> Tensor:
    """Which positions may attend to which: earlier ones, and itself, of the same sample.

    Two samples of two tokens in a block of four give, a row for each query:

        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1

    Args:
        sample_BT: number of the sample at each position (any integers; padding has its own, -1).

    Returns:
        Boolean mask (B, 1, T, T), True = may attend.
    """
    T = sample_BT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=sample_BT.device).tril()
    return ((sample_BT[:, :, None] == sample_BT[:, None, :]) & causal_TT)[:, None]


def run_lengths(sample_BT: Tensor) -> list[int]:
    """Lengths of the runs of equal numbers, row after row; none goes on into the next row.

    >>> run_lengths(torch.tensor([[0, 0, 1, -1], [-1, 0, 0, 0]]))
    [2, 1, 1, 1, 3]
    """
    return packing_of(sample_BT, torch.device("cpu")).starts_cpu.diff().tolist()


@ATTENTIONS.register("naive")
class Naive(Attention):
    """The formula, from a mask of all pairs of positions; in any precision, on any device."""

    def plan(self, sample_BT: Tensor, device: torch.device) -> Tensor:
        return packed_mask(sample_BT.to(device, non_blocking=True))

    def __call__(
        self, q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor, plan: Tensor | None
    ) -> Tensor:
        mask = packed_mask(q_BATE.new_zeros(1, q_BATE.shape[2])) if plan is None else plan
        scores_BATT = q_BATE @ k_BATE.transpose(2, 3) / math.sqrt(q_BATE.shape[3])
        return scores_BATT.masked_fill(~mask, -math.inf).softmax(3) @ v_BATE


LONG = 1024
"""Positions of a block from which taking samples one by one is faster on a CPU: 1.8 times there, 5 times at 4096."""


@ATTENTIONS.register("sdpa")
class Sdpa(Attention):
    """torch's scaled_dot_product_attention, from a mask of all pairs of positions; what a cache is read with, too.

    In long blocks on a CPU it takes the samples one by one: there the mask would not spare any of the work.
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
    """torch's FlexAttention, which leaves out blocks of positions without a common sample; trains on CUDA only."""

    @staticmethod
    def missing(device: torch.device) -> str:
        return (
            ""
            if device.type == "cuda"
            else "a CUDA device: FlexAttention has no gradients elsewhere"
        )

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

        # Inside of a layer that is compiled it is compiled with it; by itself it would be slow on CUDA.
        alone = device.type == "cuda" and not torch.compiler.is_compiling()
        attend = _compiled_flex_attention() if alone else flex_attention
        return attend(*_alike(q_BATE, k_BATE, v_BATE), block_mask=plan)  # type: ignore[operator]  # by overloads


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@ATTENTIONS.register("xformers")
class Xformers(Attention):
    """xformers' memory_efficient_attention, with all samples of the blocks as one row and a block-diagonal mask."""

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
    """Queries and keys in the precision of the values: under autocast norms of them give float32, products bf16."""
    return q_BATE.to(v_BATE.dtype), k_BATE.to(v_BATE.dtype), v_BATE


@cache
def _missing_of_xformers() -> str:
    """What keeps xformers' operators from training here, "" if nothing does: each wheel is built for some torch."""
    if importlib.util.find_spec("xformers") is None:
        return "the package xformers (pip install xformers)"
    try:
        from xformers.ops import fmha
    except (
        Exception
    ) as error:  # what an extension built for another torch raises is anybody's guess
        return f"an xformers that imports with torch {torch.__version__} ({type(error).__name__}: {error})"
    if all(
        any(operator.is_available() for operator in each)
        for each in (fmha.ALL_FW_OPS, fmha.ALL_BW_OPS)
    ):
        return ""
    installed = importlib.metadata.version("xformers")
    return f"an xformers whose operators load with torch {torch.__version__}: those of {installed} do not"


PREFERRED = ("xformers", "flex", "sdpa")
"""What `auto` takes: the first that can train on the device."""


class ChosenAttention(NamedTuple):
    """The backend that is used, and why `auto` did not take those it prefers; printed as a line for a log."""

    name: str
    attention: Attention
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({'; '.join(self.passed_over)})" if self.passed_over else self.name


def check_name(name: str) -> None:
    """Raises UserError for a name that is neither a backend nor `auto`."""
    if name != "auto" and name not in ATTENTIONS.names():
        raise UserError(
            f"attention is {name}, which is not known; {choices(name, ['auto', *ATTENTIONS.names()])}"
        )


@cache
def choose(name: str, device: torch.device) -> ChosenAttention:
    """The backend of that name, or with `auto` the preferred one for the device.

    Raises:
        UserError: for a backend that cannot be used on the device.
    """
    if name != "auto":
        missing = ATTENTIONS.get(name).missing(device)
        if missing:
            raise UserError(
                f"model.attention is {name}, which lacks {missing}; take attention=auto"
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
    """What a model attends by, and its plan for packed samples; None where there are none.

    Args:
        name: the backend that is asked for; where cached keys are attended to in its place, the one that runs
            everywhere is taken.
    """
    attention = choose("sdpa" if cached else name, ids_BT.device).attention
    return attention, None if sample_BT is None else attention.plan(sample_BT, ids_BT.device)
