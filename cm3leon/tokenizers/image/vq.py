"""A small vector-quantized autoencoder: encoder, quantizer, decoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.config import NonNegativeFloat, PositiveInt, Probability
from cm3leon.registry import IMAGE_TOKENIZERS
from cm3leon.tokenizers.image.quantizer import EMAQuantizer
from cm3leon.types import UserError

GROUPS = 8


@IMAGE_TOKENIZERS.register("vq")
class VQAutoencoder(nn.Module):
    """Convolutional autoencoder with an EMA codebook; squared error, no perceptual or adversarial part."""

    @dataclass(kw_only=True)
    class Config:
        """The default geometry is the paper's: 256x256 pixels to 32x32 codes of 8192."""

        image_size: PositiveInt = 256
        """Height and width of the images, in pixels."""
        downsampling: PositiveInt = 8
        """Pixels of a code's side; a power of two that divides the image size."""
        codebook_size: PositiveInt = 8192
        """Number of codes."""
        code_dim: PositiveInt = 32
        """Size of a code's vector."""
        channels: PositiveInt = 64
        """Channels at full resolution, a multiple of 8; each halving of it doubles them, up to four times as many."""
        residual_blocks: PositiveInt = 1
        """Residual blocks at each resolution of the encoder, and of the decoder."""
        commitment: NonNegativeFloat = 0.25
        """Weight of the distance between the encoder's vectors and their codes."""
        decay: Probability = 0.99
        """Decay of the codebook's moving averages."""
        revive_below: Probability = 0.03
        """A code used less than this share of even use is moved onto a vector of the batch."""

        def check(self) -> None:
            if self.channels % GROUPS:
                raise UserError(f"channels {self.channels} must be a multiple of {GROUPS}, the groups of its norms")
            if self.downsampling & (self.downsampling - 1) or self.image_size % self.downsampling:
                raise UserError(
                    f"downsampling {self.downsampling} must be a power of two that divides image_size {self.image_size}"
                )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        halvings = config.downsampling.bit_length() - 1
        widths = [config.channels * min(2**level, 4) for level in range(halvings + 1)]
        self.encoder = _encoder(widths, config)
        self.quantizer = EMAQuantizer(
            size=config.codebook_size, dim=config.code_dim, decay=config.decay, revive_below=config.revive_below
        )
        self.decoder = _decoder(widths[::-1], config)

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.config.image_size

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.config.codebook_size

    @property
    def grid(self) -> int:
        """Codes along a side of an image; an image has `grid * grid`, row by row."""
        return self.config.image_size // self.config.downsampling

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (reconstruction (B, C, H, W), codes (B, N), commitment loss). Pixels are in [-1, 1]."""
        z_BDHW = self.encoder(images_BCHW)
        B, D, H, W = z_BDHW.shape
        quantized_ND, codes_N, commitment = self.quantizer(z_BDHW.permute(0, 2, 3, 1).reshape(-1, D))
        quantized_BDHW = quantized_ND.view(B, H, W, D).permute(0, 3, 1, 2)
        return self.decoder(quantized_BDHW), codes_N.view(B, H * W), commitment

    def loss(self, images_BHWC: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Reconstruction and commitment loss of uint8 images, with the figures to record."""
        images_BCHW = _to_signal(images_BHWC)
        reconstruction_BCHW, codes_BN, commitment = self(images_BCHW)
        squared_error = F.mse_loss(reconstruction_BCHW.float(), images_BCHW)
        psnr = 10 * torch.log10(4 / squared_error.detach())
        used = codes_BN.unique().numel() / self.codebook_size
        loss = squared_error + self.config.commitment * commitment
        return loss, {"psnr_db": psnr, "codes_used_in_batch": used, "images": float(len(images_BHWC))}

    @torch.inference_mode()
    def encode(self, images_BHWC: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """Codes (B, N), int64, of uint8 images (B, H, W, C) of the right size."""
        side = self.image_size
        if images_BHWC.shape[1:] != (side, side, 3):
            raise ValueError(f"images must be {side}x{side} RGB, got an array of shape {images_BHWC.shape}")
        codes = []
        for start in range(0, len(images_BHWC), batch_size):
            z_BDHW = self.encoder(_to_signal(self._tensor(images_BHWC[start : start + batch_size])))
            z_ND = z_BDHW.permute(0, 2, 3, 1).reshape(-1, z_BDHW.shape[1])
            codes.append(self.quantizer.lookup(z_ND).view(len(z_BDHW), -1).cpu().numpy())
        return np.concatenate(codes) if codes else np.zeros((0, self.grid**2), np.int64)

    @torch.inference_mode()
    def decode(self, codes_BN: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """Images (B, H, W, C), uint8, of codes (B, N)."""
        images = []
        for start in range(0, len(codes_BN), batch_size):
            codes = self._tensor(codes_BN[start : start + batch_size])
            vectors_BHWD = self.quantizer.codebook_VD[codes].view(len(codes), self.grid, self.grid, -1)
            signal_BCHW = self.decoder(vectors_BHWD.permute(0, 3, 1, 2)).float()
            pixels = ((signal_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            images.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(images) if images else np.zeros((0, self.image_size, self.image_size, 3), np.uint8)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.quantizer.codebook_VD.device)


def _to_signal(images_BHWC: Tensor) -> Tensor:
    """uint8 (B, H, W, C) to float in [-1, 1], (B, C, H, W)."""
    return images_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def _encoder(widths: list[int], config: VQAutoencoder.Config) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
    for level, width in enumerate(widths):
        if level:
            layers.append(nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1))
        layers += [ResidualBlock(width) for _ in range(config.residual_blocks)]
    return nn.Sequential(
        *layers, nn.GroupNorm(GROUPS, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], config.code_dim, 1)
    )


def _decoder(widths: list[int], config: VQAutoencoder.Config) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(config.code_dim, widths[0], 3, padding=1)]
    for level, width in enumerate(widths):
        if level:
            layers.append(nn.ConvTranspose2d(widths[level - 1], width, 4, stride=2, padding=1))
        layers += [ResidualBlock(width) for _ in range(config.residual_blocks)]
    return nn.Sequential(*layers, nn.GroupNorm(GROUPS, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))


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
