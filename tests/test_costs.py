"""Model FLOPs against a count of the operations, and the peaks of devices."""

from __future__ import annotations

import pytest
import torch

from cm3leon.models.base import Model
from cm3leon.models.llama import Llama
from cm3leon.models.transformer import Transformer
from cm3leon.training.costs import model_flops, peak_flops

SHAPE = {"layers": 3, "width": 64, "head_size": 16, "seq_len": 32, "attention": "naive"}


def decoders() -> dict[str, Model]:
    """One model of each kind; "llama, grouped" has half as many heads of keys and values."""
    grouped = Llama.Config(**SHAPE, mlp_width=88, kv_heads=2, norm="behind")
    return {
        "cm3leon": Transformer(Transformer.Config(**SHAPE), vocab_size=128),
        "llama": Llama(Llama.Config(**SHAPE, mlp_width=88), vocab_size=128),
        "llama, grouped": Llama(grouped, vocab_size=128),
    }


every_decoder = pytest.mark.parametrize(
    "model", [pytest.param(m, id=n) for n, m in decoders().items()]
)


@every_decoder
def test_samples_are_counted_alone_and_padding_not_at_all(model: Model) -> None:
    one = model_flops(model, torch.zeros(1, 10, dtype=torch.int64))
    other = model_flops(model, torch.zeros(1, 6, dtype=torch.int64))
    packed_BT = torch.tensor([[0] * 10 + [1] * 6 + [-1] * 4, [0] * 6 + [-1] * 14])
    assert model_flops(model, packed_BT) == pytest.approx(one + 2 * other)


def test_grouped_heads_make_smaller_matrices_alone() -> None:
    every, grouped = decoders()["llama"], decoders()["llama, grouped"]
    assert every.matrix_weights - grouped.matrix_weights == 3 * 2 * 64 * (64 - 32)
    assert grouped.matrix_weights == 3 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 88) + 64 * 128


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
