"""Time training steps of models with random weights, as a share of the device's peak (MFU).

A model's FLOPs are those of its matrix products and its attention, forward and backward; those of
recomputed activations do not count. A step of 32,768 tokens of a 7B takes about
6 x 7e9 x 32,768 = 1.4e15 FLOPs; in 3 s, on a GPU whose peak is 989e12 FLOP/s, that is an MFU of
1.4e15 / 3 / 989e12 = 0.47.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cm3leon.doctor.figures import FLOAT8_GAIN, Figure, reason
from cm3leon.doctor.hardware import median_seconds, product_rate
from cm3leon.models.base import Model
from cm3leon.models.recompute import compile_blocks, recompute
from cm3leon.objectives.loss import linear_cross_entropy
from cm3leon.registry import MODELS
from cm3leon.training.config import DecoderTrainingConfig
from cm3leon.training.costs import model_flops, peak_flops
from cm3leon.training.device import autocast
from cm3leon.training.float8 import check_device, to_float8
from cm3leon.training.optimizer import new_optimizer

PART = "training"
VOCABULARY, LENGTH = 65_536, 4096
"""Those of the paper."""
SMALL = {"name": "cm3leon", "layers": 2, "width": 128, "head_size": 32, "seq_len": 128}

Loss = Callable[[Tensor, Tensor], Tensor]
"""(ids (B, T), number of the document at each position) -> mean loss."""


def new_model(settings: Any, vocab_size: int, device: torch.device) -> Model:
    """A model with random numbers in the head too: a zero head would make all gradients zero."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS.build(settings, vocab_size=vocab_size)
    nn.init.normal_(model.head.weight, std=0.02)
    return model


def packed_loss(model: Model) -> Loss:
    """The mean loss over all tokens that have a next token in their document."""

    def loss(ids_BT: Tensor, sample_BT: Tensor) -> Tensor:
        target_BT = ids_BT.roll(-1, 1)
        weight_BT = ((sample_BT == sample_BT.roll(-1, 1)) & (sample_BT >= 0)).float()
        weight_BT[:, -1] = 0
        flat = (target_BT.flatten(), weight_BT.flatten())

        # A block with one document needs no mask between documents, and has the faster attention.
        packing: dict[str, Tensor] = {}
        if not bool((sample_BT == 0).all()):
            packing = {"position_BT": positions(sample_BT), "sample_BT": sample_BT}
        return model(
            ids_BT,
            **packing,
            readout=lambda hidden_BTD, head: linear_cross_entropy(
                hidden_BTD.flatten(0, 1), head.weight, *flat
            )[0],
        )

    return loss


def positions(sample_BT: Tensor) -> Tensor:
    """Positions that restart at 0 in every document: samples 0 0 0 1 1 have 0 1 2 0 1."""
    at_T = torch.arange(sample_BT.shape[1], device=sample_BT.device)
    begins_BT = torch.ones_like(sample_BT, dtype=torch.bool)
    begins_BT[:, 1:] = sample_BT[:, 1:] != sample_BT[:, :-1]
    return at_T - torch.where(begins_BT, at_T, 0).cummax(1).values


def stepper(
    module: nn.Module,
    loss: Loss,
    vocab_size: int,
    config: DecoderTrainingConfig,
    device: torch.device,
) -> Callable[[Tensor], None]:
    """A function that makes one training step on random ids: both passes, clipping, the optimizer.

    It takes the number of the document at each position.
    """
    optimizer = new_optimizer(module, config)

    def step(sample_BT: Tensor) -> None:
        ids_BT = torch.randint(8, vocab_size, sample_BT.shape, device=device)
        with autocast(device, config.precision):
            value = loss(ids_BT, sample_BT.to(device))
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


class Step(NamedTuple):
    """What a training step takes."""

    tokens: int
    seconds: float
    flops: float
    """Model FLOPs a second."""
    peak_bytes: int
    """The most bytes held on the GPU; 0 on a CPU."""


