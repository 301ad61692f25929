"""The training loop: schedule, checkpoints that a kill cannot halve, exact resume, losses that are no numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cm3leon.config import from_mapping
from cm3leon.training import checkpoint, trainer
from cm3leon.training.checkpoint import checkpoints, load_checkpoint, load_weights, save_checkpoint, save_weights
from cm3leon.training.device import autocast, best_device, uses_bf16
from cm3leon.training.schedule import linear_schedule
from cm3leon.training.trainer import TrainingConfig, train
from cm3leon.types import UserError

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------ schedule


def test_schedule_by_hand() -> None:
    rates = [linear_schedule(step, peak=2.0, warmup_steps=4, steps=10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 5 / 3, 4 / 3, 1.0, 2 / 3, 1 / 3])


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (1, 2), (5, 6), (100, 1000)])
def test_schedule_rises_to_the_peak_once_and_never_is_zero(warmup: int, steps: int) -> None:
    rates = [linear_schedule(step, peak=3e-4, warmup_steps=warmup, steps=steps) for step in range(steps)]
    assert max(rates) == pytest.approx(3e-4)
    assert min(rates) > 0
    top = rates.index(max(rates))
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"steps": 10, "warmup_steps": 10}, "training: warmup_steps 10 must be below steps 10"),
        ({"log_every": 3, "checkpoint_every": 10}, "training: log_every 3 must divide checkpoint_every 10"),
        ({"keep_checkpoints": 0}, "training.keep_checkpoints is 0; it must be int >= 1"),
        ({"precision": "fp16"}, 'training.precision is "fp16"; it must be one of auto, bf16, float32'),
    ],
)
def test_unfit_configs_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        from_mapping(TrainingConfig, fields, "training")
    assert str(refusal.value) == sentence


# ------------------------------------------------------------------------------------------------ a tiny problem


class Tiny(nn.Module):
    """A network with all that a resume has to bring back: matrices, vectors, a buffer, and random draws in a step."""

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


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor | float]]:
    x_BD, y_B = batch
    error_B = module(x_BD) - y_B
    return error_B.square().mean(), {"error": error_B.detach().abs().mean(), "tokens": float(len(x_BD))}


class Numbers:
    """Batches out of a generator whose whole state is saved; `fails_at` raises before that batch (from 0)."""

    def __init__(self, fails_at: int | None = None, bad_at: int | None = None, bad: float = math.nan) -> None:
        self.rng = np.random.default_rng(0)
        self.count = 0
        self.fails_at, self.bad_at, self.bad = fails_at, bad_at, bad

    def next(self) -> tuple[Tensor, Tensor]:
        if self.count == self.fails_at:
            raise Interrupted
        x_BD = torch.from_numpy(self.rng.standard_normal((6, 4))).float()
        y_B = x_BD[:, 0] - x_BD[:, 1]
        if self.count == self.bad_at:
            y_B = y_B * self.bad
        self.count += 1
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
        "steps": 20, "warmup_steps": 3, "learning_rate": 0.05, "log_every": 2, "checkpoint_every": 4,
        "callback_every": 5, "precision": "float32",
    }  # fmt: skip
    return TrainingConfig(**{**defaults, **fields})


def run(
    folder: Path,
    *,
    batches: Numbers | None = None,
    callback: Callable[[int, Any], None] | None = None,
    module: nn.Module | None = None,
    loss: Any = loss,
    clipped: Sequence[nn.Module] = (),
    **fields: Any,
) -> tuple[nn.Module, list[dict[str, float]]]:
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
    )
    return module, log


def without_rates(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if not name.endswith("_per_second")} for record in log]


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


# ------------------------------------------------------------------------------------------------ the loop


def test_it_learns_and_records(tmp_path: Path) -> None:
    module, log = run(tmp_path, steps=200)
    assert [record["step"] for record in log] == list(range(2, 201, 2))
    assert log[-1]["loss"] < 0.3 * log[0]["loss"]
    assert log == read_log(tmp_path)
    assert set(log[0]) == {"step", "learning_rate", "loss", "gradient_norm", "error", "tokens_per_second"}
    assert log[1]["learning_rate"] == linear_schedule(3, peak=0.05, warmup_steps=3, steps=200)
    assert module.seen.item() == 200 * 6
    assert not module.training
    assert names(tmp_path) == ["step_00000196", "step_00000200"]
    assert any((tmp_path / "tensorboard").iterdir())


def test_one_step_is_adamw_by_hand(tmp_path: Path) -> None:
    """Clipped gradient, first step of Adam (which is the sign of the gradient), decay of matrices alone."""
    batches = Numbers()
    x_BD, y_B = batches.next()
    by_hand = Tiny().train()
    torch.manual_seed(7 * 1_000_003)
    (by_hand(x_BD) - y_B).square().mean().backward()
    module, log = run(tmp_path, steps=1, warmup_steps=0, weight_decay=0.5, clip=0.01, checkpoint_every=2)
    norm = torch.stack([weight.grad.norm() for weight in by_hand.parameters()]).norm()
    assert log[0]["gradient_norm"] == pytest.approx(norm.item())
    for (name, before), after in zip(by_hand.named_parameters(), module.parameters(), strict=True):
        clipped = before.grad * 0.01 / (norm + 1e-6)
        expected = before * (1 - 0.05 * (0.5 if before.ndim == 2 else 0)) - 0.05 * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("average_decay", [None, 0.8])
@pytest.mark.parametrize("stop", ["batches", "callback", "save"])
@pytest.mark.parametrize("steps", [[1], [4], [5], [15], [4, 5, 9], [19], [2, 2, 10, 10]])
def test_a_resumed_run_is_the_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str, steps: list[int], average_decay: float | None
) -> None:
    """Bit for bit: weights, buffers, their average, the optimizer, the place in the data, and the log."""
    fields = {"average_decay": average_decay}
    whole, log = run(tmp_path / "whole", callback=lambda step, writer: torch.rand(step), **fields)
    folder = tmp_path / "stopped"

    for stop_at in steps:

        def stops(step: int, writer: Any = None, stop_at: int = stop_at) -> None:
            torch.rand(3)  # a callback may draw
            if step >= stop_at:
                raise Interrupted

        def save_stops(folder: Path, *, step: int, stops: Any = stops, **rest: Any) -> None:
            stops(step)
            save_checkpoint(folder, step=step, **rest)

        with monkeypatch.context() as patch:
            if stop == "save":
                patch.setattr(trainer, "save_checkpoint", save_stops)
            batches = Numbers(fails_at=stop_at if stop == "batches" else None)
            callback = stops if stop == "callback" else None
            with pytest.raises(Interrupted):
                run(folder, batches=batches, callback=callback, callback_every=1, **fields)
    again, log_again = run(folder, callback=lambda step, writer: torch.rand(step + 1), **fields)
    for (name, weight), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
    assert without_rates(log_again) == without_rates(log) == without_rates(read_log(folder))
    assert names(folder) == names(tmp_path / "whole")
    for path, other_path in zip(checkpoints(folder), checkpoints(tmp_path / "whole"), strict=True):
        assert (path / "state.json").read_bytes() == (other_path / "state.json").read_bytes()
        one, other = (torch.load(p / "optimizer.pt", weights_only=True) for p in (path, other_path))
        for key, moments in one["state"].items():
            assert all(torch.equal(moments[name], other["state"][key][name]) for name in moments)


@pytest.mark.parametrize("average_decay", [None, 0.8])
def test_a_finished_run_is_not_trained_again(tmp_path: Path, average_decay: float | None) -> None:
    module, log = run(tmp_path, average_decay=average_decay)
    again, log_again = run(tmp_path, batches=Numbers(fails_at=0), average_decay=average_decay)
    assert log_again == log
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), again.parameters(), strict=True))
    assert not again.training


def test_the_result_is_the_average_of_the_weights_by_hand(tmp_path: Path) -> None:
    """The weights after every step, averaged in float64 with the decay's own warm-up; buffers are the last ones."""
    seen: list[dict[str, Tensor]] = []

    def watch(step: int, writer: Any) -> None:
        seen.append({name: weight.detach().double().clone() for name, weight in module.named_parameters()})

    module = Tiny()
    average = {name: weight.detach().double().clone() for name, weight in module.named_parameters()}
    run(tmp_path, module=module, callback=watch, callback_every=1, average_decay=0.6)
    for step, weights in enumerate(seen, 1):
        decay = min(0.6, (1 + step) / (10 + step))
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
    for name, weight in module.named_parameters():
        torch.testing.assert_close(weight.double(), average[name], atol=1e-6, rtol=1e-5)
        assert not torch.equal(weight.double(), seen[-1][name])
    assert module.seen.item() == 20 * 6


