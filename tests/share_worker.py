"""One of three ranks that share decoders, run as a process by tests/test_serving.py: answers and log-likelihoods."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from test_decoders import SEQ_LEN, VOCAB, model, prompts

from cm3leon.decoders.generate import generate
from cm3leon.decoders.score import log_likelihoods
from cm3leon.models.llama import Llama
from cm3leon.models.serving import share
from cm3leon.registry import DECODERS
from cm3leon.training.distributed import current_rank, joined


def decoders() -> dict[str, Any]:
    """The paper's decoder with three heads, and Llama's with six of queries and three of keys and values."""
    config = Llama.Config(
        layers=2, width=48, head_size=8, kv_heads=3, mlp_width=36, seq_len=SEQ_LEN, norm="behind"
    )
    llama = Llama(config, vocab_size=VOCAB.size).eval()
    generator = torch.Generator().manual_seed(5)
    for weight in llama.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return {"cm3leon": model(5), "llama": llama}


def results(module: Any) -> dict[str, Any]:
    """What a decoder answers, alone or shared."""
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


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    with joined(current_rank(), 60) as ranks:
        for name, module in decoders().items():
            share(module, rank=ranks.rank, count=ranks.count)
            found[name] = {**results(module), **held(module)}
    if ranks.first:
        print(json.dumps(found))


def held(module: Any) -> dict[str, int]:
    """Numbers that a rank keeps: weights of matrices, and bytes of a small cache."""
    matrices = [getattr(block, name) for block in module.blocks for name in module.matrices]
    return {
        "weights": sum(matrix.weight.numel() for matrix in matrices),
        "cache": module.cache_bytes(groups=1, width=1, prefix=1, tail=1),
    }


if __name__ == "__main__":
    sys.exit(main())