def timed_step(
    model: Model, config: DecoderTrainingConfig, *, rows: int, length: int, repeats: int
) -> Step:
    """Time a step on blocks of three packed documents each, on the model's device.

    Args:
        rows: blocks of a step.
        repeats: steps, of which the median counts.
    """
    # Prepared in the order of the trainer: float8, recomputing, compiling.
    device = model.head.weight.device
    if config.precision == "float8":
        check_device(device)
        to_float8(model)
    recompute(model, config.activation_checkpointing)
    if config.compile:
        compile_blocks(model)

    step = stepper(model, packed_loss(model), model.vocab_size, config, device)
    sample_BT = (torch.arange(length) // (length // 3 + 1)).expand(rows, -1).contiguous()
    step(sample_BT)
    taken = median_seconds(partial(step, sample_BT), device, repeats)
    held = 0
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated()
    flops = model_flops(model, sample_BT)
    return Step(sample_BT.numel(), taken, flops / taken, held)


def measure(device: torch.device, full: bool) -> Iterator[Figure]:
    """Whole models of the paper's smaller sizes in bf16; at small size, a small one."""
    sizes: tuple[tuple[str, Any, int], ...] = (("a small decoder", SMALL, 2),)
    if full:
        sizes = (("350M", "cm3leon_350m", 8), ("760M", "cm3leon_760m", 8))
    for name, settings, rows in sizes:
        yield from _share(PART, f"MFU, {name}", settings, device, full, rows=rows)[0]


def measure_layers(device: torch.device, full: bool) -> Iterator[Figure]:
    """Some layers of the 7B with its vocabulary, in bf16 and float8.

    The whole 7B with its moments does not fit on a single GPU of 80 GB.
    """
    part, settings, rows, what = "layers", SMALL, 2, "a small decoder"
    if full:
        settings, rows, what = {"name": "cm3leon_7b", "layers": 8}, 4, "layers of the 7B"

    found = {}
    for precision in ("bf16", "float8"):
        name = f"MFU, {what}, {precision}"
        figures, rate = _share(part, name, settings, device, full, rows=rows, precision=precision)
        yield from figures
        found[precision] = rate
    if all(found.values()):
        yield Figure(part, FLOAT8_GAIN, found["float8"] / found["bf16"], "x", "tokens a second")


def _share(
    part: str, name: str, settings: Any, device: torch.device, full: bool, *, rows: int,
    precision: Any = "bf16",
) -> tuple[list[Figure], float]:  # fmt: skip
    """The figures of a training step, and its tokens a second; 0 if it cannot run.

    On a device whose peak no datasheet gives, the share is of the measured rate of a matrix
    product.
    """
    vocab_size, length, side, repeats, how = 512, 128, 512, 3, "eager"
    if full:
        vocab_size, length, side, repeats = VOCABULARY, LENGTH, 8192, 8
        how = "compiled, selective"
    config = DecoderTrainingConfig(
        precision=precision,
        learning_rate=1e-4,
        compile=full,
        activation_checkpointing="selective" if full else "none",
    )

    # The peak of memory is that of this model alone.
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        model = new_model(settings, vocab_size, device)
        step = timed_step(model, config, rows=rows, length=length, repeats=repeats)
        peak = peak_flops(device, 1) or product_rate(device, side, torch.bfloat16)
    except Exception as error:  # out of memory, or an error of the compiler
        return [Figure(part, name, None, "of the peak", reason(error))], 0.0

    of = "datasheet" if peak_flops(device, 1) else "measured matrix product"
    how = f"{rows} blocks of {length:,} tokens, {how}"
    if step.peak_bytes:
        how += f"; {step.peak_bytes / 1e9:.1f} GB"
    rate = step.tokens / step.seconds
    tokens = Figure(part, f"{name.removeprefix('MFU, ')}: training", rate, "tokens/s", how)
    return [Figure(part, name, step.flops / peak, "of the peak", of), tokens], rate
