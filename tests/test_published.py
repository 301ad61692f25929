"""Published image tokenizers agree with the libraries that they come from, on random weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from published import (
    SMALL,
    llamagen_shapes,
    random_tensors,
    split_in_two,
    taming_shapes,
    write_folder,
    write_llamagen,
    write_taming,
)
from safetensors.torch import save_file
from torch import Tensor

from cm3leon.registry import IMAGE_TOKENIZERS
from cm3leon.tokenizers.image.base import to_signal
from cm3leon.tokenizers.image.published import PublishedVQ
from cm3leon.types import UserError
from cm3leon.weights import load_weights, save_weights

pytestmark = pytest.mark.stack

SIDE = 32
GEOMETRY: dict[str, Any] = {
    "channels": 32,
    "multipliers": (1, 2, 2),
    "residual_blocks": 2,
    "attention_levels": (2,),
    "z_channels": 32,
    "code_dim": 8,
    "codebook_size": 64,
}


def build(path: Path, **settings: Any) -> PublishedVQ:
    return IMAGE_TOKENIZERS.build({"name": "pretrained", "path": str(path), **settings})


def pixels(count: int = 2, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def randomize(model: torch.nn.Module) -> dict[str, Tensor]:
    """Give a model random tensors, and return its state."""
    state = random_tensors({name: tensor.shape for name, tensor in model.state_dict().items()})
    model.load_state_dict(state)
    model.eval()
    return state


def same(
    tokenizer: PublishedVQ,
    codes_of: Callable[[Tensor], Tensor],
    signal_of: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Compare codes and reconstructions with those of other functions on the same images."""
    images_BHWC = pixels(side=tokenizer.image_size)
    signal_BCHW = to_signal(torch.from_numpy(images_BHWC))

    with torch.no_grad():
        codes_BN = tokenizer.encode(images_BHWC)
        assert codes_BN.shape == (len(images_BHWC), tokenizer.grid**2)
        assert len(np.unique(codes_BN)) > 4, "codes that are all alike show nothing"
        assert codes_BN.ravel().tolist() == codes_of(signal_BCHW).flatten().tolist()

        if signal_of:
            codes_BHW = torch.from_numpy(codes_BN).unflatten(1, (tokenizer.grid, -1))
            torch.testing.assert_close(
                tokenizer.signal_of(codes_BHW), signal_of(codes_BHW), atol=1e-4, rtol=1e-4
            )


# --------------------------------------------------------------------------------------- references


def janus() -> Any:
    """transformers' JanusVQVAE with codes of length 1.

    Its `encode` does not normalize the codebook, which makes no difference to such codes.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=64,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 2, 2],
        num_patches=SIDE // 4,
    )
    model = transformers.models.janus.modeling_janus.JanusVQVAE(config)
    randomize(model)
    codebook_VD = model.quantize.embedding.weight.data
    codebook_VD.copy_(torch.nn.functional.normalize(codebook_VD, dim=-1))
    return model


def chameleon() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ChameleonVQVAEConfig(
        embed_dim=8,
        num_embeddings=64,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 2, 2],
        resolution=SIDE,
    )
    model = transformers.models.chameleon.modeling_chameleon.ChameleonVQVAE(config)
    randomize(model)
    return model


def transformers_codes(model: Any) -> Callable[[Tensor], Tensor]:
    def codes_of(signal_BCHW: Tensor) -> Tensor:
        found = model.encode(signal_BCHW)
        # Versions of the library before 5 return a tuple.
        return found[2] if isinstance(found, tuple) else found.image_tokens

    return codes_of


def diffusers_model(
    levels: int = 3, *, attention: bool = True, size: int = 64, dim: int = 8, z: int = 32
) -> Any:
    diffusers = pytest.importorskip("diffusers")
    if attention:
        last_down, last_up = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
    else:
        last_down, last_up = "DownEncoderBlock2D", "UpDecoderBlock2D"

    # Attention, if any, is at the lowest resolution only.
    model = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + (last_down,),
        up_block_types=(last_up,) + ("UpDecoderBlock2D",) * (levels - 1),
        block_out_channels=(32, *(64,) * (levels - 1)),
        layers_per_block=2,
        latent_channels=z,
        vq_embed_dim=dim,
        num_vq_embeddings=size,
    )
    randomize(model)
    return model


def diffusers_codes(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda signal_BCHW: model.quantize(model.encode(signal_BCHW).latents)[2][2]


def diffusers_signal(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda codes_BHW: model.decoder(
        model.post_quant_conv(model.quantize.embedding(codes_BHW).permute(0, 3, 1, 2))
    )


TO_TAMING = (
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("down_blocks", "down"),
    ("up_blocks", "up"),
    ("resnets", "block"),
    ("attentions", "attn"),
    ("conv_norm_out", "norm_out"),
    ("group_norm", "norm"),
    ("to_out.0", "proj_out"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("conv_shortcut", "nin_shortcut"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
)


def as_taming(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """diffusers' tensors by taming's names; diffusers' own script converts the other way."""
    named = {}
    for key, tensor in state.items():
        for theirs, taming in TO_TAMING:
            key = key.replace(theirs, taming)
        # taming counts the levels of the decoder from the end, and its attention is a convolution.
        key = re.sub(r"decoder\.up\.(\d)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", key)
        is_attention = re.search(r"\.(q|k|v|proj_out)\.weight$", key)
        named[key] = tensor[:, :, None, None] if is_attention else tensor
    return named


