"""Several codes a step on a trained run: steps saved, time, and whether images stay the same.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/drafts.py runs/digits

A step computes the next code and, behind it, drafts, of which it takes as many as turn out right
(see `Engine`). Images of held-out captions are drawn some at a time, under several windows in turn.
They are compared with those of the first window, which is 1 by default: bf16 rounds products of
another size differently, so that a few images may differ. The judge of digits reads all of them.
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
    run, labels = m.run, m.run.corpus.labels
    train = run.corpus.rows("train")
    judge = Judge(run.corpus.images_BHWC[train], np.array([labels[row] for row in train]))

    # Captions come again if there are fewer of them than images.
    rows = np.resize(run.corpus.rows("held_out"), args.images)
    labels_B = np.array([labels[row] for row in rows])
    task: Any = m._task("text_to_image")
    prompts = []
    for row in rows:
        caption = required(run.token_documents[row], "text")
        prompts.append(task.prompt(TokenDocument("q", (caption,))))

    codes = run.image_tokenizer.grid**2
    print(f"{args.images} images of {codes} codes, guidance {args.cfg:g}, ", end="")
    print(f"top-p {args.top_p:g}, {args.precision}\n")
    print("| at once | window | steps | codes a step | images/s | the same | read right |")
    print("|---|---|---|---|---|---|---|")

    # The first call of a process is slower, and is not counted.
    draw(m, prompts[:8], 1, 1, args)
    for at_once in args.at_once:
        plain: list[list[int]] = []
        for window in args.windows:
            start = time.perf_counter()
            images, steps = draw(m, prompts, at_once, window, args)
            rate = len(images) / (time.perf_counter() - start)

            plain = plain or images
            same = np.mean([one == other for one, other in zip(images, plain, strict=True)])
            codes_BN = run.vocab.image_codes(np.array(images))
            right = (judge.read(run.image_tokenizer.decode(codes_BN)) == labels_B).mean()
            a_step = codes * len(images) / at_once / steps
            print(
                f"| {at_once} | {window} | {steps} | {a_step:.2f} | {rate:.1f} "
                f"| {same:.1%} | {right:.1%} |",
                flush=True,
            )


def draw(
    m: CM3Leon, prompts: list[Any], at_once: int, window: int, args: argparse.Namespace
) -> tuple[list[list[int]], int]:
    """The tokens of each prompt's image, and the number of steps that all of them took."""
    decoder = DECODERS.build({"name": "top_p", "cfg": args.cfg, "top_p": args.top_p})
    images: list[list[int]] = []
    steps = 0
    for first in range(0, len(prompts), at_once):
        # The seed of an image is its index, so that windows and batches draw the same ones.
        requests = []
        for seed, prompt in enumerate(prompts[first : first + at_once], start=first):
            request = request_for(
                prompt, decoder, vocab=m.run.vocab, seeds=[seed], seq_len=m.run.seq_len
            )
            requests.append(request)

        with m._computing():
            shape = shape_for(m.run.model, requests, window=window)
            engine = Engine(m.run.model, m.run.vocab, shape, window=window)
            for request in requests:
                engine.submit(request)
            answers = sorted(engine.run(), key=lambda answer: answer.ticket)
        images += [answer.tokens for answer in answers]
        steps += engine.steps
    return images, steps


if __name__ == "__main__":
    main()
