"""Settings of CD-K on a trained run's validation split, beside top-p.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/cd_k.py runs/digits

Every validation caption is drawn `--samples` times under each setting. The judge of digits says
which images it reads as the digit that was asked for. The Fréchet distance is that of the judge's
features (mean grey of 8x8 cells) to the reconstructions of all training images rather than to the
images themselves, so that it does not count what the image tokenizer loses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from cm3leon import CM3Leon
from cm3leon.decoders.generate import generate
from cm3leon.evaluation.images import frechet_distance
from cm3leon.evaluation.judge import Judge
from cm3leon.registry import DECODERS
from cm3leon.tasks.base import required
from cm3leon.types import TokenDocument


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.01, 0.1, 0.3, 1.0])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    args = parser.parse_args()

    m = CM3Leon.load(args.run)
    corpus, tokenizer = m.run.corpus, m.run.image_tokenizer
    train = corpus.rows("train")
    judge = Judge(corpus.images_BHWC[train], np.array([corpus.labels[row] for row in train]))
    real_NF = judge._features(tokenizer.decode(tokenizer.encode(corpus.images_BHWC[train])))

    # Every setting is asked the same prompts with the same seeds.
    rows = np.repeat(corpus.rows("validation"), args.samples)
    labels_N = np.array([corpus.labels[row] for row in rows])
    task: Any = m._task("text_to_image")
    prompts = []
    for row in rows:
        caption = required(m.run.token_documents[row], "text")
        prompts.append(task.prompt(TokenDocument("q", (caption,))))

    print(f"{len(rows)} images a setting\n")
    print("| setting | read right | Fréchet distance |\n|---|---|---|")
    for setting in settings(args):
        with m._computing():
            codes = generate(
                m.run.model,
                prompts,
                DECODERS.build(setting),
                vocab=m.run.vocab,
                seeds=range(len(prompts)),
            )

        # The judge reads the decoded images, and the distance compares its features of them.
        images_NHWC = tokenizer.decode(m.run.vocab.image_codes(np.stack(codes)))
        right = (judge.read(images_NHWC) == labels_N).mean()
        distance = frechet_distance(judge._features(images_NHWC), real_NF)
        print(f"| {in_words(setting)} | {right:.1%} | {distance:.4f} |", flush=True)


def settings(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Settings of the decoders to compare: top-p first, then every combination for CD-K."""
    for cfg in (1, 2, 3):
        yield {"name": "top_p", "cfg": cfg, "top_p": 0.9}
    for temperature in args.temperature:
        for k in args.k:
            for alpha in args.alpha:
                yield {"name": "cd_k", "alpha": alpha, "k": k, "temperature": temperature}


def in_words(setting: dict[str, Any]) -> str:
    """A setting for the table, e.g. `cd_k, alpha 0.1, k 4, temperature 1.0`."""
    fields = [f"{key} {value}" for key, value in setting.items() if key != "name"]
    return ", ".join([setting["name"], *fields])


if __name__ == "__main__":
    main()
