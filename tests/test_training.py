"""The training loop: schedules, checkpoints that a kill cannot halve, and exact resuming.

Losses that are no numbers are skipped and written down; too many of them end the training.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cm3leon.config import from_mapping
from cm3leon.training import checkpoint
from cm3leon.training.average import WeightAverage
from cm3leon.training.checkpoint import (
    Checkpoints,
    load_weights_at,
    read_state,
    read_tensors,
    training_tensors,
)
from cm3leon.training.config import TrainingConfig
from cm3leon.training.device import autocast, best_device, uses_bf16
from cm3leon.training.distributed import Ranks
from cm3leon.training.meter import Meter
from cm3leon.training.optimizer import new_optimizer
from cm3leon.training.prefetch import WHOLE, BatchSplit
from cm3leon.training.schedule import learning_rate
from cm3leon.training.signals import Signals
from cm3leon.training.steps import checkpoints
from cm3leon.training.trainer import _sound, train
from cm3leon.types import Again, UserError
from cm3leon.weights import load_weights, save_weights

pytestmark = pytest.mark.stack

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------- schedule


def rates(**fields: Any) -> list[float]:
    """The learning rate of every step of a training."""
    schedule = TrainingConfig(**fields)
    return [learning_rate(step, schedule) for step in range(schedule.steps)]


def test_schedules_by_hand() -> None:
    fields: dict[str, Any] = {"learning_rate": 2.0, "warmup_steps": 4, "steps": 10}

    # Up to the peak in four steps; then six steps down to nothing, or to half of the peak.
    warmup = [0.5, 1.0, 1.5, 2.0]
    assert rates(**fields) == pytest.approx([*warmup, 2.0, 5 / 3, 4 / 3, 1.0, 2 / 3, 1 / 3])
    assert rates(**fields, final_rate=0.5) == pytest.approx(
        [*warmup, 2, 2 - 1 / 6, 2 - 2 / 6, 1.5, 2 - 4 / 6, 2 - 5 / 6]
    )

    # Half a cosine, and a rate that stays until the last fifth.
    halves = [1 + math.cos(math.pi * k / 6) for k in range(6)]
    assert rates(**fields, schedule="cosine") == pytest.approx([*warmup, *halves])
    wsd = [*warmup, 2.0, 2.0, 2.0, 2.0, 1.0 + 1.0, 1.0]
    assert rates(**fields, schedule="wsd", decay_share=0.2) == pytest.approx(wsd)
    assert rates(**fields, schedule="wsd", decay_share=1.0) == rates(**fields)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("final_rate", [0.0, 0.1])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (1, 2), (5, 6), (100, 1000)])
def test_schedules_rise_to_the_peak_once_and_never_are_zero(
    warmup: int, steps: int, schedule: Any, final_rate: float
) -> None:
    found = rates(
        learning_rate=3e-4,
        warmup_steps=warmup,
        steps=steps,
        schedule=schedule,
        final_rate=final_rate,
    )

    assert max(found) == pytest.approx(3e-4)
    assert min(found) > 0

    top = found.index(max(found))
    assert found == sorted(found[: top + 1]) + sorted(found[top + 1 :], reverse=True)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"steps": 10, "warmup_steps": 10}, "training: warmup_steps 10 must be below steps 10"),
        (
            {"log_every": 3, "checkpoint_every": 10},
            "training: log_every 3 must divide checkpoint_every 10",
        ),
        (
            {"weight_decay": 1e30},
            "training: learning_rate 0.0006 times weight_decay 1e+30 must be below 1",
        ),
        (
            {"learning_rate": math.inf},
            "training.learning_rate is Infinity; it must be a number, above 0, and finite",
        ),
        ({"keep_every": 300}, "training: checkpoint_every 200 must divide keep_every 300"),
        (
            {"keep_checkpoints": 0},
            "training.keep_checkpoints is 0; it must be a whole number, at least 1",
        ),
        (
            {"precision": "fp16"},
            'training.precision is "fp16"; it must be one of auto, bf16, float32, float8',
        ),
    ],
)
def test_unfit_configs_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        from_mapping(TrainingConfig, fields, "training")
    assert str(refusal.value) == sentence


# ----------------------------------------------------------------------------------- a tiny problem


class Tiny(nn.Module):
    """A network with all that a resume has to bring back.

    It has matrices, vectors, a buffer that counts examples, and random draws in each step.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x_BD: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x_BD)
        hidden_BD = torch.dropout(self.first(x_BD).tanh(), 0.2, self.training)
        return self.second(hidden_BD)[:, 0]


