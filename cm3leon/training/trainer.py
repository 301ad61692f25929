"""The training loop, the same for every stage that trains: image tokenizer, retriever, pretraining."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cm3leon.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Probability
from cm3leon.training.average import WeightAverage
from cm3leon.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from cm3leon.training.device import Precision, autocast
from cm3leon.training.schedule import linear_schedule
from cm3leon.types import UserError


@dataclass(kw_only=True)
class TrainingConfig:
    """Optimization of one module. Unstated in the paper: AdamW's betas, weight decay and clipping are OPT's."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Items of a step: blocks of tokens in pretraining, images or pairs elsewhere."""
    learning_rate: PositiveFloat = 6e-4
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up; after them the rate falls linearly to zero."""
    beta1: Probability = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: Probability = 0.95
    """AdamW's decay of the mean of squared gradients."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's decoupled weight decay, for matrices only."""
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient of all parameters together."""
    average_decay: Probability | None = None
    """Decay of the moving average of the weights, which is the result then; None = the last weights are."""
    precision: Precision = "auto"
    """Precision of matrix products: bf16, float32, or auto = bf16 where the processor computes in it."""
    log_every: PositiveInt = 20
    """Steps between two records of the figures."""
    checkpoint_every: PositiveInt = 200
    """Steps between two checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    callback_every: PositiveInt = 500
    """Steps between two calls of the callback (samples drawn during training)."""

    def check(self) -> None:
        if self.warmup_steps >= self.steps:
            raise UserError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        if self.checkpoint_every % self.log_every:  # so that a resumed run records the same means as an uninterrupted
            raise UserError(f"log_every {self.log_every} must divide checkpoint_every {self.checkpoint_every}")


class Batches(Protocol):
    """An endless stream of batches with a state, from which another stream goes on exactly."""

    def next(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Loss = Callable[[Any, Any], tuple[Tensor, Mapping[str, Tensor | float]]]
"""(module, batch) -> scalar loss and figures to record; a figure named `tokens` or `images` also gives a rate."""


def train(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    config: TrainingConfig,
    *,
    folder: Path,
    device: torch.device,
    seed: int,
    title: str,
    callback: Callable[[int, Any], None] | None = None,
    clipped: Sequence[nn.Module] = (),
) -> list[dict[str, float]]:
    """Trains `module` in place, from the newest checkpoint in `folder` if there is one.

    All randomness of a step is a function of (seed, step), so that a resumed run equals an uninterrupted one bit for
    bit. Figures go to `log.jsonl` and to TensorBoard, both in `folder`; `callback(step, writer)` is called now and
    then. The gradients of each of the modules in `clipped` are clipped by their own norm (networks with losses of their
    own), those of the whole module if there is none. Returns the records of the whole run.

    Raises:
        FloatingPointError: for a loss or a gradient that is not finite; the last checkpoint is left as it is.
    """
    from torch.utils.tensorboard import SummaryWriter

    module.to(device).train()
    optimizer = _optimizer(module, config)
    average = WeightAverage(module, config.average_decay) if config.average_decay else None
    step, log = _resume(folder, module, optimizer, average, batches, device)
    with (
        closing(SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)) as writer,
        tqdm(
            total=config.steps, initial=step, desc=title, unit="step", mininterval=2.0, dynamic_ncols=True
        ) as progress,
    ):
        meter = _Meter()
        while step < config.steps:
            torch.manual_seed(seed * 1_000_003 + step)
            rate = linear_schedule(
                step, peak=config.learning_rate, warmup_steps=config.warmup_steps, steps=config.steps
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            with autocast(device, config.precision):
                value, figures = loss(module, batches.next())
            value.backward()
            norms = [nn.utils.clip_grad_norm_(part.parameters(), config.clip) for part in clipped or (module,)]
            norm = torch.stack(norms).norm()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if average:
                average.update(step)
            progress.update()

            meter.add({"loss": value.detach(), "gradient_norm": norm, **figures})
            if step % config.log_every == 0 or step == config.steps:
                record = {"step": step, "learning_rate": rate, **meter.read()}
                for name in VITAL:
                    if not math.isfinite(record[name]):
                        raise FloatingPointError(f"{title}: the {name} is {record[name]} at step {step}")
                log.append(record)
                _record(record, folder, writer)
                progress.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
            if step % config.checkpoint_every == 0 or step == config.steps:
                state = {"data": batches.state_dict()}
                save_checkpoint(
                    folder,
                    step=step,
                    module=module,
                    optimizer=optimizer,
                    average=average,
                    state=state,
                    keep=config.keep_checkpoints,
                )
            if callback and step % config.callback_every == 0:
                callback(step, writer)
                module.train()
    if average:
        average.install()
    module.eval()
    return log


def _optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors (biases, norms) do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def _resume(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    batches: Batches,
    device: torch.device,
) -> tuple[int, list[dict[str, float]]]:
    """Restores the newest checkpoint and cuts the log to it. Returns (step, log)."""
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / "log.jsonl"
    saved = checkpoints(folder)
    if not saved:
        log_file.write_text("")
        return 0, []
    state = load_checkpoint(saved[-1], module=module, optimizer=optimizer, average=average, device=device)
    batches.load_state_dict(state["data"])
    records = (_parsed(line) for line in log_file.read_text().splitlines())
    log = [record for record in records if record and record["step"] <= state["step"]]
    log_file.write_text("".join(json.dumps(record) + "\n" for record in log))
    return state["step"], log


def _parsed(line: str) -> dict[str, float] | None:
    """A record of the log; None for a last line that a kill cut short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _record(record: dict[str, float], folder: Path, writer: Any) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    for name, value in record.items():
        if name != "step":
            writer.add_scalar(name, value, record["step"])


VITAL = ("loss", "gradient_norm")
"""Figures that must be finite: where one is not, the weights are lost, and no checkpoint may follow."""


class _Meter:
    """Means of figures between two records, counts (`tokens`, `images`) as a rate per second."""

    counts = ("tokens", "images")

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._values: dict[str, list[Tensor | float]] = {}
        self._start = time.perf_counter()

    def add(self, figures: Mapping[str, Tensor | float]) -> None:
        for name, value in figures.items():
            self._values.setdefault(name, []).append(value)

    def read(self) -> dict[str, float]:
        """The means since the last reading. A figure (but a vital one) is NaN in a step with nothing to average."""
        seconds = time.perf_counter() - self._start
        result = {}
        for name, values in self._values.items():
            numbers = [float(value) for value in values]
            if name in self.counts:
                result[f"{name}_per_second"] = sum(numbers) / seconds
            else:
                known = [number for number in numbers if name in VITAL or not math.isnan(number)]
                if known:
                    result[name] = sum(known) / len(known)
        self._reset()
        return result