def as_llamagen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Janus's tensors by LlamaGen's names; transformers' own script converts the other way."""
    words = (
        ("coder.down.", "coder.conv_blocks."),
        ("coder.up.", "coder.conv_blocks."),
        (".block.", ".res."),
        ("mid.block_1", "mid.0"),
        ("mid.attn_1", "mid.1"),
        ("mid.block_2", "mid.2"),
    )
    named = {}
    for key, tensor in state.items():
        for theirs, llamagen in words:
            key = key.replace(theirs, llamagen)
        named[key] = tensor
    return {**named, "quantize.codebook_used": torch.zeros(65536)}


# ------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(("levels", "attention"), [(4, True), (3, False)])
def test_taming_is_diffusers_model_under_other_names(
    tmp_path: Path, levels: int, attention: bool
) -> None:
    model = diffusers_model(levels, attention=attention)
    file = write_taming(tmp_path / "last.ckpt", as_taming(model.state_dict(), levels))
    tokenizer = build(file, image_size=SIDE)
    assert tokenizer.layout == "taming"
    assert (tokenizer.downsampling, tokenizer.codebook_size) == (2 ** (levels - 1), 64)
    same(tokenizer, diffusers_codes(model), diffusers_signal(model))


def test_taming_codebook_by_moving_averages_is_read_too(tmp_path: Path) -> None:
    tensors = random_tensors(taming_shapes(**GEOMETRY))
    plain = build(write_taming(tmp_path / "a.ckpt", tensors), image_size=SIDE)
    averages = {
        "quantize.embedding.cluster_size": torch.ones(64),
        "quantize.embedding.embed_avg": torch.ones(64, 8),
    }
    other = build(write_taming(tmp_path / "b.ckpt", tensors | averages), image_size=SIDE)
    assert np.array_equal(plain.encode(pixels()), other.encode(pixels()))


def test_gumbel_takes_the_most_likely_code(tmp_path: Path) -> None:
    model = diffusers_model(4, dim=32)

    # This layout projects latents to logits, and has another name for the codebook.
    extra = random_tensors({"quantize.proj.weight": (64, 32, 1, 1), "quantize.proj.bias": (64,)})
    tensors = as_taming(model.state_dict(), 4) | extra
    tensors["quantize.embed.weight"] = tensors.pop("quantize.embedding.weight")

    tokenizer = build(write_taming(tmp_path / "vqgan_gumbel_f8.ckpt", tensors), image_size=SIDE)

    def codes_of(signal_BCHW: Tensor) -> Tensor:
        logits_BVHW = torch.nn.functional.conv2d(
            model.encode(signal_BCHW).latents,
            extra["quantize.proj.weight"],
            extra["quantize.proj.bias"],
        )
        return logits_BVHW.argmax(1)

    assert tokenizer.downsampling == 8
    same(tokenizer, codes_of, diffusers_signal(model))