def test_networks_of_their_own_are_clipped_by_themselves(tmp_path: Path) -> None:
    """What one of them is given does not depend on how large the other's gradient is."""

    def scaled(scale: float) -> Any:
        def loss_of_two(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
            first, second = module
            return first(batch[0]).square().mean() + scale * second(batch[0]).square().mean(), {}

        return loss_of_two

    weights = []
    for scale in (1.0, 1000.0):
        module = nn.ModuleList([Tiny(), Tiny()])
        run(tmp_path / str(scale), module=module, loss=scaled(scale), clipped=list(module), clip=0.01)
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
    assert len(set(drawn)) == 20
    torch.manual_seed(7 * 1_000_003 + 3)
    assert drawn[3] == float(torch.rand(()))


def test_callbacks_come_on_time_and_may_leave_training_mode(tmp_path: Path) -> None:
    module, called = Tiny(), []

    def callback(step: int, writer: Any) -> None:
        writer.add_scalar("validation/loss", 1.0, step)
        module.eval()
        called.append(step)

    run(tmp_path, module=module, callback=callback)
    assert called == [5, 10, 15, 20]
    assert module.seen.item() == 20 * 6  # it counts in training mode only


# ------------------------------------------------------------------------------------------------ no number


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bad_at", [0, 5, 7, 19])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, bad: float, bad_at: int) -> None:
    """At the next record, which always comes before the next checkpoint."""
    with pytest.raises(FloatingPointError, match=r"^tiny: the loss is (nan|inf) at step \d+$"):
        run(tmp_path, batches=Numbers(bad_at=bad_at, bad=bad))
    last = bad_at // 4 * 4
    assert names(tmp_path) == [f"step_{step:08d}" for step in (last - 4, last) if step > 0]
    for path in checkpoints(tmp_path):
        module = Tiny()
        load_weights(path / "model.safetensors", module)
        assert all(weight.isfinite().all() for weight in module.parameters())
    assert all(math.isfinite(record["loss"]) for record in read_log(tmp_path))


@pytest.mark.parametrize("bad_at", [0, 5, 7, 19])
def test_a_gradient_that_is_no_number_is_never_saved(tmp_path: Path, bad_at: int) -> None:
    """The loss of a step may be fine while its gradient is not; the weights are lost all the same."""
    count = 0

    def loss_with_a_bad_gradient(module: nn.Module, batch: Any) -> Any:
        nonlocal count
        value, figures = loss(module, batch)
        if count == bad_at:
            value.register_hook(lambda gradient: gradient * math.nan)
        count += 1
        return value, figures

    with pytest.raises(FloatingPointError):
        run(tmp_path, loss=loss_with_a_bad_gradient)
    for path in checkpoints(tmp_path):
        module = Tiny()
        load_weights(path / "model.safetensors", module)
        assert all(weight.isfinite().all() for weight in module.parameters())


def test_a_figure_that_a_step_lacks_is_left_out_of_the_mean(tmp_path: Path) -> None:
    values = iter([1.0, math.nan, math.nan, math.nan, 5.0, 7.0])

    def loss_with_gaps(module: nn.Module, batch: Any) -> Any:
        return loss(module, batch)[0], {"now_and_then": next(values)}

    _, log = run(tmp_path, loss=loss_with_gaps, steps=6)
    assert [record.get("now_and_then") for record in log] == [1.0, None, 6.0]


# ------------------------------------------------------------------------------------------------ checkpoints


def saved(folder: Path, step: int, *, keep: int = 2, fill: float | None = None) -> tuple[nn.Module, Any]:
    module = Tiny()
    if fill is not None:
        nn.init.constant_(module.first.weight, fill)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    save_checkpoint(folder, step=step, module=module, optimizer=optimizer, state={"data": {"at": step}}, keep=keep)
    return module, optimizer


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    module, optimizer = saved(tmp_path, 12)
    other = Tiny()
    nn.init.zeros_(other.first.weight)
    other_optimizer = torch.optim.AdamW(other.parameters())
    state = load_checkpoint(tmp_path / "step_00000012", module=other, optimizer=other_optimizer, device=CPU)
    assert state == {"step": 12, "data": {"at": 12}}
    for (name, one), two in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    one, two = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert all(torch.equal(one[i][name], two[i][name]) for i in one for name in one[i])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 100, 1_000_000):
        saved(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step_00000010", "step_00000100", "step_01000000"]
    saved(tmp_path, 1_000_001, keep=1)
    assert names(tmp_path) == ["step_01000001"]


@pytest.mark.parametrize("killed_in", ["save_weights", "torch.save", "write_text", "_sync", "rename"])
def test_a_kill_while_saving_leaves_the_older_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    saved(tmp_path, 10)

    def kill(*_: Any, **__: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        place = {"torch.save": torch, "write_text": Path, "rename": Path}.get(killed_in, checkpoint)
        patch.setattr(place, killed_in.split(".")[-1], kill)
        with pytest.raises(Interrupted):
            saved(tmp_path, 20, fill=1.0)
    assert names(tmp_path) == ["step_00000010"]
    assert (tmp_path / ".partial_00000020").is_dir()
    saved(tmp_path, 20, fill=2.0)  # the next try replaces what was left
    assert names(tmp_path) == ["step_00000010", "step_00000020"]
    assert not (tmp_path / ".partial_00000020").exists()
    module = Tiny()
    load_weights(tmp_path / "step_00000020" / "model.safetensors", module)
    assert module.first.weight.min() > 1.9


def test_nothing_of_a_leftover_gets_into_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".partial_00000010").mkdir()
    (tmp_path / ".partial_00000010" / "half").write_text("")
    saved(tmp_path, 10)
    files = sorted(path.name for path in (tmp_path / "step_00000010").iterdir())
    assert files == ["model.safetensors", "optimizer.pt", "state.json"]


def test_a_run_begins_anew_beside_a_leftover(tmp_path: Path) -> None:
    (tmp_path / "stopped" / ".partial_00000004").mkdir(parents=True)
    whole, _ = run(tmp_path / "whole")
    again, _ = run(tmp_path / "stopped")
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))
    assert not (tmp_path / "stopped" / ".partial_00000004").exists()


# ------------------------------------------------------------------------------------------------ refused weights


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


# ------------------------------------------------------------------------------------------------ precision


def test_precisions_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in (CPU, torch.device("cuda")):
        assert uses_bf16(device, "bf16")
        assert not uses_bf16(device, "float32")
    for avx512, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert uses_bf16(CPU, "auto") is (avx512 or amx)
    for native in (False, True):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native: including_emulation or native,
        )
        assert uses_bf16(torch.device("cuda"), "auto") is native


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
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
    assert best_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
