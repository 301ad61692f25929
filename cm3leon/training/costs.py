"""The FLOPs of a training step, and the peaks of devices that they are a share of (MFU)."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from cm3leon.models.base import Model


class Gpu(NamedTuple):
    """A device by its datasheet."""

    words: str
    """Words of its name in CUDA."""
    memory: float
    """Bytes."""
    peak: float
    """Dense bf16 FLOP/s, accumulated in float32."""
    bandwidth: float
    """Bytes a second from its own memory."""
    link: float
    """Bytes a second to the other GPUs of its node, one way: over NVLink, or PCIe without it."""


GPUS = {
    "a100_40": Gpu("A100 40GB", 40e9, 312e12, 1555e9, 300e9),
    "a100": Gpu("A100", 80e9, 312e12, 2039e9, 300e9),
    "h100_pcie": Gpu("H100 PCIe", 80e9, 756e12, 2000e9, 64e9),
    "h100": Gpu("H100", 80e9, 989.4e12, 3350e9, 450e9),
    "h100_nvl": Gpu("H100 NVL", 94e9, 835.5e12, 3900e9, 64e9),
    "h200": Gpu("H200", 141e9, 989.4e12, 4800e9, 450e9),
    "gh200": Gpu("GH200", 96e9, 989.4e12, 4000e9, 450e9),
    "l40s": Gpu("L40S", 48e9, 362.05e12, 864e9, 32e9),
    "a10g": Gpu("A10G", 24e9, 70e12, 600e9, 32e9),
    "l4": Gpu("L4", 24e9, 121e12, 300e9, 32e9),
    "rtx3090": Gpu("RTX 3090", 24e9, 71e12, 936e9, 32e9),
    "rtx4090": Gpu("RTX 4090", 24e9, 165.2e12, 1008e9, 32e9),
}
"""From NVIDIA's datasheets and architecture whitepapers. If the words of two entries fit a device,
the longer ones count."""


def model_flops(model: Model, sample_BT: Tensor) -> float:
    """Forward and backward FLOPs of a batch, without anything computed twice.

    6 for each matrix weight and token (2 forward, 4 backward; padding is not counted), and for
    attention 6 L A E times the squared length of each sample, with A heads of queries of E numbers:
    its tokens attend to half of it on average. Fewer heads of keys and values make smaller
    matrices, and no fewer of these products. PaLM's formula (arXiv 2204.02311, appendix B) counts
    whole blocks, 12 L A E T a token, whatever is masked.
    """
    rows_B = torch.arange(len(sample_BT), device=sample_BT.device) * (int(sample_BT.max()) + 1)
    numbers_BT = torch.where(
        sample_BT >= 0, sample_BT + rows_B[:, None], -1
    )  # none has the same in two rows
    numbers_N, length_N = torch.unique_consecutive(numbers_BT.flatten(), return_counts=True)
    real_N = length_N[numbers_N >= 0].double()
    attention = 6 * _attention_width(model) * float(real_N.square().sum())
    return 6 * model.matrix_weights * float(real_N.sum()) + attention


def flops_per_token(model: Model) -> float:
    """Forward and backward FLOPs of a token of a block that is one sample; attention costs less in
    shorter samples."""
    return 6 * model.matrix_weights + 6 * _attention_width(model) * model.seq_len


def _attention_width(model: Model) -> int:
    """Width of all query heads, summed over the layers."""
    return model.config.layers * model.heads * model.config.head_size


def peak_flops(device: torch.device, ranks: int) -> float | None:
    """Peak FLOP/s of this many devices of one kind together; None if it is not known."""
    if device.type != "cuda":
        return None
    # Whole words: an L40 is not an L4.
    words = re.split("[ -]", torch.cuda.get_device_name(device))
    known = [gpu for gpu in GPUS.values() if set(gpu.words.split()).issubset(words)]
    if not known:
        return None
    return max(known, key=lambda gpu: len(gpu.words)).peak * ranks
