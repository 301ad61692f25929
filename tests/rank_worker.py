"""One rank of a small training, run as a process by tests/test_distributed.py.

Its one argument is a JSON object: {"folder": ..., "fields": {...}, "pause": 0.1}. Other keys choose
the model, its first weights, and what is written down; `main` reads each of them once.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counted import Collectives, HostReads, seen

from cm3leon.io import write_json
from cm3leon.objectives.block_stream import BlockStream
from cm3leon.objectives.packing import PackingConfig
from cm3leon.registry import MODELS, OBJECTIVES, discover
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.training.config import DecoderTrainingConfig
from cm3leon.training.distributed import current_rank, joined
from cm3leon.training.parallel import distributed, whole_state
from cm3leon.training.prefetch import BatchSplit
from cm3leon.training.trainer import train
from cm3leon.types import Again, Sample, TokenDocument, TokenSegment
from cm3leon.weights import save_weights

VOCAB = Vocab(text_size=40, image_size=16, sentinels=8)
SEQ_LEN = 48
SHAPE: dict[str, Any] = {
    "layers": 2,
    "width": 32,
    "head_size": 16,
    "seq_len": SEQ_LEN,
    "init_std": 0.05,
}


def draw(position: int, rng: np.random.Generator) -> Sample:
    text = TokenSegment("text", rng.integers(8, 40, size=rng.integers(2, 9)))
    image = TokenSegment("image", 40 + rng.integers(16, size=12))
    return Sample(TokenDocument(f"document {position}", (text, image)))


def not_called() -> Any:
    """Stand in for the function that builds a whole model, where no rank may need it."""
    raise AssertionError("ranks make their own shards")


def main(words: list[str]) -> int:
    options: dict[str, Any] = json.loads(words[0])
    torch.set_num_threads(1)
    discover()

    folder = Path(options["folder"])
    fields = {"steps": 8, "batch_size": 4, "warmup_steps": 2, "learning_rate": 0.01, "log_every": 1}
    fields |= {"checkpoint_every": 2, "precision": "float32", "timeout_seconds": 60}
    config = DecoderTrainingConfig(**{**fields, **options.get("fields", {})})
    objective: Any = OBJECTIVES.build("cm3", vocab=VOCAB)

    def new_model() -> Any:
        torch.manual_seed(1)
        return MODELS.build(
            {"name": options.get("model", "cm3leon"), **SHAPE}, vocab_size=VOCAB.size
        )

    # Each micro-batch notes what was read and sent until it began.
    reads, collectives = HostReads(), Collectives()
    counted: list[Any] = []

    def loss(model: Any, batch: Any) -> Any:
        time.sleep(options.get("pause", 0))
        counted.append(seen(reads, collectives))
        return model(
            batch.ids_BT,
            position_BT=batch.position_BT,
            sample_BT=batch.sample_BT,
            readout=lambda hidden_BTD, head: objective.loss(
                hidden_BTD, head, batch, z_loss=config.z_loss
            ),
        )

    with joined(current_rank(), config.timeout_seconds) as ranks:
        stream = BlockStream(
            draw,
            objective,
            PackingConfig(method="stream"),
            seq_len=SEQ_LEN,
            batch_size=config.blocks(SEQ_LEN),
            seed=0,
            device=ranks.device,
            rank=ranks.rank,
            ranks=ranks.count,
        )

        # Only the default model says how its weights begin, so that each rank can draw its shards.
        state = None
        if options.get("drawn", True):
            state = torch.Generator().manual_seed(1).get_state()
        drawn = state is not None and "model" not in options
        model = distributed(
            not_called if drawn else new_model,
            new_model,
            config,
            ranks,
            random_state=state,
            weights=Path(options["weights"]) if "weights" in options else None,
        )

        # Asked only for the first weights: stop before any training.
        if options.get("only_first"):
            first_weights = whole_state(model)
            if ranks.first:
                save_weights(folder / "model.safetensors", first_weights)
            return 0

        split = BatchSplit(
            parts=lambda batch: batch.split(config.micro_batch or len(batch.ids_BT)),
            weight=lambda part: float(part.weight_BT.sum()),
            ids=lambda _: stream.ids(stream.drawn),
        )
        where: dict[str, Any] = {
            "folder": folder,
            "device": ranks.device,
            "seed": 0,
            "title": "tiny",
        }

        try:
            with reads, collectives:
                train(model, loss, stream, config, **where, split=split, ranks=ranks)
        except Again as again:
            print(again)
            return 75

        # One entry per micro-batch: what this rank had read and sent when it began.
        if options.get("counts"):
            write_json(folder / f"counts_{ranks.rank}.json", counted)
        weights = whole_state(model)
        if ranks.first:
            save_weights(folder / "model.safetensors", weights)
    return 0
