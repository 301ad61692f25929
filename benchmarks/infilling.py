"""Guidance of infilled halves on a trained run's held-out split, by several unconditional streams.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/infilling.py runs/digits

The judge of digits says which completed images it reads as the digit of their caption. Guidance
needs a stream in which the caption is masked, too. Three of them are compared, here with I7 and I2
as the upper half, while the lower one is asked for:

    half <mask:0>, caption <mask:1>   <mask:1> <break> I7 I2 <mask:0> <eos> <mask:0>
    caption <mask:0>, half <mask:1>   <mask:0> <break> I7 I2 <mask:1> <eos> <mask:1>
    the same, after an empty caption  <mask:0> <break> I7 I2 <mask:1> <eos> <mask:0> <end> <mask:1>

The first is the task's own, in which the half has the same mask as in the prompt. The others number
masks in the order of the document, as training does, and the last one also answers them in order.
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
    """Call the caption `<mask:0>`, and the half, which the stream ends in, `<mask:1>`."""
    assert prompt.unconditional_T is not None
    ids_T = prompt.unconditional_T
    zero, one = vocab.sentinel(0), vocab.sentinel(1)
    swapped_T = np.where(ids_T == zero, one, np.where(ids_T == one, zero, ids_T))
    return replace(prompt, unconditional_T=swapped_T)


def after_an_empty_caption(prompt: Prompt, vocab: Vocab) -> Prompt:
    """Do so too, and answer the caption before the half, with an empty text."""
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
        """The share of the completed images that the judge reads as their captions say."""
        right = []
        for sample in range(samples):
            # Samples are far enough apart that no two images have the same seed.
            first = sample * 1_000_003
            seeds = range(first, first + len(prompts))
            with m._computing():
                found = generate(
                    m.run.model, prompts, DECODERS.build(decoder), vocab=m.run.vocab, seeds=seeds
                )

            codes = []
            for document, answer in zip(documents, found, strict=True):
                codes.append(m.run.tokenizer.codes(task.complete(document, answer)))
            codes_NK = np.stack(codes)
            right.append(judge.read(tokenizer.decode(codes_NK)) == labels_N)
        return f"{np.mean(right):.1%}"

    print(f"{len(rows)} halves, {args.samples} samples each\n")
    print("| half | stream | greedy | 1 | 1.5 | 2 | 3 | CD-K |\n|---|---|---|---|---|---|---|---|")
    for half in ("infill_top", "infill_bottom"):
        task = TASKS.build(half, vocab=m.run.vocab, grid=m.run.grid)
        prompts = [task.prompt(document) for document in documents]

        # Without guidance there is no unconditional stream, so these are the same for all three.
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
