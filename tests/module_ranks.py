"""Train image tokenizers and an encoder for a few steps, alone or as one of several ranks.

A process of test_module_ranks.py, whose one argument is the folder to write to.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cm3leon.data.shuffle import RowStream
from cm3leon.registry import IMAGE_TOKENIZERS, RETRIEVERS, discover
from cm3leon.training.config import TrainingConfig
from cm3leon.training.distributed import Ranks, current_rank, joined
from cm3leon.training.parallel import replicate
from cm3leon.training.trainer import train
from cm3leon.weights import save_weights

SIDE, COUNT, BATCH, STEPS, CODES = 16, 24, 8, 4, 12
TOKENIZERS = {
    # Codes are moving averages, unused ones are moved onto vectors of any rank, and a discriminator
    # has its adaptive weight.
    "adversarial": {
        "name": "vqgan",
        "quantizer": "ema",
        "revive_below": 0.9,
        "channels": 32,
        "multipliers": [1, 1],
        "residual_blocks": 1,
        "attention_levels": [],
        "z_channels": 32,
        "adversarial_start": 1,
        "discriminator_channels": 32,
        "discriminator_layers": 2,
    },
    # Unused codes are moved onto vectors drawn by their distance among those of all ranks.
    "far": {
        "name": "vq",
        "revive_far": True,
        "revive_below": 0.5,
        "channels": 8,
        "downsampling": 4,
    },
}
CLIP = {"architecture": None, "image_size": SIDE, "patch_size": 8, "width": 32, "layers": 1}


def modules() -> Iterator[tuple[str, nn.Module]]:
    """What is trained, by name; the seed decides the first weights."""
    for name, section in TOKENIZERS.items():
        torch.manual_seed(1)
        size = {"image_size": SIDE, "codebook_size": CODES, "decay": 0.3, "code_dim": 4}
        yield name, IMAGE_TOKENIZERS.build({**section, **size}).training_module()
    torch.manual_seed(1)
    encoder = {**CLIP, "embed_dim": 16, "context_length": 8}
    yield "clip", RETRIEVERS.build({"name": "dense", "encoder": encoder}).encoder


def train_all(folder: Path, ranks: Ranks) -> None:
    """Train each module for a few steps; the first rank keeps its weights."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)
    texts = [f"number {number}" for number in range(COUNT)]
    fields: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "warmup_steps": 1}
    fields |= {"learning_rate": 0.001, "log_every": 1, "checkpoint_every": 2}
    config = TrainingConfig(**fields, precision="float32")

    for name, module in modules():

        def loss(module: Any, rows: np.ndarray, name: str = name) -> Any:
            pixels = torch.from_numpy(images[rows])
            if name == "clip":
                return module.loss([texts[row] for row in rows], pixels)
            return module.loss(pixels)

        # Each rank takes its share of the same rows, so that together they see what one process
        # sees.
        stream = RowStream(
            COUNT,
            lambda rows: rows,
            batch_size=BATCH,
            seed=0,
            share=(ranks.rank, ranks.count),
        )
        replicate(module, ranks)
        train(
            module,
            loss,
            stream,
            config,
            folder=folder / name,
            device=ranks.device,
            seed=0,
            title=name,
            clipped=getattr(module, "networks", ()),
            ranks=ranks,
        )

        # The others wait, so that none begins the next module before these weights are written.
        if ranks.first:
            save_weights(folder / name / "model.safetensors", module)
        ranks.barrier()


def main(words: list[str]) -> int:
    torch.set_num_threads(1)
    discover()
    with joined(current_rank(), 60) as together:
        train_all(Path(words[0]), together)
    return 0