def loss(
    module: nn.Module, batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """The mean squared error, and two figures for the log."""
    x_BD, y_B = batch
    error_B = module(x_BD) - y_B
    figures = {"error": error_B.detach().abs().mean(), "tokens": float(len(x_BD))}
    return error_B.square().mean(), figures


class Numbers:
    """Batches out of a generator, whose whole state is saved.

    Batch `fails_at`, counted from 0, raises `Interrupted`; the targets of batch `bad_at` are
    multiplied by `bad`.
    """

    def __init__(
        self, fails_at: int | None = None, bad_at: int | None = None, bad: float = math.nan
    ) -> None:
        self.rng = np.random.default_rng(0)
        self.count = 0
        self.fails_at, self.bad_at, self.bad = fails_at, bad_at, bad
        self.numbers: dict[float, int] = {}

    def number(self, batch: tuple[Tensor, Tensor]) -> int:
        """Which batch it is, from 1; more of them may have been made ahead."""
        return self.numbers[float(batch[0][0, 0])]

    def next(self) -> tuple[Tensor, Tensor]:
        if self.count == self.fails_at:
            raise Interrupted
        x_BD = torch.from_numpy(self.rng.standard_normal((6, 4))).float()
        y_B = x_BD[:, 0] - x_BD[:, 1]
        if self.count == self.bad_at:
            y_B = y_B * self.bad
        self.count += 1
        self.numbers[float(x_BD[0, 0])] = self.count
        return x_BD, y_B

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]
        self.count = state["count"]


class Interrupted(Exception):
    """Stands for a kill."""


def config(**fields: Any) -> TrainingConfig:
    defaults = {
        "steps": 20,
        "warmup_steps": 3,
        "learning_rate": 0.05,
        "log_every": 2,
        "checkpoint_every": 4,
        "callback_every": 5,
        "precision": "float32",
    }
    return TrainingConfig(**{**defaults, **fields})


def run(
    folder: Path,
    *,
    batches: Numbers | None = None,
    callback: Callable[[int, Any], None] | None = None,
    module: nn.Module | None = None,
    loss: Any = loss,
    clipped: Sequence[nn.Module] = (),
    split: BatchSplit = WHOLE,
    resume_from: Path | None = None,
    **fields: Any,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train the tiny problem, or another one, and return the network and its log."""
    module = module or Tiny()
    log = train(
        module,
        loss,
        batches or Numbers(),
        config(**fields),
        folder=folder,
        device=CPU,
        seed=7,
        title="tiny",
        callback=callback,
        clipped=clipped,
        split=split,
        resume_from=resume_from,
    )
    return module, log


def draws(step: int, writer: Any) -> None:
    """A callback that uses up random numbers."""
    torch.rand(step)


def without_rates(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """A log without its speeds, which differ from run to run."""
    found = []
    for record in log:
        kept = {name: x for name, x in record.items() if not name.endswith("_per_second")}
        found.append(kept)
    return found


def without_seconds(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, without the time that its record has taken so far."""
    state = json.loads((path / "state.json").read_text())
    return {**state, "meter": [each["sums"] for each in state["meter"]]}


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same parameters, bit for bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(weight, twin) for weight, twin in pairs)


def tensors_of(path: Path, average_decay: float | None = None) -> dict[str, Tensor]:
    """What a checkpoint of the tiny problem holds, by its full name."""
    module = Tiny()
    average = WeightAverage(module, average_decay) if average_decay else None
    tensors = training_tensors(module, new_optimizer(module, config()), average)
    read_tensors(path, tensors, Ranks(CPU))

    flat: dict[str, Tensor] = {}

    def flatten(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            flat[name] = value.detach().clone()
        else:
            for key, inner in value.items():
                flatten(f"{name}.{key}", inner)

    flatten("", tensors)
    return flat


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    """The names of a folder's checkpoints, the oldest first."""
    return [path.name for path in checkpoints(folder)]


# ----------------------------------------------------------------------------------------- the loop


def test_it_learns_and_records(tmp_path: Path) -> None:
    module, log = run(tmp_path, steps=200)
    assert [record["step"] for record in log] == list(range(2, 201, 2))
    assert log[-1]["loss"] < 0.3 * log[0]["loss"]
    assert log == read_log(tmp_path)
    figures = {"step", "learning_rate", "loss", "gradient_norm", "error", "tokens_per_second"}
    assert set(log[0]) == figures
    assert log[1]["learning_rate"] == learning_rate(3, config(steps=200))

    assert module.seen.item() == 200 * 6
    assert not module.training

    assert names(tmp_path) == ["step_00000196", "step_00000200"]
    assert any((tmp_path / "tensorboard").iterdir())


def test_one_step_is_adamw_by_hand(tmp_path: Path) -> None:
    """By hand: the clipped gradient, Adam's first step, and the decay of matrices alone.

    The first step of Adam is the sign of the gradient.
    """
    batches = Numbers()
    x_BD, y_B = batches.next()
    by_hand = Tiny().train()
    torch.manual_seed(7 * 1_000_003)
    (by_hand(x_BD) - y_B).square().mean().backward()

    module, log = run(
        tmp_path, steps=1, warmup_steps=0, weight_decay=0.5, clip=0.01, checkpoint_every=2
    )
    norm = torch.stack([weight.grad.norm() for weight in by_hand.parameters()]).norm()
    assert log[0]["gradient_norm"] == pytest.approx(norm.item())
    for (name, before), after in zip(by_hand.named_parameters(), module.parameters(), strict=True):
        decay = 0.5 if before.ndim == 2 else 0
        clipped = before.grad * 0.01 / (norm + 1e-6)
        step = 0.05 * clipped / (clipped.abs() + 1e-8)
        expected = before * (1 - 0.05 * decay) - step
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.once
@pytest.mark.parametrize("average_decay", [None, 0.8])
@pytest.mark.parametrize("stop", ["batches", "callback", "save"])
@pytest.mark.parametrize("steps", [[1], [4], [5], [15], [4, 5, 9], [19], [2, 2, 10, 10]])
def test_a_resumed_run_is_the_uninterrupted_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: str,
    steps: list[int],
    average_decay: float | None,
) -> None:
    """Bit for bit: weights, buffers, their average, the optimizer, the data, and the log."""
    fields = {"average_decay": average_decay}
    whole, log = run(tmp_path / "whole", callback=draws, **fields)
    folder, save = tmp_path / "stopped", Checkpoints.save

    # Each start is stopped at its step: by its data, by the callback, or before a checkpoint is
    # written.
    for stop_at in steps:

        def stops(step: int, writer: Any = None, stop_at: int = stop_at) -> None:
            torch.rand(3)  # a callback may draw
            if step >= stop_at:
                raise Interrupted

        def save_stops(
            self: Any, tensors: Any, state: Any, stops: Any = stops, **rest: Any
        ) -> None:
            stops(state["step"])
            save(self, tensors, state, **rest)

        with monkeypatch.context() as patch:
            if stop == "save":
                patch.setattr(Checkpoints, "save", save_stops)
            batches = Numbers(fails_at=stop_at if stop == "batches" else None)
            callback = stops if stop == "callback" else None
            with pytest.raises(Interrupted):
                run(folder, batches=batches, callback=callback, callback_every=1, **fields)

    again, log_again = run(folder, callback=draws, **fields)
    pairs = zip(whole.state_dict().items(), again.state_dict().values(), strict=True)
    for (name, weight), other in pairs:
        assert torch.equal(weight, other), name
    assert without_rates(log_again) == without_rates(log) == without_rates(read_log(folder))

    assert names(folder) == names(tmp_path / "whole")
    for path, other_path in zip(checkpoints(folder), checkpoints(tmp_path / "whole"), strict=True):
        assert without_seconds(path) == without_seconds(other_path)
        one, other = tensors_of(path, average_decay), tensors_of(other_path, average_decay)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("average_decay", [None, 0.8])
