"""A training step beside transformers' OPT of the same shape and weights.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/train.py                       # all that this device can do
    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/train.py steps --layers 4      # one part, another shape
    python benchmarks/train.py mfu --preset cm3leon_760m --compile                  # on a GPU

steps: forward, backward, clipping and fused AdamW under bf16 autocast on blocks that are one document each, in turn by
both models; and on documents of mixed lengths, which ours packs whole into blocks and OPT pads to the longest of its
batch. Useful tokens are those that are not padding; a batch has as many positions for both at most.
memory: the most that such a step holds beyond weights, in a process of its own; all of its state included.
mfu: our step alone, its model FLOPs as a share of the rate of a large bf16 matrix product measured in the same process.
Seconds are medians after a first call that is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peer import to_opt
from torch import Tensor, nn

from cm3leon.doctor.hardware import product_rate, seconds
from cm3leon.doctor.training import Loss, new_model, packed_loss, stepper, timed_step
from cm3leon.models.base import Model
from cm3leon.models.recompute import compile_blocks, recompute
from cm3leon.registry import discover
from cm3leon.training.config import DecoderTrainingConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARTS = ("steps", "memory", "mfu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--length", type=int, default=512, help="positions of a block")
    parser.add_argument("--rows", type=int, default=8, help="blocks of a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--preset", help="mfu: a registered model instead of that shape, at its own length"
    )
    parser.add_argument("--optimizer", choices=("adamw", "adamw_8bit", "muon"), default="adamw")
    parser.add_argument("--precision", choices=("bf16", "float8", "float32"), default="bf16")
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--one", choices=("ours", "opt"), help="memory: measure this one in this process, as JSON"
    )
    args = parser.parse_args()
    discover()
    if args.one:
        print(json.dumps(peak(args)))
        return
    print(
        f"{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU'}, {torch.get_num_threads()} threads, ",
        end="",
    )
    print(f"torch {torch.__version__}; {args}\n")
    for part in [args.part] if args.part else PARTS:
        print(f"## {part}\n")
        {"steps": steps, "memory": memory, "mfu": mfu}[part](args)
        print(flush=True)


# ------------------------------------------------------------------------------------------------ models and batches


def shape(args: argparse.Namespace) -> Model:
    """Our decoder with random weights."""
    settings = {"name": args.preset or "cm3leon", "attention": args.attention}
    if not args.preset:
        settings |= {"layers": args.layers, "width": args.width, "seq_len": args.length}
    return new_model(settings, args.vocabulary, DEVICE)


def ours(args: argparse.Namespace) -> tuple[nn.Module, Loss]:
    """The decoder, and its mean loss of ids (B, T) with the number of the document at each position."""
    model = shape(args)
    recompute(model, args.checkpointing)
    if args.compile:
        compile_blocks(model)
    return model, packed_loss(model)


def opt(args: argparse.Namespace) -> tuple[nn.Module, Loss]:
    """The same weights in transformers' OPT, with its own loss; padding is masked, and in no target."""
    other = to_opt(shape(args), use_cache=False).to(DEVICE)

    def loss(ids_BT: Tensor, sample_BT: Tensor) -> Tensor:
        real_BT = sample_BT >= 0
        whole = bool(real_BT.all())
        labels_BT = ids_BT if whole else ids_BT.masked_fill(~real_BT, -100)
        return other(
            ids_BT, attention_mask=None if whole else real_BT.long(), labels=labels_BT
        ).loss

    return other.train(), loss


def lengths(count: int, longest: int) -> np.ndarray:
    """Lengths of documents: log-normal about a third of the longest, as those of captions, pairs and texts mixed."""
    drawn = np.random.default_rng(0).lognormal(np.log(longest / 3), 0.8, count)
    return drawn.clip(8, longest).astype(int)


def packed(documents: Sequence[int], args: argparse.Namespace) -> Iterator[Tensor]:
    """Numbers of documents (B, T) in blocks: each whole, in the first block with room; -1 is padding."""
    blocks: list[list[int]] = []
    for length in documents:
        place = next((block for block in blocks if sum(block) + length <= args.length), None)
        if place is None:
            blocks.append([length])
        else:
            place.append(length)
    rows = [
        torch.tensor([n for n, length in enumerate(block) for _ in range(length)])
        for block in blocks
    ]
    for start in range(0, len(rows) - args.rows + 1, args.rows):
        yield torch.stack(
            [F.pad(r, (0, args.length - len(r)), value=-1) for r in rows[start : start + args.rows]]
        )


