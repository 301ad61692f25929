"""Several codes a step on a trained run: steps saved, time, and whether images stay the same.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/drafts.py runs/digits

A step computes the next code and, behind it, drafts, and takes as many of them as turn out right; see `Engine`.
Held-out captions are drawn some at a time, under several windows in turn. Images are compared with those of a window of
one: bf16 rounds products of another size differently, so that a few may differ. The digits' judge reads them all.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from cm3leon import CM3Leon
from cm3leon.decoders.engine import Engine
from cm3leon.decoders.generate import request_for
from cm3leon.decoders.request import shape_for
from cm3leon.evaluation.judge import Judge
from cm3leon.registry import DECODERS
from cm3leon.tasks.base import required
from cm3leon.types import TokenDocument


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--images", type=int, default=360)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--precision", choices=("auto", "float32"), default="auto")
    args = parser.parse_args()
    m = CM3Leon.load(args.run, precision=args.precision)
    run = m.run
    rows = np.resize(run.corpus.rows("held_out"), args.images)
    task: Any = m._task("text_to_image")
    prompts = [
        task.prompt(TokenDocument("q", (required(run.token_documents[row], "text"),)))
        for row in rows
    ]
    train = run.corpus.rows("train")
    judge = Judge(
        run.corpus.images_BHWC[train], np.array([run.corpus.labels[row] for row in train])
    )
    labels = np.array([run.corpus.labels[row] for row in rows])
    codes = run.image_tokenizer.grid**2
    print(
        f"{args.images} images of {codes} codes, guidance {args.cfg:g}, top-p {args.top_p:g}, {args.precision}\n"
    )
    print(
        "| at once | window | steps | codes a step | images/s | the same | read right |\n|---|---|---|---|---|---|---|"
    )
    draw(m, prompts[:8], 1, 1, args)  # not counted
    for at_once in args.at_once:
        plain: list[list[int]] = []
        for window in args.windows:
            start = time.perf_counter()
            images, steps = draw(m, prompts, at_once, window, args)
            rate = len(images) / (time.perf_counter() - start)
            plain = plain or images
            same = np.mean([one == other for one, other in zip(images, plain, strict=True)])
            ids_BN = run.vocab.image_codes(np.array(images))
            right = (judge.read(run.image_tokenizer.decode(ids_BN)) == labels).mean()
            a_step = codes * len(images) / at_once / steps
            print(
                f"| {at_once} | {window} | {steps} | {a_step:.2f} | {rate:.1f} | {same:.1%} | {right:.1%} |",
                flush=True,
            )


def draw(
    m: CM3Leon, prompts: list[Any], at_once: int, window: int, args: argparse.Namespace
) -> tuple[list[list[int]], int]:
    """The images' tokens, and the steps that they took."""
    decoder = DECODERS.build({"name": "top_p", "cfg": args.cfg, "top_p": args.top_p})
    images: list[list[int]] = []
    steps = 0
    for first in range(0, len(prompts), at_once):
        requests = [
            request_for(
                prompt, decoder, vocab=m.run.vocab, seeds=[first + place], seq_len=m.run.seq_len
            )
            for place, prompt in enumerate(prompts[first : first + at_once])
        ]
        with m._computing():
            engine = Engine(
                m.run.model,
                m.run.vocab,
                shape_for(m.run.model, requests, window=window),
                window=window,
            )
            for request in requests:
                engine.submit(request)
            images += [
                answer.tokens for answer in sorted(engine.run(), key=lambda answer: answer.ticket)
            ]
        steps += engine.steps
    return images, steps


if __name__ == "__main__":
    main()