def test_a_finished_run_is_not_trained_again(tmp_path: Path, average_decay: float | None) -> None:
    module, log = run(tmp_path, average_decay=average_decay)
    again, log_again = run(tmp_path, batches=Numbers(fails_at=0), average_decay=average_decay)
    assert log_again == log
    assert same_weights(module, again)
    assert not again.training


class Wide(Tiny):
    """Wide enough for torchao to quantize the moments of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 2048)
        self.second = nn.Linear(2048, 1)


def test_moments_of_8_bits_learn_and_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    fields: dict[str, Any] = {"optimizer": "adamw_8bit", "learning_rate": 0.002}
    whole, log = run(tmp_path / "whole", module=Wide(), **fields)
    _, other = run(tmp_path / "exact", module=Wide(), **{**fields, "optimizer": "adamw"})
    assert log[-1]["loss"] == pytest.approx(other[-1]["loss"], rel=0.1)

    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", module=Wide(), batches=Numbers(fails_at=9), **fields)
    again, log_again = run(tmp_path / "stopped", module=Wide(), **fields)
    assert without_rates(log_again) == without_rates(log)
    assert same_weights(whole, again)


def test_the_result_is_the_average_of_the_weights_by_hand(tmp_path: Path) -> None:
    """The weights after every step, averaged in float64 with the decay's own warm-up.

    Buffers are not averaged: the last ones count.
    """
    seen: list[dict[str, Tensor]] = []

    def watch(step: int, writer: Any) -> None:
        seen.append(in_float64(module))

    def in_float64(module: nn.Module) -> dict[str, Tensor]:
        return {name: w.detach().double().clone() for name, w in module.named_parameters()}

    # The average begins with the weights as they are before the first step.
    module = Tiny()
    average = in_float64(module)
    run(tmp_path, module=module, callback=watch, callback_every=1, average_decay=0.6)

    for step, weights in enumerate(seen, 1):
        decay = min(0.6, (1 + step) / (10 + step))
        for name, weight in weights.items():
            average[name] = decay * average[name] + (1 - decay) * weight

    for name, weight in module.named_parameters():
        torch.testing.assert_close(weight.double(), average[name], atol=1e-6, rtol=1e-5)
        assert not torch.equal(weight.double(), seen[-1][name])
    assert module.seen.item() == 20 * 6


def test_networks_of_their_own_are_clipped_by_themselves(tmp_path: Path) -> None:
    """What one of two networks learns does not depend on how large the other's gradient is."""

    def scaled(scale: float) -> Any:
        def loss_of_two(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
            first, second = module
            return first(batch[0]).square().mean() + scale * second(batch[0]).square().mean(), {}

        return loss_of_two

    # Clipped together, the second network's gradient would leave the first one next to nothing.
    weights = []
    for scale in (1.0, 1000.0):
        module = nn.ModuleList([Tiny(), Tiny()])
        run(
            tmp_path / str(scale),
            module=module,
            loss=scaled(scale),
            clipped=list(module),
            clip=0.01,
        )
        weights.append([weight.detach().clone() for weight in module[0].parameters()])

    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_a_log_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    _, log = run(tmp_path / "whole")
    folder = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        run(folder, batches=Numbers(fails_at=11))
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    _, log_again = run(folder)
    assert without_rates(log_again) == without_rates(log) == without_rates(read_log(folder))


def test_a_seed_of_its_own_for_every_step(tmp_path: Path) -> None:
    drawn: list[float] = []

    def drawing_loss(module: nn.Module, batch: Any) -> Any:
        drawn.append(float(torch.rand(())))
        return loss(module, batch)

    run(tmp_path, loss=drawing_loss)

    assert len(set(drawn[:20])) == 20
    torch.manual_seed(7 * 1_000_003 + 3)
    assert drawn[3] == float(torch.rand(()))


def test_callbacks_come_on_time_and_may_leave_training_mode(tmp_path: Path) -> None:
    module, called = Tiny(), []

    def callback(step: int, loggers: Any) -> None:
        loggers.table(step, "prompts", ["prompt"], [["a dog"]])
        module.eval()
        called.append(step)

    run(tmp_path, module=module, callback=callback)
    assert called == [5, 10, 15, 20]
    assert module.seen.item() == 20 * 6  # it counts in training mode only


# ---------------------------------------------------------------------------------------- no number


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bad_at", [0, 5, 7, 18])
def test_a_step_whose_loss_is_no_number_changes_nothing(
    tmp_path: Path, bad: float, bad_at: int
) -> None:
    """The step is written down, and the weights are those of an optimizer that leaves it out."""
    module, log = run(tmp_path, batches=Numbers(bad_at=bad_at, bad=bad))

    # Every step has its own seed and its own rate, whether its gradient is used or not.
    by_hand, batches = Tiny().train(), Numbers()
    optimizer = new_optimizer(by_hand, config())
    for step in range(20):
        torch.manual_seed(7 * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config())
        loss(by_hand, batches.next())[0].backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        if step != bad_at:
            optimizer.step()
        optimizer.zero_grad()

    for one, other in zip(module.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    (event,) = events(tmp_path)
    assert (event["step"], event["event"]) == (bad_at + 1, "step skipped")
    assert not math.isfinite(event["loss"])
    assert event["parameters"] == ["first.bias", "first.weight", "second.bias", "second.weight"]
    assert all(math.isfinite(value) for record in log for value in record.values())


def test_a_gradient_that_is_no_number_is_skipped_too(tmp_path: Path) -> None:
    """The loss of a step may be fine while its gradient is not."""
    batches = Numbers()

    def bad_gradient(module: nn.Module, batch: Any) -> Any:
        value, figures = loss(module, batch)
        if batches.number(batch) == 6:
            value.register_hook(lambda gradient: gradient * math.nan)
        return value, figures

    module, _ = run(tmp_path, batches=batches, loss=bad_gradient)
    assert [(event["step"], event["event"]) for event in events(tmp_path)] == [(6, "step skipped")]
    assert math.isfinite(events(tmp_path)[0]["loss"])
    assert all(weight.isfinite().all() for weight in module.parameters())


def test_spikes_are_written_down_with_their_documents(tmp_path: Path) -> None:
    def spiking(module: nn.Module, batch: Any) -> Any:
        value, figures = loss(module, batch)
        if batches.number(batch) == 50:
            value = value * 1000
        return value, figures

    batches = Numbers()
    split = BatchSplit(ids=lambda parts: [f"document {batches.number(parts[0])}"])
    run(
        tmp_path,
        batches=batches,
        loss=spiking,
        steps=60,
        clip=0.01,
        learning_rate=1e-3,
        split=split,
    )

    # Six standard deviations above the mean of the steps before it.
    (event,) = events(tmp_path)
    assert (event["step"], event["event"]) == (50, "loss spike")
    assert event["documents"] == ["document 50"]
    assert event["loss"] > event["mean_before"] + 6 * event["deviation_before"]


def test_a_training_goes_on_from_another_with_the_rate_raised_again(tmp_path: Path) -> None:
    """Weights, moments and data are those of the other's end, and the schedule begins again.

    By hand, these are two schedules over one optimizer.
    """
    run(tmp_path / "first", steps=20)
    module, log = run(tmp_path / "second", steps=8, resume_from=tmp_path / "first")

    by_hand, batches = Tiny().train(), Numbers()
    optimizer = new_optimizer(by_hand, config())
    for step in range(28):
        torch.manual_seed(7 * 1_000_003 + step)
        rate = learning_rate(step, config())
        if step >= 20:
            rate = learning_rate(step - 20, config(steps=8))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss(by_hand, batches.next())[0].backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert same_weights(module, by_hand)
    assert [record["step"] for record in log] == [22, 24, 26, 28]

    # Once finished, it is not trained again.
    again, log_again = run(
        tmp_path / "second", steps=8, resume_from=tmp_path / "first", batches=Numbers(fails_at=0)
    )
    assert log_again == log
    assert same_weights(module, again)

    with pytest.raises(
        UserError, match=r"has no checkpoint to continue from; set training\.start_with=weights$"
    ):
        run(tmp_path / "third", resume_from=tmp_path / "nothing")


@pytest.mark.parametrize("bad_at", [0, 5, 7, 8, 18])
def test_too_many_in_a_row_stop_the_run_and_leave_the_last_good_checkpoint(
    tmp_path: Path, bad_at: int
) -> None:
    def bad_from(module: nn.Module, batch: Any) -> Any:
        value, figures = loss(module, batch)
        if batches.number(batch) > bad_at:
            value = value * math.nan
        return value, figures

    batches = Numbers()
    stop = bad_at + 4
    if stop > 20:
        # It ends before there are too many, and its last step was bad.
        with pytest.raises(FloatingPointError, match=r"^tiny diverged: 2 steps .*step_00000016$"):
            run(tmp_path, batches=batches, loss=bad_from, bad_steps=3)
        return

    good = "it has no good checkpoint$"
    if bad_at >= 4:
        good = r"the last good checkpoint is \S*/step_\d+$"
    sentence = (
        rf"^tiny diverged: 4 steps in a row were skipped; at step {stop} the loss is nan "
        rf"\(events.jsonl lists their documents\); {good}"
    )
    with pytest.raises(FloatingPointError, match=sentence):
        run(tmp_path, batches=batches, loss=bad_from, bad_steps=3)

    last = bad_at // 4 * 4
    assert names(tmp_path) == [f"step_{step:08d}" for step in (last - 4, last) if step > 0]
    for path in checkpoints(tmp_path):
        assert all(tensor.isfinite().all() for tensor in tensors_of(path).values())
    assert [event["step"] for event in events(tmp_path)] == list(range(bad_at + 1, stop + 1))


@pytest.mark.parametrize("fault", ["the last step", "weights", "NaN", "loss"])
def test_a_result_is_good_or_the_training_has_diverged_and_says_so_again(
    tmp_path: Path, fault: str
) -> None:
    """A good result has a good last step, finite weights, and a loss that they give.

    Where it is not good, training again does not call it finished.
    """
    # The second training begins at the last good checkpoint, and comes to the same end.
    for _ in range(2):
        bad_at = 19 if fault == "the last step" else None
        module, batches = Tiny(), Numbers(bad_at=bad_at)

        def harmed(module: nn.Module, batch: Any, batches: Numbers = batches) -> Any:
            if batches.number(batch) == 20 and fault != "the last step":
                number = {"weights": math.inf, "NaN": math.nan, "loss": 9e29}[fault]
                module.second.weight.register_hook(
                    lambda gradient: _spoil(module, number, gradient)
                )
            return loss(module, batch)

        with pytest.raises(FloatingPointError, match=r"^tiny diverged: .*/step_00000016$"):
            run(tmp_path, module=module, batches=batches, loss=harmed, clip=1e9)
        assert names(tmp_path) == ["step_00000012", "step_00000016"]

    run(tmp_path)  # without the fault it goes on from there


def _spoil(module: Any, number: float, gradient: Tensor) -> Tensor:
    """Change another weight while gradients are computed that are fine themselves."""
    with torch.no_grad():
        module.first.bias.fill_(0)
        module.second.bias.fill_(number)
    return gradient


def test_a_full_disk_does_not_end_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No log, picture or checkpoint can be written for a while: it is said, and they come later."""
    whole, log = run(tmp_path / "whole", callback=lambda *_: {"loss": 1.0})

    # The first twelve times that a file would be added to, the disk is full.
    full = iter([True] * 12)
    usual = Path.open

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode == "a" and next(full, False):
            refused()
        return usual(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", opened)

    # The first and the third checkpoint cannot be written, and nothing for TensorBoard.
    save = checkpoint.dcp.async_save
    saves = iter([refused, save, refused])

    def async_save(*given: Any, **rest: Any) -> Any:
        return next(saves, save)(*given, **rest)

    monkeypatch.setattr(checkpoint.dcp, "async_save", async_save)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", refused)

    again, _ = run(tmp_path / "full", callback=lambda *_: {"loss": 1.0})
    assert torch.equal(again.first.weight, whole.first.weight)
    assert without_rates(read_log(tmp_path / "full")) == without_rates(log)
    validation, expected = (tmp_path / name / "validation.jsonl" for name in ("full", "whole"))
    assert validation.read_text() == expected.read_text()
    assert names(tmp_path / "full") == names(tmp_path / "whole")

    warnings = [event["message"] for event in events(tmp_path / "full")]
    unwritten = [message.partition(": ")[0].rpartition("/")[2] for message in warnings]
    assert unwritten == ["step_00000004", "step_00000012"]
    said = capsys.readouterr().out
    assert f"{tmp_path / 'full/log.jsonl'}: No space left on device; " in said
    assert f"{tmp_path / 'full'}: tensorboard: No space left on device; " in said


@pytest.mark.once
@pytest.mark.parametrize("place", ["last step", "save", "callback", "last callback", "end"])
def test_a_signal_at_any_place_of_a_training_stops_it_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Bit for bit it is the same in the end, wherever the signal came.

    It may come in the last step, checkpoint or validation, whose record is made afterwards.
    """

    def figures(step: int, writer: Any) -> dict[str, float]:
        return {"loss": float(step)}

    whole, log = run(tmp_path / "whole", callback=figures)
    asked = iter([True])

    def stop() -> None:
        if next(asked, False):
            os.kill(os.getpid(), signal.SIGTERM)

    # The signal is sent once, at the place that is tested.
    last = 0

    def loss_stops(module: nn.Module, batch: Any) -> Any:
        nonlocal last
        last = batches.number(batch)
        if place == "last step" and last == 20:
            stop()
        return loss(module, batch)

    def callback(step: int, writer: Any) -> dict[str, float]:
        if place == {10: "callback", 20: "last callback"}.get(step):
            stop()
            time.sleep(5)  # the signal does not wait for its end
        return figures(step, writer)

    save = Checkpoints.save

    def save_stops(self: Any, tensors: Any, state: Any, **rest: Any) -> None:
        if place == "save" and state["step"] == 20:
            stop()
        save(self, tensors, state, **rest)

    poll = Checkpoints.poll

    def poll_stops(self: Any) -> None:
        if place == "end" and last == 20:
            stop()
        poll(self)

    monkeypatch.setattr(Checkpoints, "save", save_stops)
    monkeypatch.setattr(Checkpoints, "poll", poll_stops)
    batches = Numbers()
    with pytest.raises(Again, match="SIGTERM"):
        run(tmp_path / "cut", batches=batches, loss=loss_stops, callback=callback)

    again, log_again = run(tmp_path / "cut", callback=figures)
    assert without_rates(log_again) == without_rates(log)
    assert torch.equal(again.first.weight, whole.first.weight)
    lines = (tmp_path / "cut/validation.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [5, 10, 15, 20]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_outside_of_a_training_a_signal_stops_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def wait() -> None:
        with Signals():
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(Again, match=rf"^stopped by {number.name}$"):
        wait()
    assert signal.getsignal(number) is before


def test_a_figure_that_a_step_lacks_is_left_out_of_the_mean(tmp_path: Path) -> None:
    # Six steps in three records; the last figure is of the loss that tries the result.
    values = iter([1.0, math.nan, math.nan, math.nan, 5.0, 7.0, 9.0])

    def loss_with_gaps(module: nn.Module, batch: Any) -> Any:
        return loss(module, batch)[0], {"now_and_then": next(values)}

    _, log = run(tmp_path, loss=loss_with_gaps, steps=6)
    assert [record.get("now_and_then") for record in log] == [1.0, None, 6.0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_record_that_a_signal_falls_into_is_of_all_its_steps(
    tmp_path: Path, number: signal.Signals
) -> None:
    """The signal comes within a step of two micro-batches, which is made again as a whole."""

    def parts(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, ...]]:
        return list(zip(*(each.tensor_split(2) for each in batch), strict=True))

    halves = BatchSplit(parts=parts)
    calls = iter(range(1000))

    def interrupted(module: nn.Module, batch: Any) -> Any:
        if next(calls) in (2, 9, 16):
            os.kill(os.getpid(), number)
        return loss(module, batch)

    fields = {"steps": 10, "log_every": 5, "checkpoint_every": 10, "split": halves}
    _, whole = run(tmp_path / "whole", **fields)

    # Three trainings are cut, each within a step; the fourth one ends.
    for _ in range(3):
        with pytest.raises(Again):
            run(tmp_path / "cut", loss=interrupted, **fields)
    _, log = run(tmp_path / "cut", loss=interrupted, **fields)
    assert without_rates(log) == without_rates(whole)
    assert [set(record) for record in log] == [set(record) for record in whole]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_record_goes_on_from_the_states_of_other_ranks(ranks: int) -> None:
    """Two ranks wrote what they had summed; one rank or three take it over, and lose nothing."""
    two = [{"seconds": 5.0, "sums": {"loss": [3.0, 2.0], "tokens": [8.0, 2.0]}}] * 2
    found = []
    for rank in range(ranks):
        meter = Meter(Ranks(CPU, rank, ranks))
        meter.load(two)
        found.append(meter.state()["sums"])

    losses = [each["loss"] for each in found]
    assert [sum(value for value, _ in losses), sum(count for _, count in losses)] == [6.0, 4.0]
    assert sum(each["tokens"][0] for each in found) == 16.0


# -------------------------------------------------------------------------------------- checkpoints


def saved(
    folder: Path, *steps: int, fill: float | None = None, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Write checkpoints of the tiny problem after one step of its optimizer.

    Args:
        steps: a checkpoint is written for each.
        fill: a value for one matrix before the step.
        options: of `Checkpoints`.
    """
    module = Tiny()
    if fill is not None:
        nn.init.constant_(module.first.weight, fill)
    optimizer = new_optimizer(module, config())
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()

    tensors = training_tensors(module, optimizer)
    writer = Checkpoints(folder, Ranks(CPU), **{"keep": 2, **options})
    for step in steps:
        writer.save(tensors, {"step": step, "data": {"at": step}})
    writer.finish()
    return module, tensors


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    module, tensors = saved(tmp_path, 12)
    path = Checkpoints(tmp_path, Ranks(CPU), keep=2).newest()
    assert path == tmp_path / "step_00000012"
    assert read_state(path) == {"step": 12, "data": {"at": 12}, "ranks": 1, "format": 1}
    found = tensors_of(path)

    for name, tensor in module.state_dict().items():
        assert torch.equal(found[f".model.{name}"], tensor)
    for name, moments in tensors["optimizer"].items():
        for key, value in moments.items():
            assert torch.equal(found[f".optimizer.{name}.{key}"], value)
        assert moments["exp_avg"].abs().sum() > 0


def test_the_copy_is_taken_before_the_training_goes_on(tmp_path: Path) -> None:
    module = Tiny()
    tensors = training_tensors(module, new_optimizer(module, config()))
    before = module.first.weight.detach().clone()

    writer = Checkpoints(tmp_path, Ranks(CPU), keep=1)
    writer.save(tensors, {"step": 1, "data": {}})
    nn.init.zeros_(module.first.weight)
    writer.finish()
    assert torch.equal(tensors_of(tmp_path / "step_00000001")[".model.first.weight"], before)


def test_only_the_newest_and_the_milestones_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 2, 10, 100, 1_000_000, keep=3)
    assert names(tmp_path) == ["step_00000010", "step_00000100", "step_01000000"]
    saved(tmp_path, 1_000_001, keep=1, keep_every=50)
    assert names(tmp_path) == ["step_00000100", "step_01000000", "step_01000001"]


@pytest.mark.parametrize(
    "killed_in", ["dcp.async_save", "sha256", "write_json", "sync_to_disk", "rename"]
)
def test_what_fails_while_saving_leaves_the_older_checkpoint_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    saved(tmp_path, 10)
    told: list[str] = []

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        place = {"dcp.async_save": checkpoint.dcp, "rename": Path}.get(killed_in, checkpoint)
        patch.setattr(place, killed_in.split(".")[-1], full)
        saved(tmp_path, 20, fill=1.0, warn=told.append)

    assert names(tmp_path) == ["step_00000010"]
    assert told == [
        f"{tmp_path / 'step_00000020'}: no checkpoint was written "
        "([Errno 28] No space left on device); the older one "
        "is kept, and the training continues and tries again at the next checkpoint"
    ]

    # The next try replaces what was left.
    saved(tmp_path, 20, fill=2.0)
    assert names(tmp_path) == ["step_00000010", "step_00000020"]
    assert not list(tmp_path.glob(".partial_*"))
    assert tensors_of(tmp_path / "step_00000020")[".model.first.weight"].min() > 1.9


def test_nothing_of_a_leftover_gets_into_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".partial_00000010").mkdir()
    (tmp_path / ".partial_00000010" / "half").write_text("")
    saved(tmp_path, 10)
    files = sorted(path.name for path in (tmp_path / "step_00000010").iterdir())
    assert files == [".metadata", "__0_0.distcp", "manifest.json", "state.json"]


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, harm: str) -> None:
    saved(tmp_path, 10, 20)
    file = tmp_path / "step_00000020" / name
    content = bytearray(file.read_bytes())
    half = len(content) // 2
    content[half] ^= 1
    if harm == "remove":
        file.unlink()
    elif harm == "flip":
        file.write_bytes(content)
    else:
        file.write_bytes(content[:half])

    told: list[str] = []
    newest = Checkpoints(tmp_path, Ranks(CPU), keep=2, warn=told.append).newest()
    assert newest == tmp_path / "step_00000010"
    (sentence,) = told
    assert sentence.startswith(f"{tmp_path / 'step_00000020'} is skipped: ")


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    state = tmp_path / "step_00000003" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 7}))
    with pytest.raises(
        UserError,
        match="step_00000003 is a checkpoint of format 7, and this version reads format 1",
    ):
        Checkpoints(tmp_path, Ranks(CPU), keep=2).newest()
    (tmp_path / "step_00000004").write_bytes(b"a single file")
    with pytest.raises(UserError, match="step_00000004 is a checkpoint of format 0"):
        Checkpoints(tmp_path, Ranks(CPU), keep=2).newest()


def test_the_index_of_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    saved(tmp_path, 10)

    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harmed",))

    path = tmp_path / "step_00000010"
    for harm in (Harm(), torch.nn.Linear(1, 1), print):
        (path / ".metadata").write_bytes(pickle.dumps(harm))
        with pytest.raises(
            UserError, match=r"the index of a checkpoint names .*, which is not read"
        ):
            tensors_of(path)
    assert not (tmp_path / "harmed").exists()


def test_the_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    # A part of the model is read; another name or another shape is refused.
    for other in (nn.Linear(4, 8), nn.Sequential(nn.Linear(4, 8)), nn.Linear(3, 8)):
        tensors = {"model": {f"first.{name}": value for name, value in other.state_dict().items()}}
        if isinstance(other, nn.Linear) and other.in_features == 4:
            read_tensors(tmp_path / "step_00000010", tensors, Ranks(CPU))
            continue
        with pytest.raises(UserError, match="does not fit this training: "):
            read_tensors(tmp_path / "step_00000010", tensors, Ranks(CPU))


OTHERS = (
    "step_best",
    "step_00000010-hf",
    "step_00000010 copy",
    "step_",
    "step_²",
    "step_-5",
    "step_7",
)


def test_only_step_and_digits_is_a_checkpoint(tmp_path: Path) -> None:
    """Copies under other names are not read, counted or deleted; nor is a file a checkpoint."""
    saved(tmp_path, 10)
    for name in OTHERS[:-1]:
        shutil.copytree(tmp_path / "step_00000010", tmp_path / name)
    (tmp_path / "step_7").mkdir()  # a checkpoint's name, but not a complete one

    saved(tmp_path, 20, 30, keep=1)
    assert names(tmp_path) == ["step_00000030"]
    assert Checkpoints(tmp_path, Ranks(CPU), keep=1).newest() == tmp_path / "step_00000030"
    assert {path.name for path in tmp_path.iterdir()} == {*OTHERS, "step_00000030"}
    with pytest.raises(UserError, match=r"which .* does not have; it has 30 "):
        load_weights_at(tmp_path, 10, Tiny(), averaged=False)


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    saved(tmp_path, 20, 100_000_000, keep=3)
    (tmp_path / "step_00000020").rename(tmp_path / "step_20")
    assert names(tmp_path) == ["step_20", "step_100000000"]
    saved(tmp_path, 20, keep=3)

    # A checkpoint of the same step takes its place, under the name that a training gives.
    saved(tmp_path, 20, keep=3)
    assert names(tmp_path) == ["step_00000020", "step_100000000"]


def test_a_copy_under_another_number_is_passed_over_and_does_not_cost_a_new_checkpoint(
    tmp_path: Path,
) -> None:
    saved(tmp_path, 10)
    shutil.copytree(tmp_path / "step_00000010", tmp_path / "step_00000099")
    told: list[str] = []
    newest = Checkpoints(tmp_path, Ranks(CPU), keep=1, warn=told.append).newest()
    assert newest == tmp_path / "step_00000010"
    assert told == [
        f"{tmp_path / 'step_00000099'} is skipped: it is a copy of the checkpoint of step 10"
    ]

    # It stays beside newer checkpoints until a training gets beyond its number.
    saved(tmp_path, 20, 30, keep=1)
    assert names(tmp_path) == ["step_00000030", "step_00000099"]
    saved(tmp_path, 100, keep=1)
    assert names(tmp_path) == ["step_00000100"]


def test_a_run_begins_anew_beside_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "stopped" / ".partial_00000004").mkdir(parents=True)
    whole, _ = run(tmp_path / "whole")
    again, _ = run(tmp_path / "stopped")
    assert same_weights(whole, again)
    assert not (tmp_path / "stopped" / ".partial_00000004").exists()


# ---------------------------------------------------------------------------------- refused weights


class Other(nn.Module):
    """Weights of the given shapes."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))


@pytest.mark.parametrize(
    ("given", "wanted", "end"),
    [
        ({"a": (2,)}, {"a": (2,), "b": (3,), "c": (1,)}, "lacks b, c"),
        ({"a": (2,), "x": (2,)}, {"a": (2,)}, "has the unknown x"),
        ({"a": (2,), "b": (2, 3)}, {"a": (2,), "b": (3, 2)}, "has another shape for b"),
        ({}, {name: (1,) for name in "gfedcba"}, "lacks a, b, c, d, e, ..."),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, given: dict[str, Any], wanted: dict[str, Any], end: str
) -> None:
    file = tmp_path / "model.safetensors"
    save_weights(file, Other(**given))
    module = Other(**wanted)
    for weight in module.parameters():
        nn.init.constant_(weight, 5)

    with pytest.raises(UserError) as refusal:
        load_weights(file, module)
    assert str(refusal.value) == f"{file} {end}"
    assert all((weight == 5).all() for weight in module.parameters())  # nothing was loaded


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^there are no weights at .*/model.safetensors$"):
        load_weights(tmp_path / "model.safetensors", Tiny())


# ---------------------------------------------------------------------------------------- precision


def test_precisions_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is asked for by name is used, whether the device computes fast in it or not.
    for device in (CPU, torch.device("cuda")):
        assert uses_bf16(device, "bf16")
        assert not uses_bf16(device, "float32")

    # With auto, bf16 is used where the device computes in it without emulation.
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert uses_bf16(CPU, "auto") is (avx512 or amx)

    for native in (False, True):

        def is_supported(including_emulation: bool = True, native: bool = native) -> bool:
            return including_emulation or native

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
        assert uses_bf16(torch.device("cuda"), "auto") is native


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32)]
)
def test_matrix_products_run_in_the_precision_and_weights_stay_float32(
    tmp_path: Path, precision: Any, dtype: torch.dtype
) -> None:
    seen: set[torch.dtype] = set()

    def watching_loss(module: nn.Module, batch: Any) -> Any:
        seen.add(module(batch[0]).dtype)
        return loss(module, batch)

    module, _ = run(tmp_path, loss=watching_loss, steps=4, precision=precision)
    assert seen == {dtype}
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    with autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_the_device_is_a_gpu_where_there_is_one() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert best_device().type == expected


def test_a_mask_of_minus_infinities_is_no_divergence() -> None:
    module = nn.Linear(2, 1)
    module.register_buffer("mask", torch.full((2, 2), -math.inf), persistent=False)
    cpu = torch.device("cpu")

    def sound() -> bool:
        def loss(module: nn.Module, part: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
            return module(part).sum(), {}

        return _sound(module, loss, torch.ones(1, 2), cpu, TrainingConfig(), Ranks(cpu))

    assert sound()
    with torch.no_grad():
        module.weight[0, 0] = math.inf
    assert not sound()