def test_taming_itself_gives_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taming = pytest.importorskip("taming.modules.diffusionmodules.model")
    quantize = pytest.importorskip("taming.modules.vqvae.quantize")
    network = {
        "ch": 32,
        "out_ch": 3,
        "ch_mult": (1, 2, 2),
        "num_res_blocks": 2,
        "attn_resolutions": [8],
        "in_channels": 3,
        "resolution": SIDE,
        "z_channels": 32,
        "double_z": False,
    }

    # The parts of taming's VQModel, without its trainer.
    model = torch.nn.ModuleDict(
        {
            "encoder": taming.Encoder(**network),
            "decoder": taming.Decoder(**network),
            "quantize": quantize.VectorQuantizer(64, 8, 0.25),
            "quant_conv": torch.nn.Conv2d(32, 8, 1),
            "post_quant_conv": torch.nn.Conv2d(8, 32, 1),
        }
    )

    def codes_of(signal_BCHW: Tensor) -> Tensor:
        return model["quantize"](model["quant_conv"](model["encoder"](signal_BCHW)))[2][2]

    def signal_of(codes_BHW: Tensor) -> Tensor:
        latent_BCHW = model["quantize"].embedding.weight[codes_BHW].permute(0, 3, 1, 2)
        return model["decoder"](model["post_quant_conv"](latent_BCHW))

    tokenizer = build(write_taming(tmp_path / "last.ckpt", randomize(model)), image_size=SIDE)
    same(tokenizer, codes_of, signal_of)


@pytest.mark.parametrize("under", ["model", "ema"])
def test_llamagen_is_transformers_janus_under_other_names(tmp_path: Path, under: str) -> None:
    model = janus()
    file = write_llamagen(tmp_path / "vq.pt", as_llamagen(model.state_dict()), under)
    tokenizer = build(file, image_size=SIDE)
    assert tokenizer.layout == "llamagen"
    same(
        tokenizer,
        transformers_codes(model),
        lambda codes_BHW: model.decode(codes_BHW.flatten(1)),
    )


def test_cosine_codes_do_not_depend_on_the_lengths_of_the_codebook(tmp_path: Path) -> None:
    """LlamaGen normalizes its codebook; transformers' `encode` does not and would differ."""
    model = janus()
    state = as_llamagen(model.state_dict())
    key = "quantize.embedding.weight"
    longer = state | {key: state[key] * torch.linspace(0.5, 3, 64)[:, None]}
    for number, tensors in enumerate((state, longer)):
        tokenizer = build(write_llamagen(tmp_path / f"{number}.pt", tensors), image_size=SIDE)
        same(
            tokenizer,
            transformers_codes(model),
            lambda codes_BHW: model.decode(codes_BHW.flatten(1)),
        )


def test_janus_folder(tmp_path: Path) -> None:
    model = janus()
    model.save_pretrained(tmp_path)
    tokenizer = build(tmp_path)
    assert (tokenizer.layout, tokenizer.image_size) == ("janus", SIDE)
    same(
        tokenizer,
        transformers_codes(model),
        lambda codes_BHW: model.decode(codes_BHW.flatten(1)),
    )


def test_chameleon_folder_encodes_and_says_that_it_cannot_decode(tmp_path: Path) -> None:
    model = chameleon()
    model.save_pretrained(tmp_path)
    tokenizer = build(tmp_path)
    assert (tokenizer.layout, tokenizer.image_size) == ("taming", SIDE)
    same(tokenizer, transformers_codes(model))
    with pytest.raises(UserError, match="has no decoder"):
        tokenizer.decode(np.zeros((1, 64), np.int64))


def test_chameleon_file_has_a_decoder(tmp_path: Path) -> None:
    """The encoder is transformers'; the rest is random, under taming's names."""
    model = chameleon()
    shapes = taming_shapes(**{**GEOMETRY, "attention_levels": ()})
    file = write_taming(tmp_path / "vqgan.ckpt", random_tensors(shapes) | model.state_dict())
    tokenizer = build(file, image_size=SIDE)
    same(tokenizer, transformers_codes(model))
    assert tokenizer.decode(np.zeros((1, 64), np.int64)).shape == (1, SIDE, SIDE, 3)


@pytest.mark.parametrize("prefix", ["model.vqmodel.", "vqmodel."])
@pytest.mark.parametrize("parts", [1, 2])
def test_tokenizer_within_a_bigger_model_in_parts(tmp_path: Path, prefix: str, parts: int) -> None:
    model = chameleon()
    state = {
        f"{prefix}{key}": tensor.to(torch.bfloat16) for key, tensor in model.state_dict().items()
    }
    state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(4, 4)

    folder = write_folder(tmp_path / "chameleon", {"vq_config": {"resolution": SIDE}}, state)
    if parts == 2:
        split_in_two(folder, state)

    tokenizer = build(folder)
    assert tokenizer.image_size == SIDE
    assert all(tensor.dtype == torch.float32 for tensor in tokenizer.state_dict().values())

    # The reference rounds its weights as the file has them.
    model.to(torch.bfloat16).float()
    same(tokenizer, transformers_codes(model))