def padded(documents: Sequence[int], args: argparse.Namespace) -> Iterator[Tensor]:
    """One document a row, padded to the longest of the batch."""
    for start in range(0, len(documents) - args.rows + 1, args.rows):
        batch = documents[start : start + args.rows]
        yield torch.stack(
            [torch.where(torch.arange(max(batch)) < length, 0, -1) for length in batch]
        )


def config_of(args: argparse.Namespace) -> DecoderTrainingConfig:
    """How a step is computed."""
    return DecoderTrainingConfig(
        optimizer=args.optimizer,
        learning_rate=1e-4,
        precision=args.precision,
        activation_checkpointing=args.checkpointing,
        compile=args.compile,
    )


def step_of(made: tuple[nn.Module, Loss], args: argparse.Namespace) -> Callable[[Tensor], None]:
    """One step on document numbers."""
    return stepper(*made, args.vocabulary, config_of(args), DEVICE)


# ------------------------------------------------------------------------------------------------ parts


def steps(args: argparse.Namespace) -> None:
    """Ours beside OPT, one step of each in turn."""
    ways = {name: step_of(make(args), args) for name, make in (("ours", ours), ("opt", opt))}
    whole_BT = torch.zeros(args.rows, args.length, dtype=torch.int64)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(args.repeats + 1):
        for name, step in ways.items():
            taken = seconds(partial(step, whole_BT), DEVICE)
            if repeat:
                times[name].append(taken)
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(
        "| documents | model | s a step | useful tokens/s | useful share | ratio |\n|---|---|---|---|---|---|"
    )
    for name, value in middle.items():
        rate, ratio = whole_BT.numel() / value, middle["opt"] / value
        print(f"| one a block | {name} | {value:.3g} | {rate:,.0f} | 100 % | {ratio:.2f} |")
    documents = lengths(4 * args.rows * args.repeats, args.length).tolist()
    batches = {
        "ours": list(packed(documents, args)),
        "opt": list(padded(documents, args))[: 4 * args.repeats],
    }
    rates = {}
    for name, step in ways.items():
        step(batches[name][0])
    for name, step in ways.items():
        taken = sum(seconds(partial(step, batch), DEVICE) for batch in batches[name])
        useful = sum(int((batch >= 0).sum()) for batch in batches[name])
        positions_ = sum(batch.numel() for batch in batches[name])
        rates[name] = (taken / len(batches[name]), useful / taken, useful / positions_)
    for name, (value, rate, share) in rates.items():
        print(
            f"| mixed | {name} | {value:.3g} | {rate:,.0f} | {share:.0%} | {rate / rates['opt'][1]:.2f} |"
        )


def memory(args: argparse.Namespace) -> None:
    """Peaks of both, each in a process of its own."""
    print("| model | GiB beyond weights |\n|---|---|")
    for name in ("ours", "opt"):
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--one", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(f"| {name} | {json.loads(done.stdout.splitlines()[-1]) / 2**30:.2f} |", flush=True)


def peak(args: argparse.Namespace) -> int:
    """The most bytes that a process holds during three steps, beyond what it held before them."""
    step = step_of((ours if args.one == "ours" else opt)(args), args)
    whole_BT = torch.zeros(args.rows, args.length, dtype=torch.int64)
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else of_process("VmRSS")
    for _ in range(3):
        step(whole_BT)
    return (
        torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else of_process("VmHWM")
    ) - before


def of_process(name: str) -> int:
    """A size in bytes from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def mfu(args: argparse.Namespace) -> None:
    """Our step's model FLOPs beside what a matrix product reaches on this device."""
    if args.preset:
        args.vocabulary, args.length = 65_536, 4096
    matmul = product_rate(DEVICE, 8192 if DEVICE.type == "cuda" else 2048, torch.bfloat16)
    rows = args.rows if not args.preset else 1 if args.preset == "cm3leon_7b" else 4
    step = timed_step(
        shape(args), config_of(args), rows=rows, length=args.length, repeats=args.repeats
    )
    print(
        "| tokens a step | s a step | tokens/s | model TFLOP/s | matmul TFLOP/s | share |\n|---|---|---|---|---|---|"
    )
    rate = step.tokens / step.seconds
    print(
        f"| {step.tokens:,} | {step.seconds:.3g} | {rate:,.0f} | {step.flops / 1e12:.3g} | "
        f"{matmul / 1e12:.3g} | {step.flops / matmul:.0%} |"
    )
    if DEVICE.type == "cuda":
        print(f"\npeak memory {step.peak_bytes / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
