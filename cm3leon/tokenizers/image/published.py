"""Published VQ tokenizers, as their publishers wrote them: one path is all that has to be said.

    image_tokenizer: {name: pretrained, path: vqgan_gumbel_f8.ckpt}

| file or folder                                               | layout    | codes        | quantizer | `image_size` |
|--------------------------------------------------------------|-----------|--------------|-----------|--------------|
| taming-transformers `vqgan_gumbel_f8` (the paper's geometry) | taming    | 32x32, 8192  | gumbel    | 256          |
| taming-transformers VQGAN f16                                | taming    | 16x16, 16384 | Euclidean | 256          |
| Chameleon `vqgan.ckpt`                                       | taming    | 32x32, 8192  | Euclidean | say 512      |
| LlamaGen `vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`                   | llamagen  | 16x16, 32x32 | cosine    | 256          |
| Hugging Face folder with a JanusVQVAE                        | janus     | 24x24, 16384 | cosine    | its config's |
| Hugging Face folder with a ChameleonVQVAE (no decoder)       | taming    | 32x32, 8192  | Euclidean | its config's |
| Hugging Face folder with diffusers' VQModel                  | diffusers | any          | Euclidean | 256          |

All take pixels in [-1, 1] and number codes row by row. Sizes are read off the tensors; no file of settings is needed.

None of these files could be fetched where this was written: the names of the tensors, and what is done with them, are
those of the publishers' sources (CompVis/taming-transformers: taming/models/vqgan.py, taming/modules; LlamaGen:
tokenizer/tokenizer_image/vq_model.py) and of the libraries transformers and diffusers, against which the tests compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cm3leon.config import PositiveInt
from cm3leon.digests import files_digest
from cm3leon.registry import IMAGE_TOKENIZERS
from cm3leon.tokenizers.image.base import TokenizerTraining
from cm3leon.tokenizers.image.network import GROUPS, Architecture
from cm3leon.tokenizers.image.published_files import Stored, Weights, open_weights
from cm3leon.tokenizers.image.quantizer import GumbelQuantizer, LookupQuantizer
from cm3leon.tokenizers.image.vq_model import VQModel
from cm3leon.types import UserError
from cm3leon.weights import check_finite

IMAGE_SIZE = 256
"""Height and width of the images, in pixels, where neither the user nor the files say one."""


# ------------------------------------------------------------------------------------------------ names of tensors


@dataclass(frozen=True)
class Layout:
    """How a publisher names the tensors of a `VQModel`."""

    name: str
    shown_by: tuple[str, ...]
    """Tensors that are named so in this layout only; the layouts are tried in order."""
    spelling: tuple[tuple[str, str], ...]
    """Patterns in our names and what stands there instead, applied one after the other."""
    finest_first: bool = False
    """Whether the decoder's levels are numbered from full resolution, so against the order in which they are passed."""
    normalized: bool = False
    """Whether the nearest code is that of the largest cosine; nothing in a file tells."""

    def published(self, name: str, levels: int) -> str:
        """The publisher's name of the tensor that is `name` in our model of that many levels."""
        if self.finest_first:
            name = re.sub(
                r"^(decoder\.levels)\.(\d+)", lambda m: f"{m[1]}.{levels - 1 - int(m[2])}", name
            )
        for pattern, instead in self.spelling:
            name = re.sub(pattern, instead, name)
        return name


