"""One layer's attention by every backend that this device has, at the paper's three sizes.

    # On a GPU: 4096 tokens, 350M, 760M and 7B, bf16.
    python benchmarks/attention.py

    # On a CPU: 1024 tokens of 350M, float32.
    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/attention.py

Forward and backward of one block, first as one document and then as packed documents of about a
quarter of it. The columns are milliseconds (medians after a first call that is not counted), the
rate by the FLOPs that a causal mask leaves (6 E A times the squared length of each document), the
most memory beyond the inputs, and the largest error of output and gradients against the formula in
float32, as a share of the largest number.
"""

from __future__ import annotations

import argparse

import torch

from cm3leon.doctor.attention import compare
from cm3leon.models.attention import choose
from cm3leon.registry import discover

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
    device = torch.cuda.get_device_name() if GPU else "CPU"
    print(f"{device}, {torch.get_num_threads()} threads, ", end="")
    print(f"torch {torch.__version__}; {args}\n\nauto takes {choose('auto', DEVICE)}\n")
    print("| size | documents | backend | ms | TFLOP/s | MiB | error |")
    print("|---|---|---|---|---|---|---|")
    for size in args.sizes:
        print_rows(size, "one", args.length, args)

        # 1100 of 4096 positions: a caption and an image, of which three fit whole.
        print_rows(size, "packed", 1100 * args.length // 4096, args)


def print_rows(size: str, documents: str, length: int, args: argparse.Namespace) -> None:
    """Print the figures of every backend, for documents of this length in one block."""
    sample_1T = torch.arange(args.length, device=DEVICE)[None] // length
    dtype = getattr(torch, args.dtype)
    for row in compare(size, sample_1T, dtype, repeats=args.repeats):
        title = f"| {size} | {documents} | {row.backend} |"
        if row.lacks:
            print(f"{title} {row.lacks} |")
            continue

        # The CPU's allocator keeps no account of its peak.
        memory = f"{row.memory / 2**20:.0f}" if GPU else ""
        speed = f"{1000 * row.seconds:.3g} | {row.rate / 1e12:.3g}"
        print(f"{title} {speed} | {memory} | {row.error:.1e} |", flush=True)


if __name__ == "__main__":
    main()
