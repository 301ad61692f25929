"""Images a second against the batch (the paper's figure 11) and seconds an image (figure 10), beside the floor.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/throughput.py --preset cm3leon_350m --codes 16 --batch 1 2 4 8 16
    python benchmarks/throughput.py --preset cm3leon_7b --execution "compiled graph" --weights bf16 int8 fp8    # H200

Random weights, one prompt of 32 tokens an image, classifier-free guidance: two rows an image. The floor is the time in
which the device reads the weights of the layers and the head's part once a step, by the bandwidth that the same process
measured just before. A batch that has no room is left out. One run of each batch is not counted.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from cm3leon.decoders import grammar
from cm3leon.decoders.generate import Answerer
from cm3leon.decoders.request import Request, shape_for
from cm3leon.models.serving import keep_weights
from cm3leon.registry import DECODERS, MODELS, discover
from cm3leon.tokenizers.vocab import Vocab

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = Vocab(56_320, 8192)
PROMPT = 32


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
    device = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    speed = bandwidth()
    print(f"{device}, torch {torch.__version__}: reads {speed / 1e9:,.1f} GB/s")
    print(
        f"{args.preset}, {args.codes} codes an image, steps {args.execution}, window {args.window}\n"
    )
    print("| weights | batch | s a batch | images/s | ms a step | floor, ms | share of the floor |")
    print("|---|---|---|---|---|---|---|")
    for weights in args.weights:
        model = decoder(args.preset, weights)
        floor = read_bytes(model) / speed
        answerer = Answerer(model, VOCAB, window=args.window, execution=args.execution)
        for batch in args.batch:
            requests = requests_of(batch, args.codes)
            if shape_for(model, requests).groups < batch:
                break
            times = [run(answerer, requests) for _ in range(args.repeats + 1)][1:]
            seconds = float(np.median(times))
            step = seconds / args.codes
            print(
                f"| {weights} | {batch} | {seconds:.3g} | {batch / seconds:.3g} | {1e3 * step:.3g} | "
                f"{1e3 * floor:.3g} | {floor / step:.0%} |",
                flush=True,
            )


def decoder(preset: str, weights: Any) -> Any:
    """Random weights, large enough to choose by."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = MODELS.build(MODELS.check(preset), vocab_size=VOCAB.size)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    keep_weights(model, weights)
    return model.eval()


def read_bytes(model: Any) -> int:
    """Bytes of the weights that a step reads: all layers, and the codes' rows of the head."""
    layers = sum(parameter.nbytes if not hasattr(parameter, "qdata") else parameter.qdata.nbytes
                 for parameter in model.blocks.parameters())  # fmt: skip
    return layers + model.head.weight[: VOCAB.image_size].nbytes


def bandwidth() -> float:
    """Bytes a second that the sum of a large tensor reads; the best of five."""
    numbers = torch.ones(
        2**30 if DEVICE.type == "cuda" else 2**27, dtype=torch.float32, device=DEVICE
    )
    times = []
    for _ in range(6):
        start = time.perf_counter()
        numbers.sum().item()
        times.append(time.perf_counter() - start)
    return numbers.nbytes / min(times[1:])


def requests_of(batch: int, codes: int) -> list[Request]:
    """As many prompts."""
    rng = np.random.default_rng(0)
    image = DECODERS.build({"name": "top_p", "cfg": 3.0, "top_p": 0.9})
    new = partial(grammar.image, VOCAB, codes)
    other_T = np.array([VOCAB.eos, VOCAB.sentinel(0), VOCAB.brk])
    streams = [
        (np.array([VOCAB.eos, *rng.integers(4, VOCAB.text_size, PROMPT - 2), VOCAB.brk]), other_T)
        for _ in range(batch)
    ]
    return [
        Request(each, new, codes, [{"image": image}], [number])
        for number, each in enumerate(streams)
    ]


def run(answerer: Answerer, requests: list[Request]) -> float:
    """Seconds for all of them."""
    start = time.perf_counter()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        answerer.answers(requests)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
