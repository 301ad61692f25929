"""Images drawn by decoders with random weights: seconds a batch, beside the floor that reading the weights sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from cm3leon.decoders import grammar
from cm3leon.decoders.generate import Answerer
from cm3leon.decoders.request import Request, shape_for
from cm3leon.doctor.figures import MANY_IMAGES, ONE_IMAGE, Figure, reason
from cm3leon.doctor.hardware import read_rate, seconds
from cm3leon.models.base import Model
from cm3leon.models.serving import keep_weights
from cm3leon.registry import DECODERS, MODELS
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Execution, Weights

PROMPT = 32
"""Tokens of a prompt."""
PAPER = Vocab(56_320, 8192)


@dataclass(frozen=True)
class Size:
    """Which images are drawn by what, and how."""

    name: str
    settings: Any
    vocab: Vocab
    codes: int
    batches: tuple[int, ...]
    execution: Execution


FULL = Size("7B", "cm3leon_7b", PAPER, 1024, (1, 64, 256, 16, 4), "compiled graph")
"""The batches that have goals come first: a limit of time takes the others."""
SMALL = Size(
    "small",
    {"name": "cm3leon", "layers": 2, "width": 128, "head_size": 32, "seq_len": 256},
    Vocab(320, 128, 64),
    16,
    (1, 4),
    "eager",
)


def new_decoder(settings: Any, vocab: Vocab, weights: Weights, device: torch.device) -> Model:
    """Random weights, large enough to choose by."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Model = MODELS.build(MODELS.check(settings), vocab_size=vocab.size)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    keep_weights(model, weights)
    return model.eval()


def read_bytes(model: Model, vocab: Vocab) -> int:
    """Bytes of the weights that a step reads: all layers, and the codes' rows of the head."""
    layers = 0
    for parameter in model.blocks.parameters():
        kept: Any = getattr(parameter, "qdata", parameter)
        layers += kept.nbytes
    return layers + model.head.weight[: vocab.image_size].nbytes


def requests_of(batch: int, codes: int, vocab: Vocab) -> list[Request]:
    """As many random prompts, each for an image under guidance."""
    rng = np.random.default_rng(0)
    image = DECODERS.build({"name": "top_p", "cfg": 3.0, "top_p": 0.9})
    new = partial(grammar.image, vocab, codes)
    other_T = np.array([vocab.eos, vocab.sentinel(0), vocab.brk])
    streams = [
        (np.array([vocab.eos, *rng.integers(4, vocab.text_size, PROMPT - 2), vocab.brk]), other_T)
        for _ in range(batch)
    ]
    return [
        Request(each, new, codes, [{"image": image}], [number])
        for number, each in enumerate(streams)
    ]


def answer_seconds(answerer: Answerer, requests: list[Request]) -> float:
    """Seconds for all of them, under bf16 autocast."""
    device = answerer.model.embedding.weight.device

    def answer() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            answerer.answers(requests)

    return seconds(answer, device)


def has_room(model: Model, requests: list[Request]) -> bool:
    """Whether all of them are in the making at a time."""
    return shape_for(model, requests).groups >= len(requests)


def measure(device: torch.device, full: bool, *, weights: Weights) -> Iterator[Figure]:
    """Batches of images; in bf16 also one image with other windows."""
    size = FULL if full else SMALL
    part = f"images, {weights}"
    try:
        model = new_decoder(size.settings, size.vocab, weights, device)
        floor = read_bytes(model, size.vocab) / read_rate(device)
    except Exception as error:  # no room, no torchao, or a device that does not have it
        yield Figure(part, _name(size, 1, weights), None, "s", reason(error))
        return
    single = 0.0
    for batch in size.batches:
        requests = requests_of(batch, size.codes, size.vocab)
        answerer = Answerer(model, size.vocab, window=1, execution=size.execution)
        found, taken = _timed(part, size, batch, weights, answerer, requests, floor)
        single = taken if batch == 1 else single
        yield from found
        if batch == 1 and weights == "bf16" and taken:
            yield from _windows(part, size, model, requests, single)


def _timed(
    part: str, size: Size, batch: int, weights: Weights, answerer: Answerer,
    requests: list[Request], floor: float,
) -> tuple[list[Figure], float]:  # fmt: skip
    """Figures of a batch, timed once after one that is not counted, and its seconds; 0 where it does not run."""
    name, unit = _name(size, batch, weights), "s" if batch == 1 else "images/s"
    try:
        if not has_room(answerer.model, requests):
            return [Figure(part, name, None, unit, "no room in memory for all at a time")], 0.0
        answer_seconds(answerer, requests)
        taken = answer_seconds(answerer, requests)
    except Exception as error:
        return [Figure(part, name, None, unit, reason(error))], 0.0
    step = taken / size.codes
    note = f"{1e3 * step:.3g} ms a step, of which reading the weights takes {floor / step:.0%}"
    value = taken if batch == 1 else batch / taken
    return [Figure(part, name, value, unit, f"{size.codes:,} codes, guidance; {note}")], taken


def _windows(
    part: str, size: Size, model: Model, requests: list[Request], plain: float
) -> Iterator[Figure]:
    """How much faster a single image is where a step computes drafts behind the next code."""
    for window in (2, 4):
        name = f"one image with a window of {window}, {size.name}"
        try:
            answerer = Answerer(model, size.vocab, window=window, execution=size.execution)
            answer_seconds(answerer, requests)
            factor = plain / answer_seconds(answerer, requests)
        except Exception as error:
            yield Figure(part, name, None, "x", reason(error))
            continue
        yield Figure(
            part, name, factor, "x", "random weights: a trained model accepts more or fewer drafts"
        )


def _name(size: Size, batch: int, weights: Weights) -> str:
    if size is FULL and batch in (1, 64):
        return (ONE_IMAGE if batch == 1 else MANY_IMAGES)[weights]
    what = "one image" if batch == 1 else f"{batch} images at once"
    return f"{what}, {size.name}, {weights}"
