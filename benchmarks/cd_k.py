"""Settings of CD-K on a trained run's validation split, beside top-p and the mixture.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/cd_k.py runs/digits

Every validation caption is drawn `--samples` times under each setting. The digits' judge says which images are read as
the digit that was asked for; the Fréchet distance is that of its features (mean grey of 8x8 cells) to the
reconstructions of all real images, so that the image tokenizer's part is out of it.
"""

from __future__ import annotations

import argparse
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
    rows = np.repeat(corpus.rows("validation"), args.samples)
    labels_N = np.array([corpus.labels[row] for row in rows])
    task: Any = m._task("text_to_image")
    prompts = [
        task.prompt(TokenDocument("q", (required(m.run.token_documents[row], "text"),)))
        for row in rows
    ]
    settings: list[dict[str, Any]] = [
        {"name": "top_p", "cfg": cfg, "top_p": 0.9} for cfg in (1, 2, 3)
    ]
    settings += [
        {"name": "cd_k", "alpha": alpha, "k": k, "temperature": temperature}
        for temperature in args.temperature
        for k in args.k
        for alpha in args.alpha
    ]
    print(
        f"{len(rows)} images a setting\n\n| setting | read right | Fréchet distance |\n|---|---|---|"
    )
    for setting in settings:
        with m._computing():
            codes = generate(
                m.run.model,
                prompts,
                DECODERS.build(setting),
                vocab=m.run.vocab,
                seeds=range(len(prompts)),
            )
        images_NHWC = tokenizer.decode(m.run.vocab.image_codes(np.stack(codes)))
        right = (judge.read(images_NHWC) == labels_N).mean()
        distance = frechet_distance(judge._features(images_NHWC), real_NF)
        name = ", ".join(
            f"{key} {value}" if key != "name" else value for key, value in setting.items()
        )
        print(f"| {name} | {right:.1%} | {distance:.4f} |", flush=True)


if __name__ == "__main__":
    main()
