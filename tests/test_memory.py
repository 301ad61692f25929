"""The memory that is planned for a training is what a training of real modules holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from cm3leon.models.base import Model
from cm3leon.models.llama import Llama
from cm3leon.models.recompute import recompute
from cm3leon.models.transformer import Transformer
from cm3leon.objectives.loss import linear_cross_entropy
from cm3leon.registry import MODELS, discover
from cm3leon.training.config import DecoderTrainingConfig
from cm3leon.training.distributed import Ranks
from cm3leon.training.memory import USABLE, parameters, training_memory
from cm3leon.training.optimizer import new_optimizer
from cm3leon.training.parallel import distributed

pytestmark = pytest.mark.stack

discover()
CPU = torch.device("cpu")


def shaped(config: Any, vocab_size: int) -> Model:
    """A model without memory for its weights."""
    with torch.device("meta"):
        if isinstance(config, Llama.Config):
            return Llama(config, vocab_size=vocab_size)
        return Transformer(config, vocab_size=vocab_size)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("cm3leon_350m", 440_401_920),
        ("cm3leon_7b", 6_996_099_072),
        ("chameleon_7b", 7_013_666_816),
    ],
)
def test_weights_are_those_of_the_published_sizes(name: str, total: int) -> None:
    with torch.device("meta"):
        model: Any = MODELS.build(name, vocab_size=65_536)
    count = parameters(model)
    assert count.total == total
    assert count.embedding == count.head == 65_536 * model.config.width
    assert count.root == count.total - count.blocks


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak(
    new: Callable[[], Model],
    config: DecoderTrainingConfig,
    micro_batch: int,
    parts: int,
) -> int:
    """The most bytes held at any time of the second step, which has `parts` micro-batches.

    The optimizer's state is there from the end of the first step on. Tensors have sizes and no
    contents, as no size depends on what is computed.
    """
    model = distributed(new, new, config, Ranks(CPU))
    with FakeTensorMode(), Live() as live:
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                without_contents = torch.empty(weight.shape, dtype=weight.dtype)
                setattr(module, name, Parameter(without_contents, weight.requires_grad))
        return _peak_of_a_step(model, config, live, micro_batch, parts)


def _peak_of_a_step(
    model: Model, config: DecoderTrainingConfig, live: Live, micro_batch: int, parts: int
) -> int:
    optimizer = new_optimizer(model, config)

    # The first step is here for the optimizer's state alone, so its gradients come from no loss.
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    del weight

    live.peak = live.now
    for _ in range(parts):
        ids_BT = torch.randint(model.vocab_size, (micro_batch, model.seq_len))
        readout = loss_of(ids_BT)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids_BT, readout=readout)
        loss.backward()
        del loss
    optimizer.step()
    optimizer.zero_grad()
    return live.peak


def loss_of(ids_BT: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """The loss of these tokens as a function of the last hidden states and the head."""
    ids_N, weight_N = ids_BT.flatten(), torch.ones(ids_BT.numel(), device=ids_BT.device)

    def readout(hidden_BTD: Tensor, head: Any) -> Tensor:
        hidden_ND = hidden_BTD.flatten(0, 1)
        return linear_cross_entropy(hidden_ND, head.weight, ids_N, weight_N)[0]

    return readout


@pytest.mark.once
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("lora", [0, 8])
@pytest.mark.parametrize(
    ("width", "vocab_size", "micro_batch", "parts"),
    [
        pytest.param(256, 8192, 4, 2, marks=pytest.mark.slow),
        (256, 8192, 4, 1),
        (512, 2048, 4, 2),
        pytest.param(256, 1024, 12, 1, marks=pytest.mark.slow),
    ],
)
def test_a_training_holds_what_is_planned(
    checkpointing: Any, lora: int, width: int, vocab_size: int, micro_batch: int, parts: int
) -> None:
    shape = Transformer.Config(layers=4, width=width, seq_len=256)
    config = DecoderTrainingConfig(
        precision="bf16",
        activation_checkpointing=checkpointing,
        lora_rank=lora,
        batch_size=micro_batch * parts,
    )
    planned = training_memory(shaped(shape, vocab_size), config, gpus=1, micro_batch=micro_batch)
    measured = peak(lambda: Transformer(shape, vocab_size=vocab_size), config, micro_batch, parts)
    assert planned.total == pytest.approx(measured, rel=0.1)


class FusedNorm(torch.autograd.Function):
    """What CUDA's RMS norm keeps: its input in float32, and one number for each row.

    A CPU's keeps three times as much.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x.float(), x.float().square().mean(-1, keepdim=True).rsqrt())
        return x.float() * weight

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        return d, d.flatten(0, -2).sum(0)


LLAMAS = [
    {"norm": "before"},
    {"norm": "behind", "kv_heads": 1},
    {"norm": "before", "kv_heads": 2, "qk_norm": False},
]


@pytest.mark.once
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("lora", [0, 8])
@pytest.mark.parametrize("fields", LLAMAS)
def test_a_training_of_chameleons_shape_holds_what_is_planned(
    checkpointing: Any, lora: int, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x, self.weight)
    )
    shape = Llama.Config(layers=4, width=256, head_size=64, mlp_width=688, seq_len=256, **fields)
    config = DecoderTrainingConfig(
        precision="bf16", activation_checkpointing=checkpointing, lora_rank=lora, batch_size=8
    )
    planned = training_memory(shaped(shape, 2048), config, gpus=1, micro_batch=4)
    measured = peak(lambda: Llama(shape, vocab_size=2048), config, 4, 2)
    assert planned.total == pytest.approx(measured, rel=0.1)


