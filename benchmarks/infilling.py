"""Guidance of infilled halves on a trained run's held-out split, by several unconditional streams.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/infilling.py runs/digits

The digits' judge says which completed images are read as the digit of their caption. Beside the stream
that the task has (the half keeps `<mask:0>`, the caption's mask is `<mask:1>`) stand two that number
their sentinels in the order of the document.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cm3leon import CM3Leon
from cm3leon.decoders.generate import generate
from cm3leon.evaluation.judge import Judge
from cm3leon.registry import DECODERS, TASKS
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Prompt

GUIDED: list[dict[str, Any]] = [
    {"name": "top_p", "cfg": 1.5},
    {"name": "top_p", "cfg": 2.0},
    {"name": "top_p", "cfg": 3.0},
    {"name": "cd_k"},
]


def in_order(prompt: Prompt, vocab: Vocab) -> Prompt:
    """The caption is `<mask:0>` and the half `<mask:1>`, which the stream ends in."""
    assert prompt.unconditional_T is not None
    ids_T = prompt.unconditional_T
    zero, one = vocab.sentinel(0), vocab.sentinel(1)
    swapped_T = np.where(ids_T == zero, one, np.where(ids_T == one, zero, ids_T))
    return replace(prompt, unconditional_T=swapped_T)


def after_an_empty_caption(prompt: Prompt, vocab: Vocab) -> Prompt:
    """The same, with an empty answer for the caption before the half's, as training orders answers."""
    ids_T = in_order(prompt, vocab).unconditional_T
    assert ids_T is not None
    empty = [vocab.sentinel(0), vocab.end_of_span]
    return replace(prompt, unconditional_T=np.concatenate([ids_T[:-1], empty, ids_T[-1:]]))


STREAMS: dict[str, Callable[[Prompt, Vocab], Prompt]] = {
    "half <mask:0>, caption <mask:1>": lambda prompt, vocab: prompt,
    "caption <mask:0>, half <mask:1>": in_order,
    "the same, after an empty caption": after_an_empty_caption,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--samples", type=int, default=3)
    args = parser.parse_args()
    m = CM3Leon.load(args.run)
    corpus, tokenizer = m.run.corpus, m.run.image_tokenizer
    train, rows = corpus.rows("train"), corpus.rows("held_out")
    judge = Judge(corpus.images_BHWC[train], np.array([corpus.labels[row] for row in train]))
    labels_N = np.array([corpus.labels[row] for row in rows])
    documents = [m.run.token_documents[row] for row in rows]

    def read_right(task: Any, prompts: list[Prompt], decoder: dict[str, Any], samples: int) -> str:
        right = []
        for sample in range(samples):
            seeds = range(sample * 1_000_003, sample * 1_000_003 + len(prompts))
            with m._computing():
                found = generate(
                    m.run.model, prompts, DECODERS.build(decoder), vocab=m.run.vocab, seeds=seeds
                )
            completed = [task.complete(*pair) for pair in zip(documents, found, strict=True)]
            codes_NK = np.stack([m.run.tokenizer.codes(document) for document in completed])
            right.append(judge.read(tokenizer.decode(codes_NK)) == labels_N)
        return f"{np.mean(right):.1%}"

    print(f"{len(rows)} halves, {args.samples} samples each\n")
    print("| half | stream | greedy | 1 | 1.5 | 2 | 3 | CD-K |\n|---|---|---|---|---|---|---|---|")
    for half in ("infill_top", "infill_bottom"):
        task = TASKS.build(half, vocab=m.run.vocab, grid=m.run.grid)
        prompts = [task.prompt(document) for document in documents]
        unguided = [
            read_right(task, prompts, {"name": "greedy"}, 1),
            read_right(task, prompts, {"name": "top_p", "cfg": 1.0}, args.samples),
        ]
        for name, stream in STREAMS.items():
            asked = [stream(prompt, m.run.vocab) for prompt in prompts]
            guided = [read_right(task, asked, decoder, args.samples) for decoder in GUIDED]
            print("| " + " | ".join([half, name, *unguided, *guided]) + " |", flush=True)


if __name__ == "__main__":
    main()
