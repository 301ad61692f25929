"""Text to image beside transformers' `generate` with guidance, on the same weights.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/decode.py                  # the shape of the digits model
    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/decode.py --shape 350m --codes 16 --repeats 1

Each image is `--codes` codes under guidance of weight 3 with top-p 0.9, drawn by ours and by OPTForCausalLM.generate in
turn, both with weights in bf16 (ours keeps embeddings and residual stream in float32). Prompts: one; eight different
ones (transformers pads them to the left, in one batch); and eight samples of one prompt that begins with a retrieved
prefix, which transformers is given eight times. Images a second are the median over repeats after one that is not
counted; the ratio is the median of each repeat's, in which both had the machine alike. Memory is the peak of a process
of its own beyond the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer import to_opt

from cm3leon.decoders import grammar
from cm3leon.decoders.generate import answers
from cm3leon.decoders.request import Request
from cm3leon.models.serving import keep_weights
from cm3leon.models.transformer import Transformer
from cm3leon.registry import DECODERS, discover
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.types import Weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {
    "digits": (Vocab(320, 128, 64), {"layers": 4, "width": 128, "head_size": 32, "seq_len": 2048}),
    "350m": (Vocab(56_320, 8192), {"layers": 24, "width": 1024, "head_size": 64, "seq_len": 4096}),
}
CASES = ("one prompt", "8 prompts", "8 samples")
WEIGHT, TOP_P = 3.0, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="digits")
    parser.add_argument("--codes", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--prefix", type=int, default=1000, help="tokens of the retrieved prefix")
    parser.add_argument(
        "--weights", choices=("bf16", "int8", "fp8"), default="bf16", help="of ours"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--one", nargs=2, help="measure the memory of a case and a way in this process"
    )
    args = parser.parse_args()
    discover()
    vocab, fields = SHAPES[args.shape]
    if args.one:
        print(measure_memory(args, *args.one))
        return
    device = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{device}, torch {torch.__version__}; {fields['layers']} layers, width {fields['width']}, ",
        end="",
    )
    print(
        f"vocabulary {vocab.size:,}, prompts of {args.prompt} tokens, {args.codes} codes an image\n"
    )
    print(
        "| case | ours, images/s | transformers, images/s | ratio | ours, MiB | transformers, MiB |\n"
        "|---|---|---|---|---|---|"
    )
    model = decoder(args.shape, args.weights)
    other = opt(args.shape)
    for case in CASES:
        prompts = prompts_of(case, args, vocab)
        ways: dict[str, Callable[[], object]] = {
            "ours": partial(ours, model, vocab, args.codes, prompts),
            "opt": partial(transformers_generate, other, vocab, args.codes, prompts),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(args.repeats + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if repeat:
                    times[name].append(time.perf_counter() - start)
        rates = {name: len(prompts) / statistics.median(values) for name, values in times.items()}
        pairs = zip(times["opt"], times["ours"], strict=True)
        ratio = statistics.median(theirs / own for theirs, own in pairs)
        held = {name: memory_of(case, name) for name in ways}
        label = f"{case}, prefix {args.prefix}" if case == "8 samples" else case
        print(
            f"| {label} | {rates['ours']:.3g} | {rates['opt']:.3g} | {ratio:.2f} | "
            f"{held['ours'] / 2**20:,.0f} | {held['opt'] / 2**20:,.0f} |",
            flush=True,
        )


def decoder(shape: str, weights: Weights) -> Transformer:
    """A decoder with random weights, large enough to choose by."""
    vocab, fields = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Transformer(Transformer.Config(**fields), vocab_size=vocab.size)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    keep_weights(model, weights)
    return model.eval()


def opt(shape: str) -> Any:
    """The same weights in transformers, all in bf16."""
    return to_opt(decoder(shape, "float32")).to(DEVICE, torch.bfloat16)


def prompts_of(
    case: str, args: argparse.Namespace, vocab: Vocab
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Conditional and unconditional prompts."""
    rng = np.random.default_rng(0)
    prefix_T = (
        rng.integers(4, vocab.text_size, args.prefix)
        if case == "8 samples"
        else np.empty(0, np.int64)
    )

    def one(length: int) -> tuple[np.ndarray, np.ndarray]:
        caption_T = rng.integers(4, vocab.text_size, length - 2)
        begin_T = np.concatenate([[vocab.eos], prefix_T])
        return (
            np.concatenate([begin_T, caption_T, [vocab.brk]]),
            np.concatenate([begin_T, [vocab.sentinel(0), vocab.brk]]),
        )

    if case == "8 samples":
        return [one(args.prompt)] * 8
    return [one(args.prompt - 2 * number) for number in range(1 if case == "one prompt" else 8)]


def ours(
    model: Transformer, vocab: Vocab, codes: int, prompts: list[tuple[np.ndarray, np.ndarray]]
) -> Any:
    """Equal prompts as samples of one request."""
    image = DECODERS.build({"name": "top_p", "cfg": WEIGHT, "top_p": TOP_P})
    new = partial(grammar.image, vocab, codes)
    same = prompts[0] is prompts[-1]
    sizes = [(prompts[0], len(prompts))] if same else [(each, 1) for each in prompts]
    requests = [
        Request(streams, new, codes, [{"image": image}] * n, range(n)) for streams, n in sizes
    ]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        return answers(model, requests, vocab=vocab)


@torch.inference_mode()
def transformers_generate(
    model: Any, vocab: Vocab, codes: int, prompts: list[tuple[np.ndarray, np.ndarray]]
) -> Any:
    """A batch padded to the left, with transformers' guidance and only codes allowed."""
    low, high = vocab.id_range("image")
    closed = [token for token in range(vocab.size) if not low <= token < high]
    given = {}
    for place, name in enumerate(("", "negative_prompt_")):
        rows = [pair[place] for pair in prompts]
        longest = max(map(len, rows))
        ids_BT = np.stack([np.pad(row, (longest - len(row), 0)) for row in rows])
        mask_BT = np.stack([np.arange(longest) >= longest - len(row) for row in rows])
        given[f"{name}ids"] = torch.from_numpy(ids_BT).to(DEVICE)
        given[f"{name}attention_mask"] = torch.from_numpy(mask_BT.astype(np.int64)).to(DEVICE)
    return model.generate(
        given["ids"],
        attention_mask=given["attention_mask"],
        negative_prompt_ids=given["negative_prompt_ids"],
        negative_prompt_attention_mask=given["negative_prompt_attention_mask"],
        guidance_scale=WEIGHT,
        do_sample=True,
        top_p=TOP_P,
        top_k=0,
        max_new_tokens=codes,
        min_new_tokens=codes,
        eos_token_id=None,
        suppress_tokens=closed,
    )


def memory_of(case: str, way: str) -> int:
    """Peak of a process of its own beyond the weights."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--one", case, way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure_memory(args: argparse.Namespace, case: str, way: str) -> int:
    """The most bytes held while one batch is drawn, beyond what is held before."""
    vocab, _ = SHAPES[args.shape]
    function: Any = ours if way == "ours" else transformers_generate
    model: Any = decoder(args.shape, args.weights) if way == "ours" else opt(args.shape)
    function(model, vocab, 2, prompts_of("one prompt", args, vocab))
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else of_process("VmRSS")
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    function(model, vocab, args.codes, prompts_of(case, args, vocab))
    return (
        torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else of_process("VmHWM")
    ) - before


def of_process(name: str) -> int:
    """A size in bytes from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
