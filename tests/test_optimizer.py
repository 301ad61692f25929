"""Muon together with AdamW, training in float8, and what `precision: auto` chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cm3leon.config import from_mapping
from cm3leon.models.transformer import Transformer
from cm3leon.training import float8, muon, precision
from cm3leon.training.config import DecoderTrainingConfig, TrainingConfig
from cm3leon.training.distributed import Ranks
from cm3leon.training.float8 import check_device, to_float8
from cm3leon.training.optimizer import new_optimizer, prime, set_rate
from cm3leon.training.parallel import distributed
from cm3leon.training.precision import chosen_precision, faster
from cm3leon.types import UserError

pytestmark = pytest.mark.stack

CPU = torch.device("cpu")


def small(**fields: Any) -> Transformer:
    torch.manual_seed(0)
    config = Transformer.Config(layers=2, width=32, head_size=16, seq_len=16, init_std=0.05)
    model = Transformer(config, vocab_size=48)
    nn.init.normal_(model.head.weight, std=0.05)
    return model


def gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


# --------------------------------------------------------------------------------------------- Muon


def test_muon_takes_the_layers_matrices_and_adamw_everything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same as both optimizers of torch, each over its own parameters.

    torch's Muon computes in bf16, so ours does here as well.
    """
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    rates = {"learning_rate": 0.02, "weight_decay": 0.1, "undecayed": ["positions"]}
    model, twin = small(), small()
    ours = new_optimizer(model, DecoderTrainingConfig(optimizer="muon", **rates))

    # The twin's layers go to torch's Muon, its tables and its head to torch's AdamW.
    inside = list(twin.blocks.parameters())
    outside = [twin.embedding.weight, twin.head.weight]
    theirs = torch.optim.Muon(inside, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": outside}, {"params": [twin.positions.weight], "weight_decay": 0.0}],
        lr=0.02,
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )

    for step in range(3):
        for each in (model, twin):
            gradients(each, step)
        for optimizer in (ours, theirs, adamw):
            set_rate(optimizer, 0.02 / (1 + step))
            optimizer.step()

    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("precision", ["auto", "bf16", "float32"])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24)])
