"""Published VQ tokenizers, read from the publishers' files: one path is the only setting.

    image_tokenizer: {name: pretrained, path: vqgan_gumbel_f8.ckpt}

| file, or Hugging Face (HF) folder         | layout    | codes        | quantizer | image_size   |
|-------------------------------------------|-----------|--------------|-----------|--------------|
| taming-transformers `vqgan_gumbel_f8`     | taming    | 32x32, 8192  | gumbel    | 256          |
| taming-transformers VQGAN f16             | taming    | 16x16, 16384 | Euclidean | 256          |
| Chameleon `vqgan.ckpt`                    | taming    | 32x32, 8192  | Euclidean | set it: 512  |
| LlamaGen `vq_ds16_c2i`, `vq_ds8_c2i`      | llamagen  | 16x16, 32x32 | cosine    | 256          |
| HF folder with a JanusVQVAE               | janus     | 24x24, 16384 | cosine    | its config's |
| HF folder with ChameleonVQVAE, no decoder | taming    | 32x32, 8192  | Euclidean | its config's |
| HF folder with diffusers' VQModel         | diffusers | any          | Euclidean | 256          |

The first has the paper's geometry. All take pixels in [-1, 1] and number codes row by row. Sizes
are read off the tensors, so no file of settings is needed.

The names of the tensors, and the computations, are those of the publishers' sources
(CompVis/taming-transformers: taming/models/vqgan.py, taming/modules; LlamaGen:
tokenizer/tokenizer_image/vq_model.py) and of the libraries transformers and diffusers, with which
the tests compare. The published files themselves could not be tried.
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
from cm3leon.tokenizers.image.quantizer import GumbelQuantizer, LookupQuantizer, Quantizer
from cm3leon.tokenizers.image.vq_model import VQModel
from cm3leon.types import UserError
from cm3leon.weights import check_finite

IMAGE_SIZE = 256
"""Height and width of the images, in pixels, if neither the user nor the files give one."""

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
    """Published weights, used as they are: taming, Chameleon, LlamaGen, Janus, diffusers.

    Under `torch.device("meta")` it is built without its weights.
    """

    @dataclass(kw_only=True)
    class Config:
        """Only the path is needed, or nothing if the tokenizers of another run are reused."""

        path: Path | None = None
        """The published file (.ckpt, .pt, .safetensors), or a Hugging Face folder with its
        config.json; None = the copy in the run of shards.tokenizers."""
        layout: Literal["auto", "taming", "llamagen", "janus", "diffusers"] = "auto"
        """Publisher whose names the tensors have; auto = find out from the names."""
        image_size: PositiveInt | None = None
        """Height and width of the images, in pixels; None = that of a folder's config.json, or else
        256 (512 for chameleon)."""

    pretrained = True
    known: ClassVar[Mapping[str, Any] | None] = None
    """Its geometry, if it is known without a file."""
    usual_size = IMAGE_SIZE
    layout: str
    """The layout of the file."""

    def __init__(self, config: Config, *, kept: Mapping[str, Any] | None = None) -> None:
        """Read the file; or with `kept`, build the networks for weights that a run has kept.

        Args:
            config: the settings.
            kept: the run's copy of what `geometry` returned.

        Raises:
            UserError: for a file that is missing, is no checkpoint, would run code, or does not
                hold such a tokenizer, and for an `image_size` that does not fit.
            NotFinite: for weights that are NaN or infinite.
        """
        self._files: Sequence[Path] = ()
        if kept is not None:
            self._build(config, kept)
            return
        if config.path is None:
            # A plan needs the sizes only, before there are any files.
            if self.known is None or torch.get_default_device().type != "meta":
                raise UserError(
                    "image_tokenizer.path is missing; set it to a published file, or "
                    "shards.tokenizers to a run that was made from one"
                )
            self._build(config, self.known)
            return

        # Find out whose names the tensors have, and read the geometry off their shapes.
        weights = open_weights(config.path)
        _check_settings(weights.path, weights.settings)
        layout, tensors = layout_of(weights, config.layout)
        if GUMBEL_CODEBOOK in tensors:
            to_gumbel = (r"^quantize\.embedding\.weight$", GUMBEL_CODEBOOK)
            layout = replace(layout, spelling=(*layout.spelling, to_gumbel))
        found = PublishedTensors(weights.path, layout, tensors)
        shape = found.architecture()
        codebook_size, code_dim = found.shape("quantizer.codebook_VD")
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

        # Build without memory, check that every tensor has its place, and only then read values.
        with torch.device("meta"):
            self._build(config, geometry)
        self._files = weights.files
        published = found.check(self.state_dict())
        if torch.get_default_device().type != "meta":
            state = {name: tensors[key].read() for name, key in published.items()}
            for name, tensor in state.items():
                check_finite(tensor, f"{weights.path}: the tensor {published[name]}")
            shapes = {name: tensor.shape for name, tensor in self.state_dict().items()}
            # Publishers store a 1x1 convolution as such or as a linear layer.
            self.load_state_dict(
                {name: state[name].view(shapes[name]) for name in state}, assign=True
            )
        self.requires_grad_(False).eval()

    def _build(self, config: Config, geometry: Mapping[str, Any]) -> None:
        """Build the networks, with any weights."""
        geometry = {**geometry, "image_size": config.image_size or geometry["image_size"]}
        super().__init__(
            Architecture(
                channels=geometry["channels"],
                multipliers=tuple(geometry["multipliers"]),
                residual_blocks=geometry["residual_blocks"],
                attention_levels=tuple(geometry["attention_levels"]),
                z_channels=geometry["z_channels"],
            ),
            _quantizer(geometry),
            image_size=geometry["image_size"],
            codebook_size=geometry["codebook_size"],
            code_dim=geometry["code_dim"],
        )
        if not geometry["decoder"]:
            del self.decoder
        self.config, self.layout, self._geometry = config, geometry["layout"], dict(geometry)
        self.requires_grad_(False).eval()

    def geometry(self) -> dict[str, Any]:
        return self._geometry

    def training_module(self) -> TokenizerTraining:
        raise UserError(
            "image_tokenizer.name is pretrained, which is used as it is; to train one, take vqgan "
            "or vq"
        )

    def fingerprint(self) -> str:
        """Return a checksum of the contents of the files of weights."""
        single = len(self._files) == 1
        return files_digest(self._files, [f.suffix if single else f.name for f in self._files])

    def signal_of(self, codes_BHW: Tensor) -> Tensor:
        if not self._geometry["decoder"]:
            raise UserError(
                f"{self.config.path} has no decoder (transformers' Chameleon has none), so its "
                "codes cannot be turned into images; Chameleon's own vqgan.ckpt has one"
            )
        return super().signal_of(codes_BHW)


@IMAGE_TOKENIZERS.register("chameleon")
class ChameleonVQ(PublishedVQ):
    """Chameleon's, Anole's and Lumina-mGPT's: the file `vqgan.ckpt`, or an imported run's copy."""

    known = CHAMELEON
    usual_size = CHAMELEON["image_size"]


def _quantizer(geometry: Mapping[str, Any]) -> Quantizer:
    size, dim = geometry["codebook_size"], geometry["code_dim"]
    if geometry["gumbel"]:
        return GumbelQuantizer(size=size, dim=dim)
    return LookupQuantizer(size=size, dim=dim, normalized=geometry["normalized"], commitment=0.0)


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse settings of diffusers that this network does not have and that no tensor shows."""
    if "norm_num_groups" in settings and settings["norm_num_groups"] != GROUPS:
        raise UserError(
            f"{folder}: norm_num_groups is {settings['norm_num_groups']}; only {GROUPS} can be used"
        )
    if settings.get("act_fn", "silu") not in ("silu", "swish"):
        raise UserError(f"{folder}: act_fn is {settings['act_fn']}; only silu can be used")


def _image_size(settings: Mapping[str, Any], shape: Architecture) -> int | None:
    """Return the size that config.json gives, or None.

    diffusers' `sample_size` is ignored, because it is often left at its default of 32.
    """
    vision, vq = settings.get("vision_config") or {}, settings.get("vq_config") or settings

    # A whole Janus draws as many codes along a side as it sees patches.
    if "image_size" in vision and "patch_size" in vision:
        return int(vision["image_size"] // vision["patch_size"] * shape.downsampling)

    # A JanusVQVAE counts the patches along a side, a Chameleon the pixels.
    if "num_patches" in vq:
        return int(vq["num_patches"] * shape.downsampling)
    return vq.get("resolution")
