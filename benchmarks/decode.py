"""Text to image beside transformers' `generate` with guidance, on the same weights.

    # The shape of the digits model.
    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/decode.py

    # A model of 350M parameters, in less time.
    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/decode.py --shape 350m --codes 16 --repeats 1

Each image is `--codes` codes under guidance of weight 3 with top-p 0.9. Our decoder and
OPTForCausalLM.generate draw it in turn, both with weights in bf16; ours keeps embeddings and the
residual stream in float32. There are three cases:

- one prompt;
- eight different prompts, which transformers pads to the left in one batch;
- eight samples of one prompt that begins with a retrieved prefix, which transformers is given
  eight times.

Images a second are the median over the repeats after one that is not counted. The ratio is the
median of the ratios of single repeats, since within a repeat both find the machine equally busy.
Memory is the peak beyond the weights, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory_held import forget_peak, held_bytes, peak_bytes
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

Pair = tuple[np.ndarray, np.ndarray]
"""A prompt's ids (T,), and those of its unconditional stream."""


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
        "--one", nargs=2, help="measure in this process the memory of a case for `ours` or `opt`"
    )
    args = parser.parse_args()
    discover()
    vocab, fields = SHAPES[args.shape]
    if args.one:
        print(measure_memory(args, *args.one))
        return

    device = f"CPU, {torch.get_num_threads()} threads"
    if DEVICE.type == "cuda":
        device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}; {fields['layers']} layers, ", end="")
    print(f"width {fields['width']}, vocabulary {vocab.size:,}, ", end="")
    print(f"prompts of {args.prompt} tokens, {args.codes} codes an image\n")
    print(
        "| case | ours, images/s | transformers, images/s | ratio | ours, MiB "
        "| transformers, MiB |\n|---|---|---|---|---|---|"
    )
    model = decoder(args.shape, args.weights)
    other = opt(args.shape)
    for case in CASES:
        prompts = prompts_of(case, args, vocab)
        drawing = {
            "ours": partial(ours, model, vocab, args.codes, prompts),
            "opt": partial(transformers_generate, other, vocab, args.codes, prompts),
        }
        times = seconds_in_turn(drawing, args.repeats)
        own, theirs = np.array(times["ours"]), np.array(times["opt"])
        rates = f"{len(prompts) / np.median(own):.3g} | {len(prompts) / np.median(theirs):.3g}"
        ratio = np.median(theirs / own)

        # The peak of a process never falls, so each of these has one to itself.
        held = f"{memory_of(case, 'ours') / 2**20:,.0f} | {memory_of(case, 'opt') / 2**20:,.0f}"
        label = f"{case}, prefix {args.prefix}" if case == "8 samples" else case
        print(f"| {label} | {rates} | {ratio:.2f} | {held} |", flush=True)


def seconds_in_turn(
    drawing: dict[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each call, one of each in turn; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in drawing}
    for repeat in range(repeats + 1):
        for name, draw in drawing.items():
            start = time.perf_counter()
            draw()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def decoder(shape: str, weights: Weights) -> Transformer:
    """Our model with random weights, whose head is large enough for clear choices of tokens."""
    vocab, fields = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Transformer(Transformer.Config(**fields), vocab_size=vocab.size)
    torch.nn.init.normal_(model.head.weight, std=0.05)
    keep_weights(model, weights)
    return model.eval()


def opt(shape: str) -> Any:
    """The same weights in transformers' OPT, all in bf16."""
    return to_opt(decoder(shape, "float32")).to(DEVICE, torch.bfloat16)


def prompts_of(case: str, args: argparse.Namespace, vocab: Vocab) -> list[Pair]:
    """The prompts of a case, each with its unconditional stream."""
    rng = np.random.default_rng(0)
    prefix_T = np.empty(0, np.int64)
    if case == "8 samples":
        prefix_T = rng.integers(4, vocab.text_size, args.prefix)

    def one(length: int) -> Pair:
        caption_T = rng.integers(4, vocab.text_size, length - 2)
        begin_T = np.concatenate([[vocab.eos], prefix_T])
        return (
            np.concatenate([begin_T, caption_T, [vocab.brk]]),
            np.concatenate([begin_T, [vocab.sentinel(0), vocab.brk]]),
        )

    if case == "one prompt":
        return [one(args.prompt)]
    if case == "8 samples":
        return [one(args.prompt)] * 8

    # Prompts of eight lengths, so that transformers has to pad.
    return [one(args.prompt - 2 * number) for number in range(8)]


def ours(model: Transformer, vocab: Vocab, codes: int, prompts: list[Pair]) -> Any:
    """Draw an image for each prompt; equal prompts are the samples of one request."""
    image = DECODERS.build({"name": "top_p", "cfg": WEIGHT, "top_p": TOP_P})
    new = partial(grammar.image, vocab, codes)

    samples = 1
    if prompts[0] is prompts[-1]:
        prompts, samples = prompts[:1], len(prompts)
    requests = []
    for streams in prompts:
        request = Request(streams, new, codes, [{"image": image}] * samples, range(samples))
        requests.append(request)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        return answers(model, requests, vocab=vocab)


@torch.inference_mode()
def transformers_generate(model: Any, vocab: Vocab, codes: int, prompts: list[Pair]) -> Any:
    """Draw an image for each prompt in one batch, by transformers' guidance, among codes only."""
    # Only codes are allowed, so that no image ends early.
    low, high = vocab.id_range("image")
    closed = [token for token in range(vocab.size) if not low <= token < high]

    conditional, unconditional = zip(*prompts, strict=True)
    ids_BT, mask_BT = padded_left(conditional)
    negative_BT, negative_mask_BT = padded_left(unconditional)
    return model.generate(
        ids_BT,
        attention_mask=mask_BT,
        negative_prompt_ids=negative_BT,
        negative_prompt_attention_mask=negative_mask_BT,
        guidance_scale=WEIGHT,
        do_sample=True,
        top_p=TOP_P,
        top_k=0,
        max_new_tokens=codes,
        min_new_tokens=codes,
        eos_token_id=None,
        suppress_tokens=closed,
    )


def padded_left(rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask (B, T) of rows that end together."""
    longest = max(map(len, rows))
    ids_BT = np.zeros((len(rows), longest), np.int64)
    mask_BT = np.zeros((len(rows), longest), np.int64)
    for number, ids_T in enumerate(rows):
        ids_BT[number, longest - len(ids_T) :] = ids_T
        mask_BT[number, longest - len(ids_T) :] = 1
    return torch.from_numpy(ids_BT).to(DEVICE), torch.from_numpy(mask_BT).to(DEVICE)


def memory_of(case: str, way: str) -> int:
    """Measure `ours` or `opt` in a process of its own, by this script's option --one."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--one", case, way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure_memory(args: argparse.Namespace, case: str, way: str) -> int:
    """The most bytes held while one batch is drawn, beyond what is held before."""
    vocab, _ = SHAPES[args.shape]
    draw: Any
    model: Any
    if way == "ours":
        draw, model = ours, decoder(args.shape, args.weights)
    else:
        draw, model = transformers_generate, opt(args.shape)

    # What libraries keep after their first call is not counted.
    draw(model, vocab, 2, prompts_of("one prompt", args, vocab))
    before = held_bytes(DEVICE)
    forget_peak(DEVICE)
    draw(model, vocab, args.codes, prompts_of(case, args, vocab))
    return peak_bytes(DEVICE) - before


if __name__ == "__main__":
    main()
