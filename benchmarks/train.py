"""A training step beside transformers' OPT of the same shape and weights.

    # All three parts.
    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/train.py

    # One part, with another shape.
    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/train.py steps --layers 4

    # On a GPU.
    python benchmarks/train.py mfu --preset cm3leon_760m --compile

steps: forward, backward, clipping and fused AdamW under bf16 autocast, by both models in turn.
First every block is one document. Then documents have mixed lengths: ours packs them whole into
blocks, while OPT pads them to the longest of its batch. Useful tokens are those that are not
padding. A batch has at most the same number of positions for both.

memory: the most that such a step holds beyond the weights, gradients and moments included, in a
process of its own.

mfu: our step alone. Its model FLOPs are a share of the rate of a large matrix product, in bf16 or
float32, which is measured in the same process.

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
from memory_held import held_bytes, peak_bytes
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

    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; {args}\n")
    for part in [args.part] if args.part else PARTS:
        print(f"## {part}\n")
        {"steps": steps, "memory": memory, "mfu": mfu}[part](args)
        print(flush=True)


# ------------------------------------------------------------------------------ models and batches


def shape(args: argparse.Namespace) -> Model:
    """Our model with random weights."""
    settings = {"name": args.preset or "cm3leon", "attention": args.attention}
    if not args.preset:
        settings |= {"layers": args.layers, "width": args.width, "seq_len": args.length}
    return new_model(settings, args.vocabulary, DEVICE)


def ours(args: argparse.Namespace) -> tuple[nn.Module, Loss]:
    """Our model, and its mean loss of ids (B, T) and the number (B, T) of each one's document."""
    model = shape(args)
    recompute(model, args.checkpointing)
    if args.compile:
        compile_blocks(model)
    return model, packed_loss(model)


def opt(args: argparse.Namespace) -> tuple[nn.Module, Loss]:
    """The same weights in transformers' OPT, and its own loss, which leaves padding out."""
    other = to_opt(shape(args), use_cache=False).to(DEVICE)

    def loss(ids_BT: Tensor, sample_BT: Tensor) -> Tensor:
        # As anyone would call it: a mask only where there is padding.
        real_BT = sample_BT >= 0
        if bool(real_BT.all()):
            return other(ids_BT, attention_mask=None, labels=ids_BT).loss
        labels_BT = ids_BT.masked_fill(~real_BT, -100)
        return other(ids_BT, attention_mask=real_BT.long(), labels=labels_BT).loss

    return other.train(), loss


def lengths(count: int, longest: int) -> np.ndarray:
    """Lengths of documents, log-normal around a third of the longest.

    A mixture of captions, pairs and texts has lengths like these.
    """
    drawn = np.random.default_rng(0).lognormal(np.log(longest / 3), 0.8, count)
    return drawn.clip(8, longest).astype(int)


def packed(documents: Sequence[int], args: argparse.Namespace) -> Iterator[Tensor]:
    """Batches of documents in blocks, as the number (B, T) of each position's document.

    Every document lies whole in the first block that has room for it; -1 is padding:

        0 0 0 1 1 1 1 -1
        0 0 0 0 0 1 1  1
    """
    blocks: list[list[int]] = []
    for length in documents:
        for block in blocks:
            if sum(block) + length <= args.length:
                block.append(length)
                break
        else:
            blocks.append([length])

    # Blocks that fill no whole batch are left out.
    rows = []
    for block in blocks:
        numbers_T = torch.arange(len(block)).repeat_interleave(torch.tensor(block))
        rows.append(F.pad(numbers_T, (0, args.length - len(numbers_T)), value=-1))
    for start in range(0, len(rows) - args.rows + 1, args.rows):
        yield torch.stack(rows[start : start + args.rows])


def padded(documents: Sequence[int], args: argparse.Namespace) -> Iterator[Tensor]:
    """Batches of one document a row, padded to the longest of the batch: 0 (B, T), or -1."""
    for start in range(0, len(documents) - args.rows + 1, args.rows):
        length_B = torch.tensor(documents[start : start + args.rows])
        inside_BT = torch.arange(int(length_B.max())) < length_B[:, None]
        yield torch.where(inside_BT, 0, -1)


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
    """A function that trains one step on numbers of documents (B, T), with random ids."""
    return stepper(*made, args.vocabulary, config_of(args), DEVICE)


