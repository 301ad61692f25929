"""Seconds and memory of the output layer with its loss, ours beside torch's and Liger's.

    # 4,096 tokens, vocabulary 65,536, width 1,024.
    OMP_NUM_THREADS=2 python benchmarks/loss.py

    OMP_NUM_THREADS=2 python benchmarks/loss.py --tokens 1024 --vocabulary 8192 --width 256

Forward and backward, with weights and hidden states in float32 and matrix products in bf16: ours by
autocast, the libraries' functions by a cast of both before the call. All tokens have the weight 1,
since the libraries have no weights. Every function runs in a process of its own, on a GPU where
there is one; Liger is measured only there, and only if it is installed.

Seconds are the median of `--repeats` calls after one that is not counted. Memory is the most that
the calls held beyond hidden states and weights, both gradients included. The error is the largest
deviation of the head's gradient from the plain one in float32, as a share of its largest number.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from memory_held import held_bytes, peak_bytes
from torch import Tensor

from cm3leon.objectives.loss import LOGITS, linear_cross_entropy, plain_linear_cross_entropy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Mean loss of hidden states (N, D), a head (V, D) and targets (N,)."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=65_536)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--way", choices=ways(), help="measure this one in this process, and print it as JSON"
    )
    args = parser.parse_args()
    if args.way:
        loss = ways()[args.way]
        print(json.dumps(measure(loss, args.tokens, args.vocabulary, args.width, args.repeats)))
        return

    device = f"{torch.get_num_threads()} CPU threads"
    if DEVICE.type == "cuda":
        device = torch.cuda.get_device_name()
    logits = 4 * args.tokens * args.vocabulary
    print(f"{device}, torch {torch.__version__}, {args.tokens:,} tokens, ", end="")
    print(f"vocabulary {args.vocabulary:,}, width {args.width:,}; ", end="")
    print(f"all logits in float32 are {logits / 2**20:,.0f} MiB\n")

    print("| way | seconds | memory, MiB | error |\n|---|---|---|---|", flush=True)
    for way in ways():
        # The peak of a process never falls, so each function has one to itself.
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--way", way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds, memory, error = json.loads(done.stdout.splitlines()[-1])
        print(f"| {way} | {seconds:.3g} | {memory / 2**20:,.0f} | {error:.1e} |", flush=True)


def ways() -> dict[str, Loss]:
    """The functions to compare, by name; those that are not installed here are left out."""
    found: dict[str, Loss] = {
        f"ours, at most 2^{LOGITS.bit_length() - 1} logits at a time": ours,
        "ours, plain": plain,
    }

    # Older versions of torch lack the function, or its form that computes in chunks.
    if hasattr(F, "linear_cross_entropy"):
        found["torch F.linear_cross_entropy"] = lambda hidden, head, target: F.linear_cross_entropy(
            hidden.bfloat16(), head.bfloat16(), target
        )
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        for policy in ("accurate", "compact"):
            options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
            found[f"torch F.linear_cross_entropy, chunks, {policy}"] = (
                lambda hidden, head, target, options=options: F.linear_cross_entropy(
                    hidden.bfloat16(), head.bfloat16(), target, options=options
                )
            )

    if DEVICE.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger FusedLinearCrossEntropy"] = lambda hidden, head, target: liger(
            head.bfloat16(), hidden.bfloat16(), target
        )
    return found


def ours(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Tensor:
    weight_N = torch.ones_like(target_N, dtype=torch.float32)
    with torch.autocast(hidden_ND.device.type, dtype=torch.bfloat16):
        return linear_cross_entropy(hidden_ND, head_VD, target_N, weight_N)[0]


def plain(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Tensor:
    weight_N = torch.ones_like(target_N, dtype=torch.float32)
    with torch.autocast(hidden_ND.device.type, dtype=torch.bfloat16):
        return plain_linear_cross_entropy(hidden_ND, head_VD, target_N, weight_N)[0]


def measure(
    loss: Loss, tokens: int, vocabulary: int, width: int, repeats: int
) -> tuple[float, int, float]:
    """Seconds of a call, the most bytes that the calls held, and the head gradient's error."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, width, device=DEVICE, requires_grad=True)
    head_VD = (torch.randn(vocabulary, width, device=DEVICE) / width**0.5).requires_grad_()
    target_N = torch.randint(vocabulary, (tokens,), device=DEVICE)

    before, times = held_bytes(DEVICE), []
    for _ in range(1 + repeats):
        hidden_ND.grad = head_VD.grad = None
        start = time.perf_counter()
        loss(hidden_ND, head_VD, target_N).backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    memory = peak_bytes(DEVICE) - before

    # The reference holds all logits, so it is computed after the memory was read.
    found_VD, head_VD.grad = head_VD.grad, None
    F.cross_entropy(F.linear(hidden_ND, head_VD), target_N).backward()
    error = (found_VD - head_VD.grad).abs().max() / head_VD.grad.abs().max()
    return statistics.median(times[1:]), memory, error.item()


if __name__ == "__main__":
    main()