class Fused(torch.autograd.Function):
    """What a fused attention keeps: its inputs, its output, and a float32 for each row and head."""

    @staticmethod
    def forward(ctx: Any, q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor) -> Tensor:
        attended_BATE = torch.empty_like(q_BATE.transpose(1, 2).contiguous()).transpose(1, 2)
        sums_BAT = torch.empty(q_BATE.shape[:3], device=q_BATE.device)
        ctx.save_for_backward(q_BATE, k_BATE, v_BATE, attended_BATE, sums_BAT)
        return attended_BATE

    @staticmethod
    def backward(ctx: Any, d_BATE: Tensor) -> Any:
        return d_BATE, d_BATE, d_BATE


def in_training(layer: int, q_BATE: Tensor, k_BATE: Tensor, v_BATE: Tensor) -> Tensor:
    """Attention as a layer calls it: equally many heads of all, in the precision of the values."""
    shared = q_BATE.shape[1] // k_BATE.shape[1]
    if shared > 1:
        k_BATE, v_BATE = (x.repeat_interleave(shared, 1) for x in (k_BATE, v_BATE))
    return Fused.apply(*(x.to(v_BATE.dtype) for x in (q_BATE, k_BATE, v_BATE)))


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """bf16 autocast of CUDA, also on a machine without a GPU."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", dtype)
    torch.clear_autocast_cache()


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 10) and not torch.cuda.is_available(),
    reason="torch 2.9 asks the driver even about tensors without contents",
)
@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    "shape",
    [
        Transformer.Config(layers=4, width=256, seq_len=512),
        *(
            Llama.Config(layers=4, width=256, head_size=64, mlp_width=688, seq_len=512, **fields)
            for fields in LLAMAS
        ),
    ],
)
def test_what_autograd_keeps_on_cuda_is_counted(
    gpus: int, checkpointing: Any, shape: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without contents have CUDA's precisions; weights that FSDP gathers are bf16."""
    monkeypatch.setattr(Model, "reset_parameters", lambda self: None)  # no contents to draw
    kept: dict[int, Any] = {}
    build = Llama if isinstance(shape, Llama.Config) else Transformer
    with FakeTensorMode(), torch.device("cuda"):
        model = build(shape, vocab_size=512)
        if gpus > 1:
            for module in model.modules():
                for name, weight in list(module.named_parameters(recurse=False)):
                    gathered = torch.empty_like(weight, dtype=torch.bfloat16)
                    setattr(module, name, torch.nn.Parameter(gathered))
            # As FSDP does: a layer's input in the precision of its weights.
            for block in model.blocks:
                block.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(), *args[1:]))

        recompute(model, checkpointing)
        own = {weight.untyped_storage()._cdata for weight in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        with cuda_autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden(torch.zeros(2, 512, dtype=torch.int64), attend=in_training)

    config = DecoderTrainingConfig(
        precision="bf16", activation_checkpointing=checkpointing, batch_size=16
    )
    planned = training_memory(shaped(shape, 512), config, gpus=gpus, micro_batch=2)

    # On one GPU autocast's copies of the layers' weights are kept too, where nothing is recomputed.
    copies = 0
    if gpus == 1 and checkpointing == "none":
        copies = 2 * parameters(shaped(shape, 512)).blocks
    found = sum(each.nbytes() for each in kept.values())
    assert planned.activations + copies == pytest.approx(found, rel=0.02)


def test_shards_share_what_is_kept() -> None:
    model = shaped(Transformer.Config(layers=32, width=4096, head_size=128), 65_536)
    config = DecoderTrainingConfig(batch_size=2048, activation_checkpointing="full")
    eight, many = (training_memory(model, config, gpus=gpus, micro_batch=1) for gpus in (8, 512))

    # float32 weights and gradients, and two float32 moments, shared by 8 GPUs.
    total = parameters(model).total
    shares = (eight.weights, eight.gradients, eight.optimizer)
    assert shares == (4 * total / 8, 4 * total / 8, 8 * total / 8)
    assert many.weights == eight.weights / 64
    assert many.activations == eight.activations

    # Two replicas on 16 GPUs are shared by 8 GPUs each.
    two_copies = DecoderTrainingConfig(batch_size=2048, activation_checkpointing="full", replicas=2)
    assert training_memory(model, two_copies, gpus=16, micro_batch=1) == eight

    assert eight.fits(80e9)
    assert not eight.fits(eight.total / USABLE - 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_gpu_holds_what_is_planned(checkpointing: Any) -> None:
    shape = Transformer.Config(layers=8, width=1024, seq_len=2048)
    config = DecoderTrainingConfig(
        precision="bf16", activation_checkpointing=checkpointing, batch_size=8
    )

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def new() -> Transformer:
        return Transformer(shape, vocab_size=32_768)

    # Two steps of two micro-batches: the optimizer's state is there in the second one.
    model = distributed(new, new, config, Ranks(torch.device("cuda")))
    optimizer = new_optimizer(model, config)
    for _ in range(2):
        for _ in range(2):
            ids_BT = torch.randint(32_768, (4, 2048), device="cuda")
            readout = loss_of(ids_BT)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(ids_BT, readout=readout)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    planned = training_memory(shaped(shape, 32_768), config, gpus=1, micro_batch=4)
    assert planned.total == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