def test_whole_janus_says_its_size_in_patches(tmp_path: Path) -> None:
    tensors = {f"model.vqmodel.{key}": tensor for key, tensor in janus().state_dict().items()}
    settings = {
        "vision_config": {"image_size": 384, "patch_size": 16},
        "vq_config": {"num_patches": 32},
    }
    tokenizer = build(write_folder(tmp_path / "janus", settings, tensors))
    assert (tokenizer.grid, tokenizer.image_size) == (24, 24 * 4)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]
)
def test_diffusers_folder(tmp_path: Path, early: bool, name: str) -> None:
    model = diffusers_model()
    # Early versions of the library had other names.
    words = {}
    if early:
        words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, tensor in model.state_dict().items():
        for now, then in words.items():
            key = key.replace(now, then)
        state[key] = tensor

    folder = write_folder(tmp_path / "vqvae", dict(model.config), state, name)
    tokenizer = build(folder, image_size=SIDE)
    assert tokenizer.layout == "diffusers"
    same(tokenizer, diffusers_codes(model), diffusers_signal(model))


def test_diffusers_model_of_another_kind_is_named_by_what_it_lacks(tmp_path: Path) -> None:
    """aMUSEd's model has no attention in the middle, and a continuous autoencoder no codebook."""
    state = diffusers_model().state_dict()
    for left_out in ("encoder.mid_block.attentions", "quantize"):
        rest = {key: tensor for key, tensor in state.items() if not key.startswith(left_out)}
        folder = write_folder(tmp_path / left_out, {}, rest, "diffusion_pytorch_model.safetensors")
        with pytest.raises(UserError, match=rf"lacks {left_out}"):
            build(folder)


# ---------------------------------------------------------------------------------- published sizes

FULL = {"channels": 128, "residual_blocks": 2, "z_channels": 256}
F8 = {
    **FULL,
    "multipliers": (1, 1, 2, 4),
    "attention_levels": (3,),
    "code_dim": 256,
    "codebook_size": 8192,
}
F16 = {
    **FULL,
    "multipliers": (1, 1, 2, 2, 4),
    "attention_levels": (4,),
    "code_dim": 256,
    "codebook_size": 16384,
}
CHAMELEON = {**F16, "attention_levels": (), "codebook_size": 8192}
LLAMAGEN_16 = {**F16, "code_dim": 8}
LLAMAGEN_8 = {**LLAMAGEN_16, "multipliers": (1, 2, 2, 4), "attention_levels": (3,)}


@pytest.mark.parametrize(
    ("shapes", "image_size", "grid", "codes", "millions"),
    [
        pytest.param(taming_shapes(**F8, gumbel=True), 256, 32, 8192, 0, id="vqgan_gumbel_f8"),
        pytest.param(taming_shapes(**F16), 256, 16, 16384, 0, id="vqgan_imagenet_f16_16384"),
        pytest.param(taming_shapes(**CHAMELEON), 512, 32, 8192, 0, id="chameleon"),
        pytest.param(llamagen_shapes(**LLAMAGEN_16), 256, 16, 16384, 72, id="vq_ds16_c2i"),
        pytest.param(llamagen_shapes(**LLAMAGEN_8), 256, 32, 16384, 70, id="vq_ds8_c2i"),
    ],
)
def test_published_geometry_is_inferred_without_memory(
    tmp_path: Path, shapes: Mapping[str, Any], image_size: int, grid: int, codes: int, millions: int
) -> None:
    file = tmp_path / "weights.ckpt"
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    torch.save({"state_dict": state}, file)
    with torch.device("meta"):
        tokenizer = build(file, image_size=image_size)
    assert all(tensor.is_meta for tensor in tokenizer.state_dict().values())
    assert (tokenizer.grid, tokenizer.codebook_size) == (grid, codes)

    count = sum(parameter.numel() for parameter in tokenizer.parameters())
    counted = [shape for key, shape in shapes.items() if key != "quantize.codebook_used"]
    assert count == sum(np.prod(shape) for shape in counted)
    # The README of FoundationVision/LlamaGen says how many millions it has.
    if millions:
        assert round(count / 1e6) == millions


