"""One of three ranks that share models: their answers and log-likelihoods.

A process of tests/test_model_contracts.py, whose arguments are names of registered models.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from test_decoders import SEQ_LEN, VOCAB, prompts

from cm3leon.decoders.generate import generate
from cm3leon.decoders.score import log_likelihoods
from cm3leon.models.serving import share
from cm3leon.registry import DECODERS, MODELS, discover
from cm3leon.training.distributed import current_rank, joined

discover()


def new_model(name: str) -> Any:
    """A small model of a registered name that three ranks can share.

    It has six heads, and three of keys and values; each is divisible by the number of ranks.
    """
    shape = {"layers": 2, "width": 48, "head_size": 8, "kv_heads": 3, "mlp_width": 36}
    shape |= {"seq_len": SEQ_LEN, "init_std": 1}
    section = {key: value for key, value in shape.items() if MODELS.has_setting(name, key)}
    model = MODELS.build({"name": name, **section}, vocab_size=VOCAB.size).eval()

    generator = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return model


def results(module: Any) -> dict[str, Any]:
    """What a decoder and the scoring answer, whether the model is shared or not."""
    asked = prompts(2)
    answers = generate(
        module,
        asked,
        DECODERS.build({"name": "top_p", "cfg": 2}),
        vocab=VOCAB,
        seeds=range(len(asked)),
    )
    scores = log_likelihoods(module, [one.ids_T for one in asked], [np.arange(5, 9)] * len(asked))
    return {"answers": [answer.tolist() for answer in answers], "scores": scores}


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    found = {}
    with joined(current_rank(), 60) as ranks:
        for name in names:
            module = new_model(name)
            share(module, rank=ranks.rank, count=ranks.count)
            found[name] = {**results(module), **held(module)}
    if ranks.first:
        print(json.dumps(found))
    return 0


def held(module: Any) -> dict[str, int]:
    """How much this rank keeps: weights of matrices, and the bytes of a small cache."""
    matrices = [getattr(block, name) for block in module.blocks for name in module.matrices]
    return {
        "weights": sum(matrix.weight.numel() for matrix in matrices),
        "cache": module.cache_bytes(groups=1, width=1, prefix=1, tail=1),
    }
