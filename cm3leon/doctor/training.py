"""Training steps of decoders with random weights, and the share of a device's peak that their model FLOPs are."""

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
"""The paper's."""
SMALL = {"name": "cm3leon", "layers": 2, "width": 128, "head_size": 32, "seq_len": 128}

Loss = Callable[[Tensor, Tensor], Tensor]
"""(ids (B, T), number of the document at each position) -> mean loss."""


def new_model(settings: Any, vocab_size: int, device: torch.device) -> Model:
    """A decoder with random numbers in the head too: a zero head would make all gradients zero."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS.build(settings, vocab_size=vocab_size)
    nn.init.normal_(model.head.weight, std=0.02)
    return model


def packed_loss(model: Model) -> Loss:
    """The mean loss of every next token of its document."""

    def loss(ids_BT: Tensor, sample_BT: Tensor) -> Tensor:
        target_BT = ids_BT.roll(-1, 1)
        weight_BT = ((sample_BT == sample_BT.roll(-1, 1)) & (sample_BT >= 0)).float()
        weight_BT[:, -1] = 0
        alone = bool((sample_BT == 0).all())
        flat = (target_BT.flatten(), weight_BT.flatten())
        return model(
            ids_BT,
            position_BT=None if alone else positions(sample_BT),
            sample_BT=None if alone else sample_BT,
            readout=lambda hidden_BTD, head: linear_cross_entropy(
                hidden_BTD.flatten(0, 1), head.weight, *flat
            )[0],
        )

    return loss


def positions(sample_BT: Tensor) -> Tensor:
    """Position numbers that begin anew in every document."""
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
    """One step on random ids with the given document numbers: both passes, clipping and the optimizer."""
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
    """The most that is held on the GPU; 0 on a CPU."""


def timed_step(
    model: Model, config: DecoderTrainingConfig, *, rows: int, length: int, repeats: int
) -> Step:
    """A step on rows of three packed documents each, on the device of the model; the median of some."""
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
    held = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    flops = model_flops(model, sample_BT)
    return Step(sample_BT.numel(), taken, flops / taken, held)


def measure(device: torch.device, full: bool) -> Iterator[Figure]:
    """Whole trainings of the paper's smaller sizes in bf16; a small one on a CPU."""
    sizes: tuple[tuple[str, Any, int], ...] = (("a small decoder", SMALL, 2),)
    if full:
        sizes = (("350M", "cm3leon_350m", 8), ("760M", "cm3leon_760m", 8))
    for name, settings, rows in sizes:
        yield from _share(PART, f"MFU, {name}", settings, device, full, rows=rows)[0]


def measure_layers(device: torch.device, full: bool) -> Iterator[Figure]:
    """Some layers of the 7B with its vocabulary, as all of it with its moments fits on no single GPU of 80 GB."""
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
    """Figures of a training step, and its tokens a second; 0 where it does not run.

    On a device without a peak in the datasheets the share is of the rate of a matrix product that is measured.
    """
    vocab_size, length = (VOCABULARY, LENGTH) if full else (512, 128)
    config = DecoderTrainingConfig(
        precision=precision,
        learning_rate=1e-4,
        compile=full,
        activation_checkpointing="selective" if full else "none",
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        model = new_model(settings, vocab_size, device)
        step = timed_step(model, config, rows=rows, length=length, repeats=8 if full else 3)
        side = 8192 if full else 512
        peak = peak_flops(device, 1) or product_rate(device, side, torch.bfloat16)
    except Exception as error:  # out of memory, or what a compiler has to say
        return [Figure(part, name, None, "of the peak", reason(error))], 0.0
    of = "datasheet" if peak_flops(device, 1) else "measured matrix product"
    how = f"{rows} blocks of {length:,} tokens, {'compiled, selective' if full else 'eager'}"
    memory = f"; {step.peak_bytes / 1e9:.1f} GB" if step.peak_bytes else ""
    rate = step.tokens / step.seconds
    tokens = Figure(part, f"{name.removeprefix('MFU, ')}: training", rate, "tokens/s", how + memory)
    return [Figure(part, name, step.flops / peak, "of the peak", of), tokens], rate