_PROJECTIONS = (
    (r"^to_code\.", "quant_conv."),
    (r"^from_code\.", "post_quant_conv."),
    (r"^quantizer\.codebook_VD$", "quantize.embedding.weight"),
    (r"^quantizer\.logits\.", "quantize.proj."),
)
_TAMING_BLOCKS = (
    (r"\.attentions\.", ".attn."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.out\.", ".proj_out."),
    (r"^(encoder.*)\.resample\.", r"\1.downsample."),
    (r"^(decoder.*)\.resample\.", r"\1.upsample."),
)
TAMING = Layout(
    name="taming",
    shown_by=("encoder.down.0.block.0.conv1.weight",),
    spelling=(
        *_PROJECTIONS,
        *_TAMING_BLOCKS,
        (r"^encoder\.levels\.", "encoder.down."),
        (r"^decoder\.levels\.", "decoder.up."),
        (r"\.blocks\.", ".block."),
        (r"\.mid\.0\.", ".mid.block_1."),
        (r"\.mid\.1\.", ".mid.attn_1."),
        (r"\.mid\.2\.", ".mid.block_2."),
    ),
    finest_first=True,
)
JANUS = replace(
    TAMING,
    name="janus",
    # The decoder's levels are in the order in which they are passed: the first one is enlarged, in taming the last one.
    shown_by=("encoder.down.0.block.0.conv1.weight", "decoder.up.0.upsample.conv.weight"),
    finest_first=False,
    # As these weights were trained (they are LlamaGen's model); transformers' `JanusVQVAE.encode` leaves vectors and
    # codebook as they are, and only its `decode` normalizes.
    normalized=True,
)
LLAMAGEN = Layout(
    name="llamagen",
    shown_by=("encoder.conv_blocks.0.res.0.conv1.weight",),
    spelling=(
        *_PROJECTIONS,
        *_TAMING_BLOCKS,
        (r"\.levels\.", ".conv_blocks."),
        (r"\.blocks\.", ".res."),
    ),
    normalized=True,
)
DIFFUSERS = Layout(
    name="diffusers",
    shown_by=("encoder.down_blocks.0.resnets.0.conv1.weight",),
    spelling=(
        *_PROJECTIONS,
        (r"\.mid\.0\.", ".mid_block.resnets.0."),
        (r"\.mid\.1\.", ".mid_block.attentions.0."),
        (r"\.mid\.2\.", ".mid_block.resnets.1."),
        (r"^encoder\.levels\.", "encoder.down_blocks."),
        (r"^decoder\.levels\.", "decoder.up_blocks."),
        (r"\.blocks\.", ".resnets."),
        (r"\.(q|k|v)\.", r".to_\1."),
        (r"\.out\.", ".to_out.0."),
        (r"\.norm\.", ".group_norm."),
        (r"\.shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"^(encoder.*)\.resample\.", r"\1.downsamplers.0."),
        (r"^(decoder.*)\.resample\.", r"\1.upsamplers.0."),
    ),
)
# Older folders name the parts of attention otherwise.
EARLY_DIFFUSERS = replace(
    DIFFUSERS,
    shown_by=(
        "encoder.down_blocks.0.resnets.0.conv1.weight",
        "encoder.mid_block.attentions.0.query.weight",
    ),
    spelling=(
        *DIFFUSERS.spelling,
        (r"\.to_q\.", ".query."),
        (r"\.to_k\.", ".key."),
        (r"\.to_v\.", ".value."),
        (r"\.to_out\.0\.", ".proj_attn."),
    ),
)
LAYOUTS = (JANUS, TAMING, LLAMAGEN, EARLY_DIFFUSERS, DIFFUSERS)

GUMBEL_CODEBOOK = "quantize.embed.weight"
"""The codebook of a gumbel quantizer; that of all others is `quantize.embedding.weight`."""

LEFT_OUT = re.compile(
    r"loss\.|quantize\.codebook_used$|quantize\.embedding\.(cluster_size|embed_avg)$"
)
"""What only training needs: the parts of the loss, codes used lately, moving averages of the codebook."""


# ------------------------------------------------------------------------------------------------ tokenizer


@IMAGE_TOKENIZERS.register("pretrained")
class PublishedVQ(VQModel):
    """Published weights, used as they are: taming-transformers, Chameleon, LlamaGen, Janus, diffusers.

    Under `torch.device("meta")` it gets its geometry without the weights.
    """

    @dataclass(kw_only=True)
    class Config:
        """Only the path has to be said."""

        path: Path
        """The published file (.ckpt, .pt, .safetensors), or a Hugging Face folder with its config.json."""
        layout: Literal["auto", "taming", "llamagen", "janus", "diffusers"] = "auto"
        """Whose names the tensors have; auto = read from them."""
        image_size: PositiveInt | None = None
        """Height and width of the images, in pixels; None = that of a folder's config.json, 256 where there is none."""

    pretrained = True
    layout: str
    """The layout that was found."""

    def __init__(self, config: Config, *, kept: Mapping[str, Any] | None = None) -> None:
        """Reads the file, or takes what a run has kept of it beside the weights, which are to be loaded then.

        Args:
            kept: what `geometry` gave.

        Raises:
            UserError: for a file that is missing, is no checkpoint, would run code, or does not hold such a tokenizer,
                and for an `image_size` that does not fit.
            NotFinite: for weights that are NaN or infinite.
        """
        self._files: Sequence[Path] = ()
        if kept is not None:
            self._build(config, kept)
            return
        weights = open_weights(config.path)
        _check_settings(weights.path, weights.settings)
        layout, tensors = _layout(weights, config)
        if GUMBEL_CODEBOOK in tensors:
            to_gumbel = (r"^quantize\.embedding\.weight$", GUMBEL_CODEBOOK)
            layout = replace(layout, spelling=(*layout.spelling, to_gumbel))
        found = _Found(weights.path, layout, tensors)
        shape, (codebook_size, code_dim) = (
            found.architecture(),
            found.shape("quantizer.codebook_VD"),
        )
        image_size = config.image_size or _image_size(weights.settings, shape) or IMAGE_SIZE
        if image_size % shape.downsampling:
            raise UserError(
                f"image_size is {image_size}; it must be a multiple of {shape.downsampling}, "
                f"the pixels of a code's side in {weights.path}"
            )
        geometry = {
            **asdict(shape),
            "image_size": image_size,
            "codebook_size": codebook_size,
            "code_dim": code_dim,
            "gumbel": GUMBEL_CODEBOOK in tensors,
            "normalized": layout.normalized,
            "decoder": any(name.startswith("decoder.") for name in tensors),
            "layout": layout.name,
        }
        with torch.device("meta"):
            self._build(config, geometry)
        self._files = weights.files
        published = found.check(self.state_dict())
        if torch.get_default_device().type != "meta":
            state = {name: tensors[key].read() for name, key in published.items()}
            for name, tensor in state.items():
                check_finite(tensor, f"{weights.path}: the tensor {published[name]}")
            shapes = {name: tensor.shape for name, tensor in self.state_dict().items()}
            # 1x1 convolutions and linear layers are stored as either of the two.
            self.load_state_dict(
                {name: state[name].view(shapes[name]) for name in state}, assign=True
            )
        self.requires_grad_(False).eval()

    def _build(self, config: Config, geometry: Mapping[str, Any]) -> None:
        """Its networks, with any weights."""
        size, dim = geometry["codebook_size"], geometry["code_dim"]
        super().__init__(
            Architecture(
                channels=geometry["channels"],
                multipliers=tuple(geometry["multipliers"]),
                residual_blocks=geometry["residual_blocks"],
                attention_levels=tuple(geometry["attention_levels"]),
                z_channels=geometry["z_channels"],
            ),
            GumbelQuantizer(size=size, dim=dim)
            if geometry["gumbel"]
            else LookupQuantizer(
                size=size, dim=dim, normalized=geometry["normalized"], commitment=0.0
            ),
            image_size=geometry["image_size"],
            codebook_size=size,
            code_dim=dim,
        )
        if not geometry["decoder"]:
            del self.decoder
        self.config, self.layout, self._geometry = config, geometry["layout"], dict(geometry)
        self.requires_grad_(False).eval()

    def geometry(self) -> dict[str, Any]:
        return self._geometry

    def training_module(self) -> TokenizerTraining:
        raise UserError(
            "the image tokenizer pretrained is used as it is; to train one, take vqgan or vq"
        )

    def fingerprint(self) -> str:
        """A checksum of what the files of the weights hold."""
        single = len(self._files) == 1
        return files_digest(self._files, [f.suffix if single else f.name for f in self._files])

    def signal_of(self, codes_BHW: Tensor) -> Tensor:
        if not self._geometry["decoder"]:
            raise UserError(
                f"{self.config.path} has no decoder (transformers' Chameleon has none), so its codes cannot be turned "
                "into images; Chameleon's own vqgan.ckpt has one"
            )
        return super().signal_of(codes_BHW)


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuses what no tensor shows; only diffusers lets one choose it."""
    if "norm_num_groups" in settings and settings["norm_num_groups"] != GROUPS:
        raise UserError(
            f"{folder}: norm_num_groups is {settings['norm_num_groups']}; only {GROUPS} can be used"
        )
    if settings.get("act_fn", "silu") not in ("silu", "swish"):
        raise UserError(f"{folder}: act_fn is {settings['act_fn']}; only silu can be used")


def _image_size(settings: Mapping[str, Any], shape: Architecture) -> int | None:
    """What config.json says; None for diffusers too, whose `sample_size` is often its default of 32 and not meant."""
    vision, vq = settings.get("vision_config") or {}, settings.get("vq_config") or settings
    if (
        "image_size" in vision and "patch_size" in vision
    ):  # a whole Janus draws as many codes as it sees patches
        return int(vision["image_size"] // vision["patch_size"] * shape.downsampling)
    if "num_patches" in vq:  # Janus: along a side
        return int(vq["num_patches"] * shape.downsampling)
    return vq.get("resolution")  # Chameleon


def _layout(weights: Weights, config: PublishedVQ.Config) -> tuple[Layout, dict[str, Stored]]:
    """The layout, and the tokenizer's tensors by their names within the model that they may be a part of."""
    for layout in LAYOUTS:
        for prefix in _prefixes(weights.tensors, layout.shown_by[0]):
            part = {
                key.removeprefix(prefix): t
                for key, t in weights.tensors.items()
                if key.startswith(prefix)
            }
            if "quant_conv.weight" in part and all(key in part for key in layout.shown_by):
                if config.layout not in ("auto", layout.name):
                    raise UserError(
                        f"layout is {config.layout}, but {weights.path} names its tensors as {layout.name} does "
                        f"({prefix}{layout.shown_by[-1]})"
                    )
                return layout, part
    known = ", ".join(dict.fromkeys(layout.name for layout in LAYOUTS))
    raise UserError(
        f"{weights.path} is in none of the known layouts ({known}): it has the keys {_some(weights.tensors)}"
    )


def _prefixes(keys: Iterable[str], end: str) -> list[str]:
    """What stands before that name: nothing, or the place within a bigger model; the shortest first."""
    return sorted((key.removesuffix(end) for key in keys if f".{key}".endswith(f".{end}")), key=len)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


@dataclass(frozen=True)
class _Found:
    """Tensors in a known layout, asked for by our names."""

    path: Path
    layout: Layout
    tensors: Mapping[str, Stored]

    @property
    def levels(self) -> int:
        return self._count("encoder.levels.{}.blocks.0.conv1.weight")

    def has(self, name: str) -> bool:
        return self.layout.published(name, 0) in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of the encoder or the quantizer."""
        key = self.layout.published(name, 0)
        if key not in self.tensors:
            raise UserError(f"{self.path} lacks {key}")
        return self.tensors[key].shape

    def architecture(self) -> Architecture:
        """Read off the encoder."""
        channels = self.shape("encoder.conv_in.weight")[0]
        widths = [
            self.shape(f"encoder.levels.{level}.blocks.0.conv1.weight")[0]
            for level in range(self.levels)
        ]
        for width in (channels, *widths):
            if width % channels or width % GROUPS:
                raise UserError(
                    f"{self.path} has {channels} channels at full resolution and {width} further down; both must be "
                    f"multiples of {GROUPS}, and the second one of the first"
                )
        return Architecture(
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            residual_blocks=self._count("encoder.levels.0.blocks.{}.conv1.weight"),
            attention_levels=tuple(
                level
                for level in range(self.levels)
                if self.has(f"encoder.levels.{level}.attentions.0.q.weight")
            ),
            z_channels=self.shape("encoder.conv_out.weight")[0],
        )

    def check(self, wanted: Mapping[str, Tensor]) -> dict[str, str]:
        """The published name of each of our tensors.

        Raises:
            UserError: for tensors that are missing, left over, or of another shape.
        """
        keys = {name: self.layout.published(name, self.levels) for name in wanted}
        known = set(keys.values())
        unknown = {key for key in self.tensors.keys() - known if not LEFT_OUT.match(key)}
        for what, some in (("lacks", known - self.tensors.keys()), ("has the unknown", unknown)):
            if some:
                raise UserError(f"{self.path} {what} {_some(some)}")
        for name, key in keys.items():
            given, expected = self.tensors[key].shape, tuple(wanted[name].shape)
            if _matrix(given) != _matrix(expected):
                raise UserError(
                    f"{self.path}: {key} has the shape {given}; beside its other tensors it must be {expected}"
                )
        return keys

    def _count(self, name: str) -> int:
        count = 0
        while self.has(name.format(count)):
            count += 1
        return count


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a 1x1 convolution as that of the linear layer that it is."""
    return shape[:2] if shape[2:] == (1, 1) else shape
