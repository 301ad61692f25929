"""Model FLOPs against a count of the operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cm3leon.models.transformer import Transformer
from cm3leon.training.costs import matrix_weights, model_flops, peak_flops

CONFIG = Transformer.Config(layers=3, width=64, head_size=16, seq_len=32)


def test_matrix_weights_are_those_of_the_module() -> None:
    model = Transformer(CONFIG, vocab_size=128)
    tables = model.embedding.weight.numel() + model.positions.weight.numel()
    assert (
        matrix_weights(CONFIG, 128) == sum(weight.numel() for weight in model.parameters()) - tables
    )


def test_flops_of_a_whole_block_as_torch_counts_them() -> None:
    """Torch counts attention as if nothing were masked: twice our count; and backward 2.5 times forward, for us 2."""
    model, sample_BT = Transformer(CONFIG, vocab_size=128), torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counted:
        model(torch.zeros(2, 32, dtype=torch.int64)).sum().backward()
    products = counted.get_flop_counts()["Global"]
    by_products = sum(n for operator, n in products.items() if operator == torch.ops.aten.mm)
    attention = 6 * 3 * 64 * 2 * 32**2
    # The gradient of the first layer's input is needed for the embeddings: all products have their three parts.
    assert by_products == model_flops(CONFIG, 128, sample_BT) - attention


def test_samples_are_counted_alone_and_padding_not_at_all() -> None:
    one = model_flops(CONFIG, 128, torch.zeros(1, 10, dtype=torch.int64))
    other = model_flops(CONFIG, 128, torch.zeros(1, 6, dtype=torch.int64))
    packed_BT = torch.tensor([[0] * 10 + [1] * 6 + [-1] * 4, [0] * 6 + [-1] * 14])
    assert model_flops(CONFIG, 128, packed_BT) == pytest.approx(one + 2 * other)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA L40", None),
        ("Something else", None),
    ],
)
def test_peaks_by_the_name_of_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), 2) == (peak and 2 * peak)
    assert peak_flops(torch.device("cpu"), 2) is None
