"""One layer's attention by every backend that this device has, at the paper's three sizes.

    python benchmarks/attention.py                              # on a GPU: 4096 tokens, 350M, 760M and 7B, bf16
    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/attention.py    # on a CPU: 1024 tokens of 350M, float32

Forward and backward of one block, as one document and as packed documents of about a quarter of it: milliseconds
(medians after a first call that is not counted), the rate by the FLOPs that a causal mask leaves (6 E A times the
squared length of each document), the most memory beyond the inputs, and the largest error of output and gradients
against the formula in float32, as a share of the largest number.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cm3leon.models.attention import choose, run_lengths
from cm3leon.registry import ATTENTIONS, MODELS, discover

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = ["cm3leon_350m", "cm3leon_760m", "cm3leon_7b"]
    parser.add_argument("--sizes", nargs="+", default=sizes if GPU else sizes[:1])
    parser.add_argument(
        "--length", type=int, default=4096 if GPU else 1024, help="positions of the block"
    )
    parser.add_argument("--dtype", default="bfloat16" if GPU else "float32")
    parser.add_argument("--repeats", type=int, default=20 if GPU else 5)
    args = parser.parse_args()
    discover()
    print(
        f"{torch.cuda.get_device_name() if GPU else 'CPU'}, {torch.get_num_threads()} threads, ",
        end="",
    )
    print(f"torch {torch.__version__}; {args}\n\nauto takes {choose('auto', DEVICE)}\n")
    print(
        "| size | documents | backend | ms | TFLOP/s | MiB | error |\n|---|---|---|---|---|---|---|"
    )
    for size in args.sizes:
        config = MODELS.check(size).config
        for length in (args.length, 1100 * args.length // 4096):
            sample_1T = torch.arange(args.length, device=DEVICE)[None] // length
            title = f"| {size} | {'one' if length == args.length else 'packed'} |"
            compare(title, config.width // config.head_size, config.head_size, sample_1T, args)


def compare(title: str, A: int, E: int, sample_1T: Tensor, args: argparse.Namespace) -> None:
    """A line for every backend; the naive one in float32 is what they are judged by."""
    lengths = run_lengths(sample_1T)
    torch.manual_seed(0)
    shape = (4, 1, A, args.length, E)  # q, k, v and the gradient of what is attended to
    *given, gradient = torch.randn(shape, device=DEVICE).to(getattr(torch, args.dtype)).unbind()
    flops = 6 * E * A * sum(n**2 for n in lengths)

    def both_passes(name: str, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        backend = choose(name, DEVICE).attention
        plan = backend.plan(sample_1T, DEVICE) if len(lengths) > 1 else None
        inputs = [each.to(dtype).requires_grad_() for each in given]

        def call() -> list[Tensor]:
            output = backend(*inputs, plan)
            return [output.detach(), *torch.autograd.grad(output, inputs, gradient.to(dtype))]

        return call

    exact = both_passes("naive", torch.float32)()
    for name in ATTENTIONS.names():
        if missing := ATTENTIONS.get(name).missing(DEVICE):
            print(f"{title} {name} | lacks {missing} |")
            continue
        call = both_passes(name, gradient.dtype)
        error = max(
            ((one.float() - other).abs().max() / other.abs().max()).item()
            for one, other in zip(call(), exact, strict=True)
        )
        memory = f"{peak(call) / 2**20:.0f}" if GPU else ""
        taken = statistics.median(seconds(call) for _ in range(args.repeats))
        print(
            f"{title} {name} | {1000 * taken:.3g} | {flops / taken / 1e12:.3g} | {memory} | {error:.1e} |"
        )


def seconds(call: Callable[[], object]) -> float:
    """Of one call, its work on the device included."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def peak(call: Callable[[], object]) -> int:
    """The most bytes that a call holds beyond what is there already."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def synchronize() -> None:
    """Waits for the device."""
    if GPU:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
