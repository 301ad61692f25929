"""One of two ranks that share a decoder, run as a process by tests/test_serving.py: answers and log-likelihoods."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from test_decoders import VOCAB, model, prompts

from cm3leon.decoders.generate import generate
from cm3leon.decoders.score import log_likelihoods
from cm3leon.models.serving import share
from cm3leon.registry import DECODERS
from cm3leon.training.distributed import current_rank, joined


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
    module = model(5)  # of three heads
    with joined(current_rank(), 60) as ranks:
        share(module, rank=ranks.rank, count=ranks.count)
        found = results(module)
        held = sum(weight.numel() for block in module.blocks for weight in block.parameters())
        if ranks.first:
            print(
                json.dumps(
                    {
                        **found,
                        "held": held,
                        "cache": module.cache_bytes(groups=1, width=1, prefix=1, tail=1),
                    }
                )
            )


if __name__ == "__main__":
    sys.exit(main())
