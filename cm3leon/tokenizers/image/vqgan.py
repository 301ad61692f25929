"""The VQGAN, in the paper's geometry or any other (Esser et al. 2021, arXiv 2012.09841)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cm3leon.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Probability
from cm3leon.registry import IMAGE_TOKENIZERS
from cm3leon.tokenizers.image.adversarial import AdversarialTraining
from cm3leon.tokenizers.image.base import TokenizerTraining
from cm3leon.tokenizers.image.network import GROUPS, Architecture
from cm3leon.tokenizers.image.quantizer import EMAQuantizer, LookupQuantizer, Quantizer
from cm3leon.tokenizers.image.vq_model import VQModel
from cm3leon.types import UserError


@IMAGE_TOKENIZERS.register("vqgan")
class VQGAN(VQModel):
    """Autoencoder trained by absolute error, perceptual distance and a discriminator of patches."""

    @dataclass(kw_only=True)
    class Config:
        """The default geometry is the paper's: 256x256 pixels to 32x32 codes of 8192."""

        image_size: PositiveInt = 256
        """Height and width of the images, in pixels."""
        codebook_size: PositiveInt = 8192
        """Number of codes."""
        code_dim: PositiveInt = 8
        """Size of a code's vector. A few numbers are enough for the quantizer cosine; 256 are usual
        for the others."""
        channels: PositiveInt = 128
        """Channels at full resolution, a multiple of 32."""
        multipliers: list[PositiveInt] = field(default_factory=lambda: [1, 1, 2, 4])
        """Channels of each level, as multiples of `channels`. All levels but the last halve height
        and width."""
        residual_blocks: PositiveInt = 2
        """Residual blocks of a level of the encoder; the decoder has one more."""
        attention_levels: list[NonNegativeInt] = field(default_factory=lambda: [3])
        """Levels with attention after each residual block; level 0 has full resolution. The
        coarsest level always has attention once more."""
        z_channels: PositiveInt = 256
        """Channels of the encoder's output, before the projection onto `code_dim` numbers."""
        quantizer: Literal["cosine", "euclidean", "ema"] = "cosine"
        """How the nearest code is found and the codebook learned: by cosine or Euclidean distance
        with gradients, or with ema by Euclidean distance and moving averages, which also move
        unused codes."""
        commitment: NonNegativeFloat = 0.25
        """Weight of the pull of the encoder's vectors to their codes."""
        decay: Probability = 0.99
        """Quantizer ema: decay of the moving averages."""
        revive_below: Probability = 0.03
        """Quantizer ema: a code used less than this share of even use is moved onto a vector of the
        batch."""
        perceptual_file: Path | None = None
        """Weights of torchvision's VGG16 (vgg16-397923af.pth); None = no perceptual distance in the
        loss."""
        perceptual: NonNegativeFloat = 1.0
        """Weight of the perceptual distance (LPIPS); the absolute error has the weight 1."""
        adversarial: NonNegativeFloat = 0.5
        """Weight of the discriminator's verdict, after its gradient is scaled to the length of the
        others'; 0 = no discriminator."""
        adversarial_start: NonNegativeInt = 20_000
        """Step from which on the discriminator takes part. Before it, reconstructions are too
        coarse for it to help."""
        discriminator_channels: PositiveInt = 64
        """Channels of the discriminator's first layer, a multiple of 32."""
        discriminator_layers: PositiveInt = 3
        """Layers of the discriminator that halve the resolution; 3 = patches of 70x70 pixels."""

        def check(self) -> None:
            widths = {"channels": self.channels}
            for level, multiplier in enumerate(self.multipliers):
                widths[f"channels * multipliers[{level}]"] = self.channels * multiplier
            widths["discriminator_channels"] = self.discriminator_channels
            for name, channels in widths.items():
                if channels % GROUPS:
                    raise UserError(
                        f"{name} is {channels}; it must be a multiple of {GROUPS}, "
                        "the groups of the norms"
                    )

            if not self.multipliers:
                raise UserError(
                    "multipliers is empty; it must have a number for each level, for example "
                    "[1, 2, 4]"
                )
            downsampling = 2 ** (len(self.multipliers) - 1)
            if self.image_size % downsampling:
                raise UserError(
                    f"image_size is {self.image_size}; it must be a multiple of {downsampling}, "
                    f"as {len(self.multipliers)} levels halve it {len(self.multipliers) - 1} times"
                )

            least = 3 * 2**self.discriminator_layers
            if self.adversarial and self.image_size < least:
                raise UserError(
                    f"discriminator_layers is {self.discriminator_layers}, for which images of "
                    f"{self.image_size} pixels are too small; take fewer layers, or an image_size "
                    f"of at least {least}"
                )

            for level in self.attention_levels:
                if level >= len(self.multipliers):
                    raise UserError(
                        f"attention_levels has {level}; "
                        f"there are the levels 0 to {len(self.multipliers) - 1}"
                    )

    def __init__(self, config: Config) -> None:
        super().__init__(
            Architecture(
                channels=config.channels,
                multipliers=tuple(config.multipliers),
                residual_blocks=config.residual_blocks,
                attention_levels=tuple(config.attention_levels),
                z_channels=config.z_channels,
            ),
            _quantizer(config),
            image_size=config.image_size,
            codebook_size=config.codebook_size,
            code_dim=config.code_dim,
        )
        self.config = config

    def training_module(self) -> TokenizerTraining:
        return AdversarialTraining(self, self.config)


def _quantizer(config: VQGAN.Config) -> Quantizer:
    size, dim, commitment = config.codebook_size, config.code_dim, config.commitment
    if config.quantizer == "ema":
        return EMAQuantizer(
            size=size,
            dim=dim,
            decay=config.decay,
            revive_below=config.revive_below,
            commitment=commitment,
        )
    return LookupQuantizer(
        size=size, dim=dim, normalized=config.quantizer == "cosine", commitment=commitment
    )
