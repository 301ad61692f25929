"""A small vector-quantized autoencoder: encoder, quantizer, decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.config import NonNegativeFloat, PositiveInt, Probability
from cm3leon.registry import IMAGE_TOKENIZERS
from cm3leon.tokenizers.image.base import (
    ImageTokenizer,
    TokenizerTraining,
    psnr_of_batch,
    to_signal,
    use_of_batch,
)
from cm3leon.tokenizers.image.quantizer import EMAQuantizer
from cm3leon.types import UserError
from cm3leon.weights import check_finite

GROUPS = 8


@dataclass(kw_only=True)
class CodebookConfig:
    """The default geometry is the paper's: 256x256 pixels to 32x32 codes of 8192."""

    image_size: PositiveInt = 256
    """Height and width of the images, in pixels."""
    downsampling: PositiveInt = 8
    """Pixels along a side of a code; it divides the image size, and for convolutions (vq) is a
    power of two."""
    codebook_size: PositiveInt = 8192
    """Number of codes."""
    code_dim: PositiveInt = 32
    """Size of a code's vector."""
    commitment: NonNegativeFloat = 0.25
    """Weight of the distance between the encoder's vectors and their codes."""
    decay: Probability = 0.99
    """Decay of the codebook's moving averages."""
    revive_below: Probability = 0.03
    """A code used less than this share of even use is moved onto a vector of the batch."""
    revive_far: bool = False
    """Whether that vector is drawn by its squared distance to its code, so that rare patches get
    codes of their own; otherwise all are equally likely."""


class Autoencoder(ImageTokenizer, TokenizerTraining):
    """Base of autoencoders with an EMA codebook; squared error, no perceptual or adversarial part.

    A subclass sets `encoder`, from signals to vectors (B, D, H, W), and `decoder`, its inverse.
    """

    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.image_size, self.codebook_size = config.image_size, config.codebook_size
        self.downsampling = config.downsampling
        self.quantizer = EMAQuantizer(
            size=config.codebook_size,
            dim=config.code_dim,
            decay=config.decay,
            revive_below=config.revive_below,
            commitment=config.commitment,
            revive_far=config.revive_far,
        )

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction (B, C, H, W), the codes (B, N), and the quantizer's loss.

        Pixels are in [-1, 1].
        """
        z_BDHW = self.encoder(images_BCHW)
        B, D, H, W = z_BDHW.shape
        quantized_ND, codes_N, pull = self.quantizer(z_BDHW.permute(0, 2, 3, 1).reshape(-1, D))
        quantized_BDHW = quantized_ND.view(B, H, W, D).permute(0, 3, 1, 2)
        return self.decoder(quantized_BDHW), codes_N.view(B, H * W), pull

    def training_module(self) -> TokenizerTraining:
        return self

    def loss(self, images_BHWC: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return squared error plus the quantizer's loss of uint8 images, and figures to record."""
        images_BCHW = to_signal(images_BHWC)
        reconstruction_BCHW, codes_BN, pull = self(images_BCHW)
        squared_error = F.mse_loss(reconstruction_BCHW.float(), images_BCHW)
        use = use_of_batch(codes_BN, self.codebook_size)
        return squared_error + pull, {
            "psnr_db": psnr_of_batch(squared_error),
            "codes_used_in_batch": use["codes_used_in_batch"],
            "images": float(len(images_BHWC)),
        }

    def codes_of(self, signal_BCHW: Tensor) -> Tensor:
        z_BHWD = self.encoder(signal_BCHW).permute(0, 2, 3, 1)
        check_finite(z_BHWD, "what the image tokenizer's encoder makes of an image")
        return self.quantizer.lookup(z_BHWD.flatten(0, 2)).view(z_BHWD.shape[:3])

    def signal_of(self, codes_BHW: Tensor) -> Tensor:
        return self.decoder(self.quantizer.vectors(codes_BHW).permute(0, 3, 1, 2))


@IMAGE_TOKENIZERS.register("vq")
class VQAutoencoder(Autoencoder):
    """Convolutional autoencoder with an EMA codebook, trained by squared error only."""

    @dataclass(kw_only=True)
    class Config(CodebookConfig):
        """Settings of the codebook, and of the convolutions."""

        channels: PositiveInt = 64
        """Channels at full resolution, a multiple of 8. Each halving of the resolution doubles
        them, up to four times as many."""
        residual_blocks: PositiveInt = 1
        """Residual blocks at each resolution of the encoder, and of the decoder."""

        def check(self) -> None:
            if self.channels % GROUPS:
                raise UserError(
                    f"channels {self.channels} must be a multiple of {GROUPS}, "
                    "the groups of its norms"
                )
            if self.downsampling & (self.downsampling - 1) or self.image_size % self.downsampling:
                raise UserError(
                    f"downsampling {self.downsampling} must be a power of two that divides "
                    f"image_size {self.image_size}"
                )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        halvings = config.downsampling.bit_length() - 1
        widths = [config.channels * min(2**level, 4) for level in range(halvings + 1)]
        self.encoder = _encoder(widths, config)
        self.decoder = _decoder(widths[::-1], config)


def _encoder(widths: list[int], config: VQAutoencoder.Config) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
    for level, width in enumerate(widths):
        if level:
            layers.append(nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1))
        layers += [ResidualBlock(width) for _ in range(config.residual_blocks)]
    return nn.Sequential(
        *layers,
        nn.GroupNorm(GROUPS, widths[-1]),
        nn.SiLU(),
        nn.Conv2d(widths[-1], config.code_dim, 1),
    )


def _decoder(widths: list[int], config: VQAutoencoder.Config) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(config.code_dim, widths[0], 3, padding=1)]
    for level, width in enumerate(widths):
        if level:
            layers.append(nn.ConvTranspose2d(widths[level - 1], width, 4, stride=2, padding=1))
        layers += [ResidualBlock(width) for _ in range(config.residual_blocks)]
    return nn.Sequential(
        *layers, nn.GroupNorm(GROUPS, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1)
    )


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.layers(x_BCHW)