# ------------------------------------------------------------------------------------- use in a run


def test_weights_are_saved_and_read_by_our_names(tmp_path: Path) -> None:
    file = write_taming(tmp_path / "vqgan.ckpt", random_tensors(taming_shapes(**SMALL)))
    tokenizer = build(file, image_size=16)
    save_weights(tmp_path / "model.safetensors", tokenizer)
    another = write_taming(tmp_path / "b.ckpt", random_tensors(taming_shapes(**SMALL), seed=1))
    other = build(another, image_size=16)

    images_BHWC = pixels(side=16)
    assert not np.array_equal(tokenizer.encode(images_BHWC), other.encode(images_BHWC))
    load_weights(tmp_path / "model.safetensors", other)
    assert np.array_equal(tokenizer.encode(images_BHWC), other.encode(images_BHWC))


def test_meta_device_takes_sizes_only(tmp_path: Path) -> None:
    file = write_taming(tmp_path / "vqgan.ckpt", random_tensors(taming_shapes(**SMALL)))
    with torch.device("meta"):
        tokenizer = build(file, image_size=16)
    assert all(tensor.is_meta for tensor in tokenizer.state_dict().values())
    assert tokenizer.codebook_size == 16


def test_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    file = write_taming(tmp_path / "vqgan.ckpt", random_tensors(taming_shapes(**SMALL)))
    before = build(file).fingerprint()
    assert build(file).fingerprint() == before
    write_taming(file, random_tensors(taming_shapes(**SMALL), seed=1))
    assert build(file).fingerprint() != before


def test_fingerprint_does_not_change_with_the_place_or_the_time(tmp_path: Path) -> None:
    file = write_taming(tmp_path / "vqgan.ckpt", random_tensors(taming_shapes(**SMALL)))
    moved = shutil.copyfile(file, tmp_path / "renamed.ckpt")
    os.utime(moved, ns=(1, 1))
    assert build(moved).fingerprint() == build(file).fingerprint()


@pytest.mark.parametrize("gumbel", [False, True])
def test_a_run_builds_it_of_what_it_has_kept_when_the_file_is_gone(
    tmp_path: Path, gumbel: bool
) -> None:
    shapes = taming_shapes(**SMALL, gumbel=gumbel)
    file = write_taming(tmp_path / "vqgan.ckpt", random_tensors(shapes))

    tokenizer = build(file, image_size=16)
    save_weights(tmp_path / "model.safetensors", tokenizer)

    # What the run keeps: the weights by our names, and the geometry as JSON.
    kept = json.loads(json.dumps(tokenizer.geometry()))

    file.unlink()
    section = {"name": "pretrained", "path": str(file)}
    other = IMAGE_TOKENIZERS.build(section, kept=kept)
    load_weights(tmp_path / "model.safetensors", other)

    codes_BN = tokenizer.encode(pixels(side=16))
    assert other.image_size == 16
    assert np.array_equal(other.encode(pixels(side=16)), codes_BN)
    assert np.array_equal(other.decode(codes_BN), tokenizer.decode(codes_BN))

    with torch.device("meta"):
        shape = IMAGE_TOKENIZERS.build(section, kept=kept)
    assert (shape.codebook_size, shape.grid) == (tokenizer.codebook_size, tokenizer.grid)


def test_it_is_not_trained_and_the_file_may_go(tmp_path: Path) -> None:
    file = write_taming(tmp_path / "vqgan.ckpt", random_tensors(taming_shapes(**SMALL)))
    tokenizer = build(file, image_size=16)
    codes_BN = tokenizer.encode(pixels(side=16))
    file.write_bytes(bytes(file.stat().st_size))
    assert np.array_equal(tokenizer.encode(pixels(side=16)), codes_BN)
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    with pytest.raises(UserError, match="used as it is"):
        tokenizer.training_module()


# ----------------------------------------------------------------------------------------- mistakes


