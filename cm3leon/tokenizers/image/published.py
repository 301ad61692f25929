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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cm3leon.config import PositiveInt
from cm3leon.digests import files_digest
from cm3leon.registry import IMAGE_TOKENIZERS
from cm3leon.tokenizers.image.base import TokenizerTraining
from cm3leon.tokenizers.image.network import GROUPS, Architecture
from cm3leon.tokenizers.image.published_files import open_weights
from cm3leon.tokenizers.image.published_layouts import GUMBEL_CODEBOOK, PublishedTensors, layout_of
from cm3leon.tokenizers.image.quantizer import GumbelQuantizer, LookupQuantizer
from cm3leon.tokenizers.image.vq_model import VQModel
from cm3leon.types import UserError
from cm3leon.weights import check_finite

IMAGE_SIZE = 256
"""Height and width of the images, in pixels, where neither the user nor the files say one."""

CHAMELEON: Mapping[str, Any] = {
    "channels": 128,
    "multipliers": (1, 1, 2, 2, 4),
    "residual_blocks": 2,
    "attention_levels": (),
    "z_channels": 256,
    "image_size": 512,
    "codebook_size": 8192,
    "code_dim": 256,
    "gumbel": False,
    "normalized": False,
    "decoder": True,
    "layout": "taming",
}
"""Geometry of Chameleon's `vqgan.ckpt`, by the configuration of transformers' ChameleonVQVAE."""


@IMAGE_TOKENIZERS.register("pretrained")
class PublishedVQ(VQModel):
    """Published weights, used as they are: taming-transformers, Chameleon, LlamaGen, Janus, diffusers.

    Under `torch.device("meta")` it gets its geometry without the weights.
    """

    @dataclass(kw_only=True)
    class Config:
        """Only the path has to be said, unless another run's tokenizers are taken over."""

        path: Path | None = None
        """The published file (.ckpt, .pt, .safetensors), or a Hugging Face folder with its config.json; None = what the
        run of shards.tokenizers has kept of one."""
        layout: Literal["auto", "taming", "llamagen", "janus", "diffusers"] = "auto"
        """Whose names the tensors have; auto = read from them."""
        image_size: PositiveInt | None = None
        """Height and width of the images, in pixels; None = that of a folder's config.json, where there is none 256, of
        Chameleon's 512."""

    pretrained = True
    known: ClassVar[Mapping[str, Any] | None] = None
    """Its geometry where it needs no file to be known."""
    usual_size = IMAGE_SIZE
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
        if config.path is None:
            # Before anything is there, a plan asks for sizes alone.
            if self.known is None or torch.get_default_device().type != "meta":
                raise UserError(
                    "image_tokenizer.path is missing; it must be a published file, or shards.tokenizers a run that was "
                    "made from one"
                )
            self._build(config, self.known)
            return
        weights = open_weights(config.path)
        _check_settings(weights.path, weights.settings)
        layout, tensors = layout_of(weights, config.layout)
        if GUMBEL_CODEBOOK in tensors:
            to_gumbel = (r"^quantize\.embedding\.weight$", GUMBEL_CODEBOOK)
            layout = replace(layout, spelling=(*layout.spelling, to_gumbel))
        found = PublishedTensors(weights.path, layout, tensors)
        shape, (codebook_size, code_dim) = (
            found.architecture(),
            found.shape("quantizer.codebook_VD"),
        )
        image_size = config.image_size or _image_size(weights.settings, shape) or self.usual_size
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
        geometry = {**geometry, "image_size": config.image_size or geometry["image_size"]}
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


@IMAGE_TOKENIZERS.register("chameleon")
class ChameleonVQ(PublishedVQ):
    """Chameleon's, Anole's and Lumina-mGPT's: their `vqgan.ckpt`, or what an imported run has kept of it."""

    known = CHAMELEON
    usual_size = CHAMELEON["image_size"]


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
