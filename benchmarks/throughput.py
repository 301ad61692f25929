"""Images a second by the batch (the paper's figure 11) and seconds an image (figure 10).

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/throughput.py \\
        --preset cm3leon_350m --codes 16 --batch 1 2 4 8 16

    # On an H200.
    python benchmarks/throughput.py \\
        --preset cm3leon_7b --execution "compiled graph" --weights bf16 int8 fp8

Random weights, one prompt of 32 tokens for each image, and classifier-free guidance, which makes
two rows of an image. No step is faster than the floor, the time in which the device reads the
weights of the layers and the head's part once, by the bandwidth that the same process measured just
before. Batches end where the memory does. One run of each batch is not counted.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from cm3leon.decoders.generate import Answerer
from cm3leon.doctor.hardware import read_rate
from cm3leon.doctor.images import (
    PAPER,
    answer_seconds,
    has_room,
    new_decoder,
    read_bytes,
    requests_of,
)
from cm3leon.doctor.page import device_name
from cm3leon.registry import discover

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="cm3leon_7b")
    parser.add_argument("--weights", nargs="+", default=["bf16"])
    parser.add_argument("--execution", default="eager")
    parser.add_argument("--window", type=int, default=1)
    parser.add_argument("--codes", type=int, default=1024)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()

    discover()
    speed = read_rate(DEVICE)
    print(f"{device_name(DEVICE)}, torch {torch.__version__}: reads {speed / 1e9:,.1f} GB/s")
    print(f"{args.preset}, {args.codes} codes an image, steps {args.execution}, ", end="")
    print(f"window {args.window}\n")
    print("| weights | batch | s a batch | images/s | ms a step | floor, ms | share of the floor |")
    print("|---|---|---|---|---|---|---|")
    for weights in args.weights:
        model = new_decoder(args.preset, PAPER, weights, DEVICE)
        floor = read_bytes(model, PAPER) / speed
        answerer = Answerer(model, PAPER, window=args.window, execution=args.execution)
        for batch in args.batch:
            requests = requests_of(batch, args.codes, PAPER)
            if not has_room(model, requests):
                break

            # The first run allocates the cache, and records the graph if there is one.
            times = [answer_seconds(answerer, requests) for _ in range(args.repeats + 1)][1:]
            seconds = float(np.median(times))
            step = seconds / args.codes
            print(
                f"| {weights} | {batch} | {seconds:.3g} | {batch / seconds:.3g} "
                f"| {1e3 * step:.3g} | {1e3 * floor:.3g} | {floor / step:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