def test_class_of_lightning_in_a_checkpoint_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's checkpoints have classes of callbacks as keys; it is not needed to read them."""
    # A stand-in for Lightning, as it was where the checkpoint was written.
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    callback = type("ModelCheckpoint", (), {"__module__": name})
    monkeypatch.setattr(sys.modules[name], "ModelCheckpoint", callback, raising=False)

    tensors = random_tensors(taming_shapes(**SMALL))
    torch.save(
        {"state_dict": tensors, "callbacks": {callback: {"best": 1.0}}}, tmp_path / "last.ckpt"
    )

    monkeypatch.undo()
    assert build(tmp_path / "last.ckpt", image_size=16).layout == "taming"


@pytest.mark.parametrize("as_zip", [True, False], ids=["today", "before_torch_1.6"])
def test_plain_data_beside_the_weights_are_no_code(tmp_path: Path, as_zip: bool) -> None:
    """There may be metrics that numpy computed, and a trainer's command line with its paths."""
    file, tensors = tmp_path / "last.ckpt", random_tensors(taming_shapes(**SMALL))
    numbers = [np.float64(0.5), np.float32(2), np.int64(3), np.bool_(True), np.float16(1)]
    content = {
        "state_dict": OrderedDict(tensors),
        "best": numbers,
        "dtype": np.dtype("float32"),
        "curve": np.arange(6.0).reshape(2, 3),
        "names": np.array(["a", "b"]),
        "random": np.random.RandomState(0).get_state(),
        "args": Namespace(out=Path("runs/x"), rate=np.float32(0.1)),
    }
    torch.save(content, file, _use_new_zipfile_serialization=as_zip)
    assert build(file).layout == "taming"


@pytest.mark.parametrize("name", ["ema", "state_dict_ema"])
@pytest.mark.parametrize("inside", [False, True], ids=["", "module"])
def test_averages_beside_the_weights_are_what_is_published(
    tmp_path: Path, name: str, inside: bool
) -> None:
    """Where a file has both, LlamaGen's own figures are those of `ema`."""
    latest = random_tensors(llamagen_shapes(**SMALL), 0)
    averages = random_tensors(llamagen_shapes(**SMALL), 1)
    file = tmp_path / "vq.pt"
    torch.save({"model": latest, name: {"module": averages} if inside else averages}, file)

    torch.save({"model": averages}, tmp_path / "averages.pt")
    expected = build(tmp_path / "averages.pt").state_dict()
    for key, tensor in build(file).state_dict().items():
        assert torch.equal(tensor, expected[key])


def test_averages_of_some_weights_leave_the_others(tmp_path: Path) -> None:
    latest = random_tensors(llamagen_shapes(**SMALL))
    changed = "encoder.conv_in.weight"
    torch.save({"model": latest, "ema": {changed: latest[changed] + 1}}, tmp_path / "vq.pt")
    torch.save({"model": latest}, tmp_path / "latest.pt")

    found = build(tmp_path / "vq.pt").state_dict()
    plain = build(tmp_path / "latest.pt").state_dict()
    assert torch.equal(found[changed], plain[changed] + 1)
    assert all(torch.equal(found[key], plain[key]) for key in plain.keys() - {changed})


@pytest.mark.parametrize(
    "averages",
    [{"shadow_params": [torch.ones(3)], "decay": 0.9}, {"module.other": torch.ones(3)}],
)
def test_averages_that_are_not_named_as_the_weights_are_refused(
    tmp_path: Path, averages: dict[str, Any]
) -> None:
    file = tmp_path / "vq.pt"
    torch.save({"model": random_tensors(llamagen_shapes(**SMALL)), "ema": averages}, file)
    with pytest.raises(UserError, match="averages of its weights under ema that are not named"):
        build(file)

    # A model that was trained without averages.
    torch.save({"model": random_tensors(llamagen_shapes(**SMALL)), "ema": None}, file)
    assert build(file).layout == "llamagen"


def test_a_folder_with_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {}, random_tensors(taming_shapes(**SMALL)))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"folder holds adapter_config\.json, an adapter"):
        build(folder)


class Code:
    def __reduce__(self) -> Any:
        return print, ("this must not be printed",)