def test_muon_moves_along_the_singular_vectors_of_the_momentum(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], precision: Any, native: bool
) -> None:
    """The reference is an SVD in float64, with the polynomial applied to the singular values."""
    torch.manual_seed(1)
    matrix = nn.Parameter(torch.zeros(shape))
    matrix.grad = torch.randn(shape)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    groups = [{"params": [matrix], "weight_decay": 0.0}]
    muon.ShardedMuon(groups, rate=1.0, precision=precision).step()

    # At the first step the momentum has the direction of the gradient. Each of
    # the five steps of the Newton-Schulz iteration applies this polynomial to the singular values.
    U, values, V = torch.linalg.svd(matrix.grad.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5

    expected = -0.2 * max(shape) ** 0.5 * (U * values @ V)
    error = (matrix.detach() - expected).norm() / expected.norm()

    # Products are in bf16 only if training is and the processor computes in it. What goes in and
    # comes out is rounded to bf16 by half a percent.
    if native and precision != "float32":
        assert 0.007 < error < 0.03
    else:
        assert error < 0.007


def test_a_step_of_muon_is_as_large_as_one_of_adamw() -> None:
    model, before = small(), small()
    optimizer = new_optimizer(model, DecoderTrainingConfig(optimizer="muon", learning_rate=0.01))
    gradients(model, 0)
    optimizer.step()
    for one, other in zip(model.blocks.parameters(), before.blocks.parameters(), strict=True):
        assert 0.1 < (one - other).square().mean().sqrt().item() / 0.01 < 0.3


def test_a_primed_muon_has_its_state_and_has_changed_nothing() -> None:
    model, before = small(), small()
    optimizer = new_optimizer(model, DecoderTrainingConfig(optimizer="muon"))
    prime(optimizer)

    kinds = {tuple(sorted(state)) for state in optimizer.state.values()}
    assert kinds == {("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step")}
    assert all(not tensor.any() for s in optimizer.state.values() for tensor in s.values())
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fields", [{"optimizer": "muon"}, {"precision": "float8"}])
def test_only_the_decoder_is_trained_by_muon_or_in_float8(fields: dict[str, Any]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(
        UserError, match=f"^x: {name} is {value}, which only the model's own training"
    ):
        from_mapping(TrainingConfig, fields, "x")
    from_mapping(DecoderTrainingConfig, fields, "x")


# ------------------------------------------------------------------------------------------- float8


def output_and_gradients(model: Transformer, ids_BT: Tensor) -> list[Tensor]:
    model.zero_grad()
    logits_BTV = model(ids_BT)
    nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT.flatten()).backward()
    return [logits_BTV.detach(), *(p.grad for p in model.blocks.parameters() if p.grad is not None)]


def test_float8_rounds_the_layers_products_and_nothing_else() -> None:
    """torchao's emulation gives results close to float32 and not equal to it.

    Weights and their names stay as they were.
    """
    pytest.importorskip("torchao")
    model, rounded = small(), small()
    to_float8(rounded, emulate=True)
    assert list(rounded.state_dict()) == list(model.state_dict())
    assert type(rounded.head) is nn.Linear
    assert all(type(block.qkv) is not nn.Linear for block in rounded.blocks)

    ids_BT = torch.randint(48, (2, 16))
    exact_tensors = output_and_gradients(model, ids_BT)
    found_tensors = output_and_gradients(rounded, ids_BT)
    for exact, found in zip(exact_tensors, found_tensors, strict=True):
        error = ((found - exact).norm() / exact.norm()).item()
        assert 0 < error < 0.25


def test_a_product_in_float8_is_that_of_operands_rounded_by_hand() -> None:
    """Each operand is scaled so that its largest entry is the largest number of float8 e4m3."""
    pytest.importorskip("torchao")
    model, rounded = small(), small()
    to_float8(rounded, emulate=True)

    def by_hand(tensor: Tensor) -> Tensor:
        scale = torch.finfo(torch.float8_e4m3fn).max / tensor.abs().max()
        return (tensor * scale).to(torch.float8_e4m3fn).float() / scale

    x_ND = torch.randn(16, 32)
    expected_NH = by_hand(x_ND) @ by_hand(model.blocks[0].up.weight.detach()).T
    torch.testing.assert_close(rounded.blocks[0].up(x_ND), expected_NH, atol=1e-4, rtol=1e-3)


def test_float8_is_refused_where_no_processor_computes_in_it() -> None:
    sentence = (
        "training.precision is float8, which needs an H100 or a newer GPU; take precision=bf16 here"
    )
    with pytest.raises(UserError, match=sentence):
        check_device(CPU)

    config = DecoderTrainingConfig(precision="float8")
    with pytest.raises(UserError, match=sentence):
        distributed(small, small, config, Ranks(CPU))


@pytest.mark.parametrize(("capability", "fits"), [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_float8_needs_the_capability_of_an_h100(
    capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (float8.missing(torch.device("cuda")) == "") is fits


def test_float8_of_odd_sizes_is_refused() -> None:
    pytest.importorskip("torchao")
    config = Transformer.Config(layers=1, width=24, head_size=12, seq_len=16)
    with pytest.raises(UserError, match=r"must be multiples of 16; choose another model\.width"):
        to_float8(Transformer(config, vocab_size=48), emulate=True)


# --------------------------------------------------------------------------------------------- auto


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that lets the CPU say which instructions for bf16 it has."""

    def says(*, avx512: bool = False, amx: bool = False) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    return says


def test_auto_goes_by_the_width_on_a_cpu(processor: Any) -> None:
    processor(avx512=True)
    assert [faster(CPU, width) for width in (64, 128, None)] == ["float32", "bf16", "bf16"]
    processor(avx512=True, amx=True)
    assert [faster(CPU, width) for width in (128, 256, None)] == ["float32", "bf16", "bf16"]
    processor()
    assert [faster(CPU, width) for width in (64, 4096, None)] == ["float32"] * 3


def test_a_resumed_training_keeps_what_auto_chose(tmp_path: Path, processor: Any) -> None:
    """It does so even on a machine where auto would choose another precision.

    A precision that is set outright is not written down.
    """
    processor(avx512=True)
    assert chosen_precision("auto", tmp_path, Ranks(CPU), width=64) == "float32"
    assert json.loads((tmp_path / precision.FILE).read_text()) == {"precision": "float32"}
    assert chosen_precision("auto", tmp_path, Ranks(CPU), width=4096) == "float32"

    assert chosen_precision("bf16", tmp_path / "other", Ranks(CPU)) == "bf16"
    assert not (tmp_path / "other").exists()


def test_an_older_training_goes_on_as_it_began(tmp_path: Path, processor: Any) -> None:
    """Before the choice was written down, it depended on the processor alone."""
    processor(avx512=True)
    (tmp_path / "step_00000010").mkdir()
    (tmp_path / "step_00000010" / "manifest.json").write_text("{}")
    assert chosen_precision("auto", tmp_path, Ranks(CPU), width=64) == "bf16"
