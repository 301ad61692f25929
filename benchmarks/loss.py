"""Seconds and memory of the output layer with its loss, forward and backward: ours beside torch's and Liger's.

    OMP_NUM_THREADS=2 python benchmarks/loss.py                        # 4,096 tokens, vocabulary 65,536, width 1,024
    OMP_NUM_THREADS=2 python benchmarks/loss.py --tokens 1024 --vocabulary 8192 --width 256

Weights and hidden states are float32, matrix products bf16: by autocast, or, for the libraries' functions, by a cast
of both before them. All tokens count alike, as the libraries weigh none. Every way runs in a process of its own, on a
GPU where there is one; Liger only there, where it is installed. Seconds are the median of `--repeats` calls after one
that is not counted. Memory is what the calls held at most beyond hidden states and weights, both gradients included.
The error is the largest of the head's gradient against that of the plain way in float32, as a share of the largest
number in that.
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
from torch import Tensor

from cm3leon.objectives.loss import LOGITS, linear_cross_entropy, plain_linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        print(
            json.dumps(
                measure(ways()[args.way], args.tokens, args.vocabulary, args.width, args.repeats)
            )
        )
        return
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(
        f"{device}, torch {torch.__version__}, {args.tokens:,} tokens, vocabulary {args.vocabulary:,}, ",
        end="",
    )
    print(
        f"width {args.width:,}; all logits in float32 are {args.tokens * args.vocabulary / 2**18:,.0f} MiB\n"
    )
    print("| way | seconds | memory, MiB | error |\n|---|---|---|---|", flush=True)
    for way in ways():
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--way", way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds, memory, error = json.loads(done.stdout.splitlines()[-1])
        print(f"| {way} | {seconds:.3g} | {memory / 2**20:,.0f} | {error:.1e} |", flush=True)


def ways() -> dict[str, Loss]:
    """What is compared, by name: losses of hidden states (N, D), a head (V, D) and targets (N,)."""
    found: dict[str, Loss] = {
        f"ours, at most 2^{LOGITS.bit_length() - 1} logits at a time": ours,
        "ours, plain": plain,
    }
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
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger FusedLinearCrossEntropy"] = lambda hidden, head, target: liger(
            head.bfloat16(), hidden.bfloat16(), target
        )
    return found


def ours(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Tensor:
    with torch.autocast(hidden_ND.device.type, dtype=torch.bfloat16):
        return linear_cross_entropy(
            hidden_ND, head_VD, target_N, torch.ones_like(target_N, dtype=torch.float32)
        )[0]


def plain(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Tensor:
    weight_N = torch.ones_like(target_N, dtype=torch.float32)
    with torch.autocast(hidden_ND.device.type, dtype=torch.bfloat16):
        return plain_linear_cross_entropy(hidden_ND, head_VD, target_N, weight_N)[0]


def measure(
    loss: Loss, tokens: int, vocabulary: int, width: int, repeats: int
) -> tuple[float, int, float]:
    """Seconds of a call, bytes held at most during the calls, and the error of the head's gradient."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, width, device=device, requires_grad=True)
    head_VD = (torch.randn(vocabulary, width, device=device) / width**0.5).requires_grad_()
    target_N = torch.randint(vocabulary, (tokens,), device=device)
    before, times = held(device), []
    for _ in range(1 + repeats):
        hidden_ND.grad = head_VD.grad = None
        start = time.perf_counter()
        loss(hidden_ND, head_VD, target_N).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    memory = most_held(device) - before
    found_VD, head_VD.grad = head_VD.grad, None
    F.cross_entropy(F.linear(hidden_ND, head_VD), target_N).backward()
    error = (found_VD - head_VD.grad).abs().max() / head_VD.grad.abs().max()
    return statistics.median(times[1:]), memory, error.item()


def held(device: str) -> int:
    """Bytes that this process holds now."""
    return torch.cuda.memory_allocated() if device == "cuda" else of_process("VmRSS")


def most_held(device: str) -> int:
    """The most bytes that it has held."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else of_process("VmHWM")


def of_process(name: str) -> int:
    """A size in bytes from Linux's account of this process; the peak of `getrusage` would include its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