@pytest.mark.parametrize("as_zip", [True, False], ids=["today", "before_torch_1.6"])
def test_pickle_with_code_is_not_opened(
    tmp_path: Path, as_zip: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    file, content = tmp_path / "last.ckpt", {"state_dict": random_tensors(taming_shapes(**SMALL))}
    torch.save(content, file, _use_new_zipfile_serialization=as_zip)
    assert build(file).layout == "taming"

    torch.save({**content, "extra": Code()}, file, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(UserError, match=r"last\.ckpt is a pickle that names code \(\S*print\)"):
        build(file)
    assert "must not" not in capsys.readouterr().out


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no weights at .*nowhere\.ckpt"):
        build(tmp_path / "nowhere.ckpt")

    # Files that are no checkpoints at all.
    contents = {
        "text.ckpt": b"just words\n",
        "empty.ckpt": b"",
        "zip.pt": b"PK\x03\x04 and no more",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is not a checkpoint"):
            build(tmp_path / name)
    (tmp_path / "text.safetensors").write_text("just words")
    with pytest.raises(UserError, match="is not a safetensors file"):
        build(tmp_path / "text.safetensors")

    # Checkpoints without tensors by name, and one of another model.
    torch.save({"state_dict": {}}, tmp_path / "none.pt")
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    for name in ("none.pt", "list.pt"):
        with pytest.raises(UserError, match=f"{name} holds no tensors by name"):
            build(tmp_path / name)
    torch.save({"model": {"layers.0.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    refusal = r"is in none of the known layouts .*: it has the keys layers\.0\.weight"
    with pytest.raises(UserError, match=refusal):
        build(tmp_path / "other.pt")


def test_folders(tmp_path: Path) -> None:
    tensors = random_tensors(taming_shapes(**SMALL))
    folder = write_folder(tmp_path / "folder", {}, tensors)
    assert build(folder).image_size == 256

    # A config that is missing, damaged, or of another architecture.
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"folder has no config\.json"):
        build(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged: it is not JSON"):
        build(folder)
    (folder / "config.json").write_text(json.dumps({"norm_num_groups": 16}))
    with pytest.raises(UserError, match="norm_num_groups is 16; only 32"):
        build(folder)
    (folder / "config.json").write_text(json.dumps({"act_fn": "gelu"}))
    with pytest.raises(UserError, match="act_fn is gelu; only silu"):
        build(folder)

    # An index that names a file that is missing, or one outside the folder.
    (folder / "config.json").write_text("{}")
    split_in_two(folder, tensors)
    second = "model-00002-of-00002.safetensors"
    (folder / second).unlink()
    with pytest.raises(
        UserError, match=r"names model-00002-of-00002\.safetensors, which must be a file beside"
    ):
        build(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(second, "../config.json"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"names \.\./config\.json, which must be a file beside"):
        build(folder)

    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="has no weights; it must hold one of diffusion_pytorch"):
        build(folder)


def test_keys_and_shapes_that_do_not_fit(tmp_path: Path) -> None:
    tensors, file = random_tensors(taming_shapes(**SMALL)), tmp_path / "vqgan.ckpt"

    def sentence(changed: Mapping[str, Tensor | None], **settings: Any) -> str:
        tensors_now = {key: each for key, each in (tensors | changed).items() if each is not None}
        write_taming(file, tensors_now)
        with pytest.raises(UserError) as error:
            build(file, **settings)
        return str(error.value)

    # Keys that are missing, for which None stands, and a key too many.
    attention, codebook = "decoder.mid.attn_1.q.bias", "quantize.embedding.weight"
    assert sentence({attention: None}) == f"{file} lacks {attention}"
    assert sentence({codebook: None}) == f"{file} lacks {codebook}"
    assert sentence({"encoder.conv_in.weight": None}) == f"{file} lacks encoder.conv_in.weight"
    assert sentence({"quantize.used": torch.zeros(3)}) == f"{file} has the unknown quantize.used"

    # Shapes that do not fit the others, and settings that do not fit the file.
    assert sentence({"encoder.conv_out.bias": torch.zeros(5)}) == (
        f"{file}: encoder.conv_out.bias has the shape (5,); beside its other tensors it must be "
        "(32,)"
    )
    assert "multiples of 32" in sentence({"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)})
    assert sentence({}, image_size=17).startswith("image_size is 17; it must be a multiple of 2")
    assert sentence({}, layout="llamagen") == (
        f"layout is llamagen, but {file} names its tensors as taming does "
        "(encoder.down.0.block.0.conv1.weight)"
    )


def test_a_file_of_safetensors_will_do(tmp_path: Path) -> None:
    save_file(random_tensors(llamagen_shapes(**SMALL)), tmp_path / "vq.safetensors")
    assert build(tmp_path / "vq.safetensors", layout="llamagen").layout == "llamagen"
