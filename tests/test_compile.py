"""Compiled layers: one graph forward and one backward for all layers and all packings.

With every attention backend, what is counted is what torch.compile makes, not how fast it is:
graphs run as they are traced, without kernels of their own. `xformers` is the operator that stands
around its kernels on CUDA; on the CPU it has a kernel of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graphs import Graphs
from torch import Tensor, nn

from cm3leon.models import attention
from cm3leon.models.attention import choose
from cm3leon.models.base import Model
from cm3leon.models.llama import Llama
from cm3leon.models.recompute import Checkpointing, compile_blocks, recompute
from cm3leon.models.transformer import Transformer
from cm3leon.registry import ATTENTIONS
from cm3leon.training.compilation import recompile_limits
from cm3leon.training.config import TrainingConfig
from cm3leon.training.trainer import train

pytestmark = pytest.mark.stack

T, V = 32, 50
BACKENDS = ("naive", "sdpa", "sdpa of long blocks", "flex", "xformers")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Counts all that is compiled, from none; meanwhile every backend may train on a CPU."""
    counted = Graphs()

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted.backend))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    for name in ("xformers", "flex"):
        monkeypatch.setattr(ATTENTIONS.get(name), "missing", staticmethod(lambda device: ""))

    choose.cache_clear()
    torch._dynamo.reset()
    yield counted
    torch._dynamo.reset()
    choose.cache_clear()


def decoder(
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    layers: int = 2,
    checkpointing: Checkpointing = "none",
    shape: str = "cm3leon",
) -> Model:
    """A small model, not compiled yet."""
    name = backend.partition(" ")[0]
    # Whether blocks are long is a matter of a limit, which is lowered for this backend.
    if backend != name:
        monkeypatch.setattr(attention, "LONG", T)

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "layers": layers,
        "width": 32,
        "head_size": 16,
        "seq_len": T,
        "attention": name,
    }

    model: Model
    if shape == "cm3leon":
        model = Transformer(Transformer.Config(**sizes, init_std=0.2), vocab_size=V)
    else:
        model = Llama(Llama.Config(**sizes, kv_heads=1, mlp_width=48, init_std=0.2), vocab_size=V)
    nn.init.normal_(model.head.weight, std=0.2)
    recompute(model, checkpointing)
    return model.train()


