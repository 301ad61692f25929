"""Images per second of the VQGAN's encoder and decoder, beside the libraries', on the same weights.

    OMP_NUM_THREADS=2 nice python benchmarks/image_tokenizers.py \\
        --variants eager channels_last compile

Two published geometries at 256x256 pixels: LlamaGen's ds16 beside transformers' JanusVQVAE, and f8
of taming-transformers beside diffusers' VQModel. The library's model, with random weights, is
written as a folder, and ours reads it. Before anything is timed, codes and reconstructions of the
two are compared. Where there is a GPU, it is measured too. A figure is the median of `--repeats`
calls after one that is not counted, theirs and ours in turn.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import VQModel
from torch import Tensor
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from cm3leon.tokenizers.image.published import PublishedVQ

SIDE = 256
"""Height and width of the images in pixels."""
VARIANTS = ("eager", "channels_last", "compile", "compile_channels_last")

Function = Callable[[Tensor], Tensor]


class Pair(NamedTuple):
    """One geometry, as the library has it and as we do."""

    name: str
    their_codes: Function
    """Codes (B, N) of images (B, C, H, W) in [-1, 1]."""
    their_signal: Function
    """Images (B, C, H, W) in [-1, 1] of codes (B, H, W)."""
    ours: PublishedVQ


class Row(NamedTuple):
    """One line of the table."""

    device: str
    geometry: str
    who: str
    what: str
    batch: int
    images_per_second: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometries", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["eager"], help="of ours"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    for device in devices:
        for geometry in args.geometries:
            # The folder of the library's model is gone before the next one is made.
            with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
                torch.manual_seed(0)
                print_table(MAKERS[geometry](Path(folder), device), device, args)


def print_table(pair: Pair, device: str, args: argparse.Namespace) -> None:
    """Print how far both agree, then a row for each model, direction and batch."""
    print(f"\n{agreement(pair, device)}; {torch.get_num_threads()} CPU threads\n")
    print("| device | geometry | who | what | batch | images/s |")
    print("|---|---|---|---|---|---|", flush=True)
    for row in measure(pair, device, args.variants, args.batches, args.repeats):
        print(
            f"| {row.device} | {row.geometry} | {row.who} | {row.what} | {row.batch} "
            f"| {row.images_per_second:.3f} |",
            flush=True,
        )


def llamagen_ds16(folder: Path, device: str) -> Pair:
    """LlamaGen's ds16 and Janus: 16x16 codes of 16384."""
    theirs = JanusVQVAE(JanusVQVAEConfig(num_patches=SIDE // 16)).eval()

    # LlamaGen normalizes codes before it compares them, and JanusVQVAE's `encode` does not. With
    # codes of length 1 both do the same.
    codebook_VD = theirs.quantize.embedding.weight.data
    codebook_VD.copy_(torch.nn.functional.normalize(codebook_VD, dim=-1))
    theirs.save_pretrained(folder)
    theirs.to(device)
    return Pair(
        "ds16 (transformers JanusVQVAE)",
        lambda signal_BCHW: theirs.encode(signal_BCHW).image_tokens.view(len(signal_BCHW), -1),
        lambda codes_BHW: theirs.decode(codes_BHW.flatten(1)),
        PublishedVQ(PublishedVQ.Config(path=folder, image_size=SIDE)).to(device),
    )


def taming_f8(folder: Path, device: str) -> Pair:
    """taming-transformers' f8, but with Euclidean distance: 32x32 codes of 8192."""
    theirs = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        block_out_channels=(128, 128, 256, 512),
        layers_per_block=2,
        latent_channels=256,
        num_vq_embeddings=8192,
    ).eval()
    theirs.quantize.embedding.weight.data.normal_()
    theirs.save_pretrained(folder)
    theirs.to(device)

    # Its own `encode` and `decode` return more than is compared.
    def codes_of(signal_BCHW: Tensor) -> Tensor:
        _, _, (_, _, codes_N) = theirs.quantize(theirs.encode(signal_BCHW).latents)
        return codes_N.view(len(signal_BCHW), -1)

    def signal_of(codes_BHW: Tensor) -> Tensor:
        latents_BCHW = theirs.quantize.embedding(codes_BHW).permute(0, 3, 1, 2)
        return theirs.decoder(theirs.post_quant_conv(latents_BCHW))

    return Pair(
        "f8 (diffusers VQModel)",
        codes_of,
        signal_of,
        PublishedVQ(PublishedVQ.Config(path=folder, image_size=SIDE)).to(device),
    )


MAKERS = {"ds16": llamagen_ds16, "f8": taming_f8}


def agreement(pair: Pair, device: str) -> str:
    """How far ours and theirs agree on the codes of an image, and on the image of given codes."""
    signal_BCHW, codes_BHW = inputs(pair, 1, device)
    equal_BN = pair.ours.codes_of(signal_BCHW).flatten(1) == pair.their_codes(signal_BCHW)
    same = equal_BN.float().mean().item()
    apart = (pair.ours.signal_of(codes_BHW) - pair.their_signal(codes_BHW)).abs().max().item()
    return (
        f"{device}, {pair.name}: {same:.1%} of the codes are the same; "
        f"reconstructions differ by {apart:.1e} at most"
    )


def measure(
    pair: Pair, device: str, variants: list[str], batches: list[int], repeats: int
) -> Iterator[Row]:
    """Time theirs and every variant of ours in turn."""
    encoders, decoders = {"theirs": pair.their_codes}, {"theirs": pair.their_signal}
    for variant in variants:
        encode, decode = functions(pair.ours, variant)
        encoders[f"ours, {variant}"], decoders[f"ours, {variant}"] = encode, decode

    for batch in batches:
        signal_BCHW, codes_BHW = inputs(pair, batch, device)
        for what, models, given in (
            ("encode", encoders, signal_BCHW),
            ("decode", decoders, codes_BHW),
        ):
            seconds: dict[str, list[float]] = {who: [] for who in models}
            for _ in range(1 + repeats):
                for who, function in models.items():
                    seconds[who].append(timed(function, given, device))

            # The first call allocates and compiles, and is not counted.
            for who, times in seconds.items():
                yield Row(device, pair.name, who, what, batch, batch / statistics.median(times[1:]))


def functions(tokenizer: PublishedVQ, variant: str) -> tuple[Function, Function]:
    """Images to codes, and codes to images, in one of the variants."""
    if variant.endswith("channels_last"):
        tokenizer = copy.deepcopy(tokenizer).to(memory_format=torch.channels_last)
    both = tokenizer.codes_of, tokenizer.signal_of
    if variant.startswith("compile"):
        return torch.compile(both[0], dynamic=False), torch.compile(both[1], dynamic=False)
    return both


def inputs(pair: Pair, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Random images and random codes."""
    grid = pair.ours.grid
    signal_BCHW = torch.rand(batch, 3, SIDE, SIDE, device=device) * 2 - 1
    return signal_BCHW, torch.randint(pair.ours.codebook_size, (batch, grid, grid), device=device)


def timed(function: Callable[[Tensor], Tensor], given: Tensor, device: str) -> float:
    """Seconds of one call, until the device has finished it."""
    synchronize(device)
    start = time.perf_counter()
    function(given)
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