# ------------------------------------------------------------------------------------------- parts


def steps(args: argparse.Namespace) -> None:
    """Ours beside OPT: on whole blocks with one step of each in turn, then on mixed lengths."""
    models = {"ours": step_of(ours(args), args), "opt": step_of(opt(args), args)}
    whole_BT = torch.zeros(args.rows, args.length, dtype=torch.int64)
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(args.repeats + 1):
        for name, step in models.items():
            taken = seconds(partial(step, whole_BT), DEVICE)
            if repeat:
                times[name].append(taken)

    print("| documents | model | s a step | useful tokens/s | useful share | ratio |")
    print("|---|---|---|---|---|---|")
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name, value in middle.items():
        rate, ratio = whole_BT.numel() / value, middle["opt"] / value
        print(f"| one a block | {name} | {value:.3g} | {rate:,.0f} | 100 % | {ratio:.2f} |")

    documents = lengths(4 * args.rows * args.repeats, args.length).tolist()
    batches = {
        "ours": list(packed(documents, args)),
        "opt": list(padded(documents, args))[: 4 * args.repeats],
    }
    for name, step in models.items():
        step(batches[name][0])

    # Both pass over the same documents, but in other batches.
    rates = {}
    for name, step in models.items():
        taken, useful, positions = 0.0, 0, 0
        for batch in batches[name]:
            taken += seconds(partial(step, batch), DEVICE)
            useful += int((batch >= 0).sum())
            positions += batch.numel()
        rates[name] = (taken / len(batches[name]), useful / taken, useful / positions)
    for name, (value, rate, share) in rates.items():
        ratio = rate / rates["opt"][1]
        print(f"| mixed | {name} | {value:.3g} | {rate:,.0f} | {share:.0%} | {ratio:.2f} |")


def memory(args: argparse.Namespace) -> None:
    """Peaks of both, each in a process of its own."""
    print("| model | GiB beyond weights |\n|---|---|")
    for name in ("ours", "opt"):
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--one", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(f"| {name} | {json.loads(done.stdout.splitlines()[-1]) / 2**30:.2f} |", flush=True)


def peak(args: argparse.Namespace) -> int:
    """The most bytes that a process holds during three steps, beyond what it held before them."""
    make = ours if args.one == "ours" else opt
    step = step_of(make(args), args)
    whole_BT = torch.zeros(args.rows, args.length, dtype=torch.int64)
    before = held_bytes(DEVICE)
    for _ in range(3):
        step(whole_BT)
    return peak_bytes(DEVICE) - before


def mfu(args: argparse.Namespace) -> None:
    """Our step's model FLOPs beside what a matrix product reaches on this device."""
    rows = args.rows
    if args.preset:
        # The paper's vocabulary and length; its largest model takes fewer blocks at a time.
        args.vocabulary, args.length = 65_536, 4096
        rows = 1 if args.preset == "cm3leon_7b" else 4

    # A product as large as keeps the device busy.
    dtype = torch.float32 if args.precision == "float32" else torch.bfloat16
    matmul = product_rate(DEVICE, 8192 if DEVICE.type == "cuda" else 2048, dtype)
    step = timed_step(
        shape(args), config_of(args), rows=rows, length=args.length, repeats=args.repeats
    )
    print("| tokens a step | s a step | tokens/s | model TFLOP/s | matmul TFLOP/s | share |")
    print("|---|---|---|---|---|---|")
    rate = step.tokens / step.seconds
    print(
        f"| {step.tokens:,} | {step.seconds:.3g} | {rate:,.0f} | {step.flops / 1e12:.3g} | "
        f"{matmul / 1e12:.3g} | {step.flops / matmul:.0%} |"
    )
    if DEVICE.type == "cuda":
        print(f"\npeak memory {step.peak_bytes / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
