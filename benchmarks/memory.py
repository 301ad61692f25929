"""The plan's memory beside what processes really hold: peaks of whole trainings, on one rank and on several.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/memory.py                   # CPU processes, gloo
    python benchmarks/memory.py --layers 24 --width 1536 --vocabulary 65536 --length 4096 --ranks 1        # on a GPU

Each line is a training of two steps in processes of its own, by torchrun where there are several ranks; the peak is
that of the fullest rank beyond what it held before the model: of CUDA's allocator, or of the process by Linux,
which maps every tensor apart (MALLOC_MMAP_THRESHOLD_), so that what is freed is gone.
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
    parser.add_argument("--one", help="be a rank of the training with these settings, as JSON")
    args = parser.parse_args()
    if args.one:
        rank(args, json.loads(args.one))
        return
    print(
        "| ranks | checkpointing | LoRA | planned, MiB | peak, MiB | planned / peak |\n|---|---|---|---|---|---|"
    )
    for ranks in args.ranks:
        for checkpointing in ("none", "selective", "full"):
            for lora in (0, 16):
                fields = {"activation_checkpointing": checkpointing, "lora_rank": lora}
                peak, planned = run(args, ranks, fields)
                figures = f"{planned / 2**20:,.0f} | {peak / 2**20:,.0f} | {planned / peak:.2f}"
                print(f"| {ranks} | {checkpointing} | {lora or ''} | {figures} |", flush=True)


def run(args: argparse.Namespace, ranks: int, fields: dict[str, Any]) -> tuple[int, float]:
    """Peak of the fullest rank, and what was planned."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    shape = [
        f"--{name}={getattr(args, name)}" for name in ("layers", "width", "vocabulary", "length")
    ]
    shape.append(f"--micro-batch={args.micro_batch}")
    command = [
        sys.executable,
        *launcher,
        str(Path(__file__).resolve()),
        *shape,
        f"--one={json.dumps(fields)}",
    ]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if not done.stdout.startswith("["):
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def rank(args: argparse.Namespace, fields: dict[str, Any]) -> None:
    """Trains for two steps of two micro-batches, and prints the peak of the fullest rank and the plan."""
    shape = Transformer.Config(layers=args.layers, width=args.width, seq_len=args.length)
    rank = current_rank()
    count = rank.count if rank else 1
    blocks = 2 * args.micro_batch * count
    config = DecoderTrainingConfig(
        precision="bf16", batch_size=blocks, micro_batch=args.micro_batch, **fields
    )
    with torch.device("meta"):
        sizes = Transformer(shape, vocab_size=args.vocabulary)
    planned = training_memory(sizes, config, gpus=count, micro_batch=args.micro_batch).total

    def train(shape: Transformer.Config, ranks: Ranks) -> None:
        def new() -> Transformer:
            return Transformer(shape, vocab_size=args.vocabulary)

        model = distributed(new, new, config, ranks)
        reset(ranks.device)
        optimizer = new_optimizer(model, config)
        for _ in range(2):
            for _ in range(2):
                step(
                    model,
                    torch.randint(
                        args.vocabulary, (args.micro_batch, shape.seq_len), device=ranks.device
                    ),
                )
            optimizer.step()
            optimizer.zero_grad()

    with joined(rank, config.timeout_seconds) as ranks:
        train(
            Transformer.Config(layers=1, width=64, seq_len=8), ranks
        )  # libraries and threads are there after it
        gc.collect()
        before = held(ranks.device)
        train(shape, ranks)
        peaks = ranks.gather(most_held(ranks.device) - before)
        if ranks.first:
            print(json.dumps([max(peaks), planned]))


def step(model: Any, ids_BT: Tensor) -> None:
    """Gradients of a micro-batch."""
    weight_N = torch.ones(ids_BT.numel(), device=ids_BT.device)

    def readout(hidden_BTD: Tensor, head: Any) -> Tensor:
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1), head.weight, ids_BT.flatten(), weight_N
        )[0]

    with torch.autocast(ids_BT.device.type, dtype=torch.bfloat16):
        loss = model(ids_BT, readout=readout)
    loss.backward()


def held(device: torch.device) -> int:
    """Bytes that this process holds now."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else of_process("VmRSS")


def most_held(device: torch.device) -> int:
    """The most bytes that it has held since `reset`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else of_process("VmHWM")


def reset(device: torch.device) -> None:
    """Forgets the peak so far: the first rank had the whole model on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def of_process(name: str) -> int:
    """A size in bytes from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
