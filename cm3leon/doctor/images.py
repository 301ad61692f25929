"""Time the drawing of images by models with random weights.

Each step reads all weights once, however many images it draws, so that the memory's bandwidth sets
a floor for a single image. For the 7B in bf16 on a GPU that reads 3.3 TB a second it is 14 GB / 3.3
TB/s = 4 ms a step, and 4 s for 1,024 codes.
"""

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
    """Which images are drawn, by which model, and how."""

    name: str
    settings: Any
    """Of the model, by its registered name or as a section."""
    vocab: Vocab
    codes: int
    """Codes of an image."""
    batches: tuple[int, ...]
    """Numbers of images that are drawn at once."""
    execution: Execution


FULL = Size("7B", "cm3leon_7b", PAPER, 1024, (1, 64, 256, 16, 4), "compiled graph")
"""The batches that have goals come first, as the time limit may cut the others off."""
SMALL = Size(
    "small",
    {"name": "cm3leon", "layers": 2, "width": 128, "head_size": 32, "seq_len": 256},
    Vocab(320, 128, 64),
    16,
    (1, 4),
    "eager",
)


def new_decoder(settings: Any, vocab: Vocab, weights: Weights, device: torch.device) -> Model:
    """A model with random weights; those of the head are large enough that codes differ."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Model = MODELS.build(MODELS.check(settings), vocab_size=vocab.size)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    keep_weights(model, weights)
    return model.eval()


def read_bytes(model: Model, vocab: Vocab) -> int:
    """Bytes of the weights that a step reads: all layers, and the rows of the head for codes."""
    layers = 0
    for parameter in model.blocks.parameters():
        kept: Any = getattr(parameter, "qdata", parameter)  # of int8 and fp8 weights
        layers += kept.nbytes
    return layers + model.head.weight[: vocab.image_size].nbytes


def requests_of(batch: int, codes: int, vocab: Vocab) -> list[Request]:
    """Requests with random prompts, each for an image drawn with guidance."""
    rng = np.random.default_rng(0)
    image = DECODERS.build({"name": "top_p", "cfg": 3.0, "top_p": 0.9})
    new = partial(grammar.image, vocab, codes)
    unconditional_T = np.array([vocab.eos, vocab.sentinel(0), vocab.brk])
    requests = []
    for number in range(batch):
        text = rng.integers(4, vocab.text_size, PROMPT - 2)
        streams = (np.array([vocab.eos, *text, vocab.brk]), unconditional_T)
        requests.append(Request(streams, new, codes, [{"image": image}], [number]))
    return requests


def answer_seconds(answerer: Answerer, requests: list[Request]) -> float:
    """Seconds to answer all requests, under bf16 autocast."""
    device = answerer.model.embedding.weight.device

    def answer() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            answerer.answers(requests)

    return seconds(answer, device)


def has_room(model: Model, requests: list[Request]) -> bool:
    """Whether all requests can be drawn at a time."""
    return shape_for(model, requests).groups >= len(requests)


def measure(device: torch.device, full: bool, *, weights: Weights) -> Iterator[Figure]:
    """Batches of images; in bf16 also a single image with wider windows."""
    size = FULL if full else SMALL
    part = f"images, {weights}"
    try:
        model = new_decoder(size.settings, size.vocab, weights, device)
        floor = read_bytes(model, size.vocab) / read_rate(device)
    except Exception as error:  # no room, no torchao, or a device that does not have it
        yield Figure(part, _name(size, 1, weights), None, "s", reason(error))
        return

    for batch in size.batches:
        requests = requests_of(batch, size.codes, size.vocab)
        answerer = Answerer(model, size.vocab, window=1, execution=size.execution)
        found, taken = _timed(part, size, batch, weights, answerer, requests, floor)
        yield from found

        # A single image has the most to gain from drafts, as its steps wait for the weights.
        if batch == 1 and weights == "bf16" and taken:
            yield from _windows(part, size, model, requests, taken)


def _timed(
    part: str, size: Size, batch: int, weights: Weights, answerer: Answerer,
    requests: list[Request], floor: float,
) -> tuple[list[Figure], float]:  # fmt: skip
    """The figures of a batch, and its seconds; 0 if it cannot run.

    It is timed once, after a run that is not counted.
    """
    name = _name(size, batch, weights)
    unit = "s" if batch == 1 else "images/s"
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
    """How many times faster a single image is if steps also compute drafts.

    Args:
        plain: seconds without drafts.
    """
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
    """The name of a figure; those with goals have theirs in figures.py."""
    if size is FULL and batch == 1:
        return ONE_IMAGE[weights]
    if size is FULL and batch == 64:
        return MANY_IMAGES[weights]
    what = "one image" if batch == 1 else f"{batch} images at once"
    return f"{what}, {size.name}, {weights}"
