"""Several codes a pass: speculative Jacobi decoding (arXiv 2410.01699) on a trained run, counted and judged.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/jacobi.py runs/digits

Drafts of the next codes are verified by one pass: the first draft x that is not accepted, with probability
min(1, p(x) / q(x)) for the model's p now and the q that it was drawn from, is drawn again from max(0, p - q), and those
behind it are drawn anew from p. Codes have the distribution of plain sampling. Passes are counted, not timed: one over
a few positions takes about as long as one over a single one where reading weights is what takes time. The same is run
under several windows; the judge of the digits says whether what is drawn is as good.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm3leon import CM3Leon
from cm3leon.decoders.decoders import TopP
from cm3leon.evaluation.judge import Judge
from cm3leon.tasks.base import required
from cm3leon.types import TokenDocument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--top-p", type=float, default=0.9)
    args = parser.parse_args()
    m = CM3Leon.load(args.run)
    run = m.run
    rows = run.corpus.rows("held_out")
    rows = np.resize(rows, args.images)
    task: Any = m._task("text_to_image")
    prompts = [task.prompt(TokenDocument("q", (required(run.token_documents[row], "text"),))) for row in rows]
    train = run.corpus.rows("train")
    judge = Judge(run.corpus.images_BHWC[train], np.array([run.corpus.labels[row] for row in train]))
    labels = np.array([run.corpus.labels[row] for row in rows])
    decoder = TopP(TopP.Config(cfg=args.cfg, top_p=args.top_p))
    codes = run.image_tokenizer.grid**2
    print(f"{args.images} images of {codes} codes, guidance {args.cfg:g}, top-p {args.top_p:g}\n")
    print("| window | passes an image | codes a pass | read right |\n|---|---|---|---|")
    for window in (1, 2, 4, 8, codes):
        rng = np.random.default_rng(0)
        passes, drawn = 0, []
        for prompt in prompts:
            ids, count = jacobi(partial(distribution, m, prompt, decoder), codes, window, rng, run.vocab.image_size)
            passes += count
            drawn.append(ids)
        right = (judge.read(run.image_tokenizer.decode(np.stack(drawn))) == labels).mean()
        print(
            f"| {window} | {passes / len(prompts):.2f} | {codes * len(prompts) / passes:.2f} | {right:.1%} |",
            flush=True,
        )


@torch.inference_mode()
def distribution(m: CM3Leon, prompt: Any, decoder: TopP, begun: list[int], drafts: list[int]) -> np.ndarray:
    """Probabilities (drafts + 1, codes) of the code behind each beginning, by one pass over both streams."""
    low, high = m.run.vocab.id_range("image")
    streams = [torch.tensor([*ids_T, *(low + np.array([*begun, *drafts], np.int64))]) for ids_T in
               (prompt.ids_T, prompt.unconditional_T)]  # fmt: skip
    count = len(drafts) + 1

    def last(hidden_BTD: Tensor, head: Any) -> Tensor:
        return torch.nn.functional.linear(hidden_BTD[0, -count:], head.weight[low:high]).float()

    with m._computing():
        both = [m.run.model(ids_T[None].long(), readout=last) for ids_T in streams]
    return decoder.logits(*both).double().softmax(-1).numpy()


def jacobi(model: Any, codes: int, window: int, rng: np.random.Generator, vocabulary: int) -> tuple[np.ndarray, int]:
    """An image's codes, and the passes that they took."""
    done: list[int] = []
    drafts: list[int] = []
    qs: list[np.ndarray] = []
    passes = 0
    even = np.full(vocabulary, 1 / vocabulary)
    while len(done) < codes:
        room = min(window - 1, codes - len(done) - 1)
        while len(drafts) < room:
            drafts.append(int(rng.integers(vocabulary)))
            qs.append(even)
        drafts, qs = drafts[:room], qs[:room]
        p_DV = model(done, drafts)
        passes += 1
        taken = 0
        for draft, q_V, p_V in zip(drafts, qs, p_DV, strict=False):
            taken += 1
            if rng.random() * q_V[draft] < p_V[draft]:
                done.append(draft)
                continue
            rest_V = np.maximum(p_V - q_V, 0)
            done.append(int(rng.choice(vocabulary, p=rest_V / rest_V.sum())))
            break
        else:
            done.append(int(rng.choice(vocabulary, p=p_DV[len(drafts)])))
            taken += 1
        qs = list(p_DV[taken:])
        drafts = [int(rng.choice(vocabulary, p=p_V)) for p_V in qs]
    return np.array(done[:codes]), passes


if __name__ == "__main__":
    main()
