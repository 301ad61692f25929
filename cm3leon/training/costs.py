"""What a training step computes, and what devices can: model FLOPs, and the peaks that they are a share of (MFU)."""

from __future__ import annotations

import torch
from torch import Tensor

from cm3leon.models.transformer import Transformer

PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "L40S": 362.05e12,
    "A10G": 70e12,
    "L4": 121e12,
}
"""Dense bf16 FLOP/s by NVIDIA's datasheets, by words of the device's name; of two that fit, the longer one holds."""


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
    numbers_BT = torch.where(sample_BT >= 0, sample_BT + rows_B[:, None], -1)  # none has the same in two rows
    numbers_N, length_N = torch.unique_consecutive(numbers_BT.flatten(), return_counts=True)
    real_N = length_N[numbers_N >= 0].double()
    attention = 6 * config.layers * config.width * float(real_N.square().sum())
    return 6 * matrix_weights(config, vocab_size) * float(real_N.sum()) + attention


def peak_flops(device: torch.device, ranks: int) -> float | None:
    """Peak of as many devices of this kind together; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [word for word in PEAKS if all(part in name for part in word.split())]
    return PEAKS[max(known, key=len)] * ranks if known else None
