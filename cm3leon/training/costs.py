"""What a training step computes, and what devices can: model FLOPs, and the peaks that they are a share of (MFU)."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from cm3leon.models.transformer import Transformer


class Gpu(NamedTuple):
    """A device by its datasheet."""

    words: str
    """Words of its name by CUDA."""
    memory: float
    """Bytes."""
    peak: float
    """Dense bf16 FLOP/s, added up in float32."""
    link: float
    """Bytes a second to the other GPUs of its node, one way: NVLink, or PCIe where a node has no switch for that."""


GPUS = {
    "a100_40": Gpu("A100 40GB", 40e9, 312e12, 300e9),
    "a100": Gpu("A100", 80e9, 312e12, 300e9),
    "h100_pcie": Gpu("H100 PCIe", 80e9, 756e12, 64e9),
    "h100": Gpu("H100", 80e9, 989.4e12, 450e9),
    "h100_nvl": Gpu("H100 NVL", 94e9, 835.5e12, 64e9),
    "h200": Gpu("H200", 141e9, 989.4e12, 450e9),
    "gh200": Gpu("GH200", 96e9, 989.4e12, 450e9),
    "l40s": Gpu("L40S", 48e9, 362.05e12, 32e9),
    "a10g": Gpu("A10G", 24e9, 70e12, 32e9),
    "l4": Gpu("L4", 24e9, 121e12, 32e9),
    "rtx3090": Gpu("RTX 3090", 24e9, 71e12, 32e9),
    "rtx4090": Gpu("RTX 4090", 24e9, 165.2e12, 32e9),
}
"""By NVIDIA's datasheets and architecture whitepapers; of two whose words fit a device, the longer one holds."""


def matrix_weights(config: Transformer.Config, vocab_size: int) -> int:
    """Weights that each token is multiplied by: those of the layers and the head, not the embeddings."""
    layer = (3 + 1 + 2 * config.mlp_ratio) * config.width**2
    return config.layers * layer + config.width * vocab_size


def model_flops(config: Transformer.Config, vocab_size: int, sample_BT: Tensor) -> float:
    """Forward and backward FLOPs of a batch, without anything computed twice.

    6 for each matrix weight and token (2 forward, 4 backward; padding is not counted), and for attention 6 L D times
    the squared length of each sample: its tokens attend to half of it on average. PaLM's formula (arXiv 2204.02311,
    appendix B) counts whole blocks, 12 L D T a token, whatever is masked.
    """
    rows_B = torch.arange(len(sample_BT), device=sample_BT.device) * (int(sample_BT.max()) + 1)
    numbers_BT = torch.where(
        sample_BT >= 0, sample_BT + rows_B[:, None], -1
    )  # none has the same in two rows
    numbers_N, length_N = torch.unique_consecutive(numbers_BT.flatten(), return_counts=True)
    real_N = length_N[numbers_N >= 0].double()
    attention = 6 * config.layers * config.width * float(real_N.square().sum())
    return 6 * matrix_weights(config, vocab_size) * float(real_N.sum()) + attention


def flops_per_token(config: Transformer.Config, vocab_size: int) -> float:
    """Forward and backward FLOPs of a token of a block that is one sample; shorter samples take less for attention."""
    return (
        6 * matrix_weights(config, vocab_size) + 6 * config.layers * config.width * config.seq_len
    )


def peak_flops(device: torch.device, ranks: int) -> float | None:
    """Peak of as many devices of this kind together; None where it is not known."""
    if device.type != "cuda":
        return None
    words = re.split("[ -]", torch.cuda.get_device_name(device))  # whole words: an L40 is no L4
    known = [gpu for gpu in GPUS.values() if set(gpu.words.split()).issubset(words)]
    return max(known, key=lambda gpu: len(gpu.words)).peak * ranks if known else None
