"""Small image tokenizers on disk, named and nested as their publishers do, with random tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

SMALL: dict[str, Any] = {
    "channels": 32,
    "multipliers": (1, 2),
    "residual_blocks": 1,
    "attention_levels": (1,),
    "z_channels": 32,
    "code_dim": 8,
    "codebook_size": 16,
}
"""A geometry that encodes 16x16 pixels in milliseconds."""


def pretrained(root: Path) -> dict[str, Any]:
    """Write a file for the tokenizer `pretrained`, and return the settings that name it."""
    return {"path": str(write_taming(root / "vqgan.ckpt", random_tensors(taming_shapes(**SMALL))))}


def emu3(root: Path) -> dict[str, Any]:
    """Write a folder for the tokenizer `emu3` by its own library, and return the settings."""
    library = pytest.importorskip("transformers")
    shape: dict[str, Any] = {"base_channels": 32, "channel_multiplier": [1, 1], "hidden_size": 32}
    config = library.Emu3VQVAEConfig(
        codebook_size=16, num_res_blocks=1, attn_resolutions=[1], **shape
    )
    library.Emu3VQVAE(config).save_pretrained(root / "emu3")
    return {"path": str(root / "emu3"), "image_size": 16}


IMAGE_TOKENIZER_FILES = {"pretrained": pretrained, "chameleon": pretrained, "emu3": emu3}
"""By the name of an image tokenizer that reads a file: writes a small one, returns the settings."""


def random_tensors(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """Tensors whose scale keeps signals of the order of 1 through many layers."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _random(name, tuple(shape), generator) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    tensor = torch.randn(shape, generator=generator)
    if "norm" in name:
        center = 1.0 if name.endswith("weight") else 0.0
        return center + 0.1 * tensor
    if "embed" in name:
        return tensor
    if tensor.dim() <= 1:
        return 0.1 * tensor
    return tensor / tensor[0].numel() ** 0.5


# -------------------------------------------------------------------------------- names and shapes


def _conv(name: str, out: int, into: int, side: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into, side, side)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _block(name: str, into: int, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm1", into)
    yield from _conv(f"{name}.conv1", out, into, 3)
    yield from _norm(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out, 3)
    if into != out:
        yield from _conv(f"{name}.nin_shortcut", out, into, 1)


def _attention(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.{part}", width, width, 1)


def _network(
    words: Mapping[str, str],
    *,
    channels: int,
    multipliers: Sequence[int],
    residual_blocks: int,
    attention_levels: Sequence[int],
    z_channels: int,
    finest_first: bool,
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of an encoder's and an image decoder's tensors.

    Args:
        words: how the publisher calls the parts: the levels "down" and "up", a level's "block", and
            the middle's parts "0", "1", "2" where they have names of their own.
        finest_first: whether the image decoder's level 0 is the one of full resolution.
    """
    widths = [channels * multiplier for multiplier in multipliers]
    last = len(widths) - 1

    # The middle: a residual block, attention, a residual block, all of the deepest level's width.
    deepest = widths[-1]
    for side in ("encoder", "decoder"):
        yield from _block(f"{side}.mid.{words.get('0', '0')}", deepest, deepest)
        yield from _attention(f"{side}.mid.{words.get('1', '1')}", deepest)
        yield from _block(f"{side}.mid.{words.get('2', '2')}", deepest, deepest)

    yield from _conv("encoder.conv_in", channels, 3, 3)
    yield from _norm("encoder.norm_out", deepest)
    yield from _conv("encoder.conv_out", z_channels, deepest, 3)
    yield from _conv("decoder.conv_in", deepest, z_channels, 3)
    yield from _norm("decoder.norm_out", channels * multipliers[0])
    yield from _conv("decoder.conv_out", 3, channels * multipliers[0], 3)

    for level, width in enumerate(widths):
        down = f"encoder.{words['down']}.{level}"
        up = f"decoder.{words['up']}.{level if finest_first else last - level}"

        # A level's first block takes the width of the level that comes before it on its side.
        from_above = widths[level - 1] if level else channels
        from_below = widths[min(level + 1, last)]
        for name, before, count in (
            (down, from_above, residual_blocks),
            (up, from_below, residual_blocks + 1),
        ):
            for number in range(count):
                into = width if number else before
                yield from _block(f"{name}.{words['block']}.{number}", into, width)
                if level in attention_levels:
                    yield from _attention(f"{name}.attn.{number}", width)

        if level < last:
            yield from _conv(f"{down}.downsample.conv", width, width, 3)
        if level:
            yield from _conv(f"{up}.upsample.conv", width, width, 3)


def _projections(z_channels: int, code_dim: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _conv("quant_conv", code_dim, z_channels, 1)
    yield from _conv("post_quant_conv", z_channels, code_dim, 1)


def taming_shapes(
    *, code_dim: int, codebook_size: int, gumbel: bool = False, **network: Any
) -> dict[str, Any]:
    """Names and shapes of CompVis/taming-transformers: level 0 of its decoder is full
    resolution."""
    words = {
        "down": "down",
        "up": "up",
        "block": "block",
        "0": "block_1",
        "1": "attn_1",
        "2": "block_2",
    }
    shapes = dict(_network(words, finest_first=True, **network))
    shapes.update(_projections(network["z_channels"], code_dim))
    if gumbel:
        shapes.update(_conv("quantize.proj", codebook_size, code_dim, 1))
        return {**shapes, "quantize.embed.weight": (codebook_size, code_dim)}
    return {**shapes, "quantize.embedding.weight": (codebook_size, code_dim)}


def llamagen_shapes(*, code_dim: int, codebook_size: int, **network: Any) -> dict[str, Any]:
    """Names and shapes of FoundationVision/LlamaGen: block 0 of its decoder is the coarsest."""
    words = {"down": "conv_blocks", "up": "conv_blocks", "block": "res"}
    shapes = dict(_network(words, finest_first=False, **network))
    shapes.update(_projections(network["z_channels"], code_dim))
    return {
        **shapes,
        "quantize.embedding.weight": (codebook_size, code_dim),
        "quantize.codebook_used": (65536,),
    }


# ------------------------------------------------------------------------------------------- files


def write_taming(file: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write the tensors as Lightning does: under `state_dict`, beside counters and an optimizer.

    The loss's own tensors stand among them, as its networks are part of the trained module.
    """
    loss = {
        "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 4, 1, 1),
    }
    optimizer = [
        {
            "state": {0: {"step": 1, "exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 1e-4, "params": [0]}],
        }
    ]

    torch.save(
        {
            "epoch": 1,
            "global_step": 2,
            "state_dict": {**tensors, **loss},
            "optimizer_states": optimizer,
        },
        file,
    )
    return file


def write_llamagen(file: Path, tensors: Mapping[str, Tensor], under: str = "model") -> Path:
    """Write the tensors under `model`, as the publisher's trainer does, or under `ema`."""
    torch.save({under: dict(tensors), "steps": 3}, file)
    return file


def write_folder(
    folder: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    name: str = "model.safetensors",
) -> Path:
    """Write a Hugging Face folder with its weights in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder


def split_in_two(
    folder: Path, tensors: Mapping[str, Tensor], name: str = "model.safetensors"
) -> Path:
    """Replace a folder's file of weights by two parts and an index."""
    (folder / name).unlink()
    keys = sorted(tensors)
    parts = {f"model-0000{number + 1}-of-00002.safetensors": keys[number::2] for number in range(2)}
    for part, names in parts.items():
        save_file({key: tensors[key].contiguous() for key in names}, folder / part)
    weight_map = {key: part for part, names in parts.items() for key in names}
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