def packings(count: int) -> Iterator[Tensor]:
    """sample_BT of different packings; the first one has one sample a row."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        begins_BT = torch.rand(2, T, generator=generator) < 0.3 * number / count
        begins_BT[:, 0] = True
        yield begins_BT.cumsum(1)


def step(model: Model, sample_BT: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss, by the names of the weights."""
    model.zero_grad()
    ids_BT = torch.arange(2 * T).view(2, T) % V
    model(ids_BT, sample_BT=sample_BT).logsumexp(-1).mean().backward()

    gradients = {}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            gradients[name] = weight.grad
    return gradients


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_is_for_a_hundred_packings(
    backend: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(backend, monkeypatch)
    plain = decoder(backend, monkeypatch)
    compile_blocks(model)

    for number, sample_BT in enumerate(packings(100)):
        found = step(model, sample_BT)
        if number % 33 == 0:
            for name, gradient in step(plain, sample_BT).items():
                torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)

    assert graphs.count == {"forward": 1, "backward": 1}
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("shape", ["cm3leon", "llama"])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_one_graph_is_for_all_layers(
    shape: str, checkpointing: Checkpointing, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function may have a number of graphs; the model has one layer more than that."""
    layers = torch._dynamo.config.recompile_limit + 1
    model = decoder(
        "xformers", monkeypatch, layers=layers, checkpointing=checkpointing, shape=shape
    )
    compile_blocks(model)
    for sample_BT in packings(3):
        step(model, sample_BT)
    assert graphs.count == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_selective_checkpointing_keeps_attention_in_compiled_layers(
    backend: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(backend, monkeypatch, checkpointing="selective")
    compile_blocks(model)
    step(model, next(packings(1)))
    assert graphs.count == {"forward": 1, "backward": 1}
    assert graphs.attentions == {"forward": 1, "backward": 0}


@pytest.mark.parametrize("shape", ["cm3leon", "llama"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("graphs")
def test_selective_checkpointing_computes_attention_once_a_layer(
    backend: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not compiled; counted at the backend itself, so once for whatever it does inside."""
    calls: dict[str, int] = {}
    options: tuple[Checkpointing, ...] = ("none", "selective", "full")
    for checkpointing in options:
        model = decoder(backend, monkeypatch, checkpointing=checkpointing, shape=shape)
        counted = Counted(choose(model.config.attention, torch.device("cpu")).attention)
        with monkeypatch.context() as patch:
            patch.setattr(
                "cm3leon.models.attention.choose",
                lambda *_, c=counted: SimpleNamespace(attention=c),
            )
            step(model, next(packings(1)))
        calls[checkpointing] = counted.calls

    assert calls == {"none": 2, "selective": 2, "full": 4}


class Counted:
    """A backend whose calls are counted."""

    def __init__(self, backend: Any) -> None:
        self.plan, self._backend, self.calls = backend.plan, backend, 0

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        return self._backend(*args)


def test_passes_without_gradients_spend_no_graph(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation and images drawn during a training have as many shapes as there are steps."""
    model = decoder("xformers", monkeypatch)
    compile_blocks(model)
    step(model, next(packings(1)))

    # A whole pass, and the same tokens through the cache: a prefix and then one by one.
    before = dict(torch._dynamo.utils.counters["frames"])
    ids_BT = torch.arange(T)[None] % V
    with torch.inference_mode():
        expected_BTV = model(ids_BT)
        cache = model.new_cache(groups=1, width=1, prefix=8, tail=T - 8)
        attend: Any = cache.prefix_pass(torch.tensor([0]), torch.tensor([8]))
        parts = [model(ids_BT[:, :8], position_BT=attend.positions(8), attend=attend)]
        for position in range(8, T):
            attend = cache.step_pass(1, 8, position - 7)
            ids_B1 = ids_BT[:, position : position + 1]
            parts.append(model(ids_B1, position_BT=attend.positions(1), attend=attend))
            cache.tail_length_R += 1
        torch.testing.assert_close(torch.cat(parts, 1), expected_BTV, atol=1e-4, rtol=1e-4)

    step(model, next(packings(1)))
    assert graphs.count == {"forward": 1, "backward": 1}
    assert torch._dynamo.utils.counters["frames"] == before


class Batches:
    """An endless stream of empty batches; the loss makes its own data."""

    def next(self) -> int:
        return 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.usefixtures("graphs")
def test_the_limit_being_reached_is_an_event_and_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module = nn.Linear(1, 1)
    steps = []

    # Not dynamic, the function is compiled anew for each of the twelve numbers.
    def scaled(x: Tensor, number: int) -> Tensor:
        return x * [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12][number]

    compiled = torch.compile(scaled, dynamic=False)

    def loss(module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        steps.append(len(steps))
        return compiled(module(torch.ones(1)), steps[-1] % 12).sum() ** 2, {}

    config = TrainingConfig(steps=12, warmup_steps=1, log_every=12, checkpoint_every=12)
    train(
        module,
        loss,
        Batches(),
        config,
        folder=tmp_path,
        device=torch.device("cpu"),
        seed=0,
        title="training",
    )

    # The limit is 8 graphs of a function, and the steps ask for 12.
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (warning,) = [event for event in events if event["event"] == "warning"]
    message = "torch.compile reached its limit of 8 (recompile_limit) at 'scaled'"
    assert message in warning["message"]
    output = capfd.readouterr()
    assert "warning: message torch.compile reached its limit" in output.out + output.err


def test_other_messages_of_the_compiler_are_not_reported() -> None:
    import logging

    said: list[str] = []
    with recompile_limits(said.append):
        logging.getLogger("torch._dynamo.convert_frame").warning("something else: %s", 8)
    assert said == []
