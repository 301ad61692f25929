"""The memory that `plan` foretells beside the peaks of trainings, on one rank and on several.

    # Processes of the CPU, over gloo.
    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/memory.py

    # On a GPU.
    python benchmarks/memory.py --layers 24 --width 1536 --vocabulary 65536 --length 4096 --ranks 1

Each line is a training of two steps in processes of its own, by torchrun where there are several
ranks. The peak is that of the fullest rank, beyond what it held before the model. On a GPU CUDA's
allocator tells it, on the CPU Linux. There every tensor has a mapping of its own
(MALLOC_MMAP_THRESHOLD_), so that memory goes back to the system as soon as a tensor is freed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from memory_held import forget_peak, held_bytes, peak_bytes
from torch import Tensor

from cm3leon.models.transformer import Transformer
from cm3leon.objectives.loss import linear_cross_entropy
from cm3leon.training.config import DecoderTrainingConfig
from cm3leon.training.distributed import Ranks, current_rank, joined
from cm3leon.training.memory import training_memory
from cm3leon.training.optimizer import new_optimizer
from cm3leon.training.parallel import distributed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--one", help="settings as JSON: train with them as one of the ranks")
    args = parser.parse_args()
    if args.one:
        rank(args, json.loads(args.one))
        return

    print("| ranks | checkpointing | LoRA | planned, MiB | peak, MiB | planned / peak |")
    print("|---|---|---|---|---|---|")
    for ranks in args.ranks:
        for checkpointing in ("none", "selective", "full"):
            for lora in (0, 16):
                fields = {"activation_checkpointing": checkpointing, "lora_rank": lora}
                peak, planned = run(args, ranks, fields)
                figures = f"{planned / 2**20:,.0f} | {peak / 2**20:,.0f} | {planned / peak:.2f}"
                print(f"| {ranks} | {checkpointing} | {lora or ''} | {figures} |", flush=True)


def run(args: argparse.Namespace, ranks: int, fields: dict[str, Any]) -> tuple[int, float]:
    """Train with these settings in processes of their own.

    Returns:
        The bytes of the fullest rank's peak, and the bytes that were planned.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command.append(str(Path(__file__).resolve()))
    for name in ("layers", "width", "vocabulary", "length"):
        command.append(f"--{name}={getattr(args, name)}")
    command += [f"--micro-batch={args.micro_batch}", f"--one={json.dumps(fields)}"]

    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)

    # The first rank prints its result as a list; anything else is an error.
    if not done.stdout.startswith("["):
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def rank(args: argparse.Namespace, fields: dict[str, Any]) -> None:
    """Train for two steps of two micro-batches; print the fullest rank's peak and the plan."""
    shape = Transformer.Config(layers=args.layers, width=args.width, seq_len=args.length)
    rank = current_rank()
    count = rank.count if rank else 1
    blocks = 2 * args.micro_batch * count
    config = DecoderTrainingConfig(
        precision="bf16", batch_size=blocks, micro_batch=args.micro_batch, **fields
    )

    # The plan needs only the shapes of the weights.
    with torch.device("meta"):
        sizes = Transformer(shape, vocab_size=args.vocabulary)
    planned = training_memory(sizes, config, gpus=count, micro_batch=args.micro_batch).total

    def train(shape: Transformer.Config, ranks: Ranks) -> None:
        def new() -> Transformer:
            return Transformer(shape, vocab_size=args.vocabulary)

        model = distributed(new, new, config, ranks)

        # The first rank had the whole model on the CPU until now.
        forget_peak(ranks.device)
        optimizer = new_optimizer(model, config)
        size = args.micro_batch, shape.seq_len
        for _ in range(2):
            for _ in range(2):
                step(model, torch.randint(args.vocabulary, size, device=ranks.device))
            optimizer.step()
            optimizer.zero_grad()

    with joined(rank, config.timeout_seconds) as ranks:
        # After a small training all libraries are loaded and all threads are started.
        train(Transformer.Config(layers=1, width=64, seq_len=8), ranks)
        gc.collect()

        before = held_bytes(ranks.device)
        train(shape, ranks)
        peaks = ranks.gather(peak_bytes(ranks.device) - before)
        if ranks.first:
            print(json.dumps([max(peaks), planned]))


def step(model: Any, ids_BT: Tensor) -> None:
    """Add the gradients of a micro-batch (B, T)."""
    weight_N = torch.ones(ids_BT.numel(), device=ids_BT.device)

    def readout(hidden_BTD: Tensor, head: Any) -> Tensor:
        hidden_ND, target_N = hidden_BTD.flatten(0, 1), ids_BT.flatten()
        return linear_cross_entropy(hidden_ND, head.weight, target_N, weight_N)[0]

    with torch.autocast(ids_BT.device.type, dtype=torch.bfloat16):
        loss = model(ids_BT, readout=readout)
    loss.backward()


if __name__ == "__main__":
    main()
