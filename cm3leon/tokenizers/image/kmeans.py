"""Codes that stand for clusters of patches; no network lies between the pixels and the codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cm3leon.config import PositiveFloat, PositiveInt, Probability
from cm3leon.registry import IMAGE_TOKENIZERS
from cm3leon.tokenizers.image.vq import Autoencoder, CodebookConfig
from cm3leon.types import UserError


@IMAGE_TOKENIZERS.register("kmeans")
class PatchClusters(Autoencoder):
    """Clusters of patches, by their means: for flat drawings, found in seconds on a CPU.

    Patches are compared by their pixels, but their mean colours count more than the deviations
    from them. With plain squared error, black outlines would decide, and a face in two skin tones
    could have the same codes.
    """

    @dataclass(kw_only=True)
    class Config:
        """How patches are compared, and how their clusters are found."""

        image_size: PositiveInt = 32
        """Height and width of the images, in pixels."""
        downsampling: PositiveInt = 4
        """Pixels of a patch's side; it divides the image size."""
        codebook_size: PositiveInt = 512
        """Number of codes."""
        colour_weight: PositiveFloat = 2.0
        """How many times as much a patch's mean colour counts in a distance as the deviations from
        it."""
        decay: Probability = 0.95
        """Decay of the clusters' moving averages."""
        revive_below: Probability = 0.03
        """A code used less than this share of even use is moved onto a patch of the batch that is
        far from its code."""

        def check(self) -> None:
            if self.image_size % self.downsampling:
                raise UserError(
                    f"downsampling {self.downsampling} must divide image_size {self.image_size}"
                )

    def __init__(self, config: Config) -> None:
        values = 3 * config.downsampling**2
        super().__init__(
            CodebookConfig(
                image_size=config.image_size,
                downsampling=config.downsampling,
                codebook_size=config.codebook_size,
                code_dim=values,
                commitment=0.0,
                decay=config.decay,
                revive_below=config.revive_below,
                revive_far=True,
            )
        )
        self.config = config

        # Both maps work on patches as channels: one makes mean colours larger, the other undoes it.
        there = nn.Conv2d(values, values, 1, bias=False).requires_grad_(False)
        back = nn.Conv2d(values, values, 1, bias=False)
        with torch.no_grad():
            there.weight.copy_(_weighed_mean(config.downsampling**2, config.colour_weight))
            back.weight.copy_(_weighed_mean(config.downsampling**2, 1 / config.colour_weight))
        self.encoder = _InFloat32(nn.PixelUnshuffle(config.downsampling), there)
        self.decoder = _InFloat32(back, nn.PixelShuffle(config.downsampling))


class _InFloat32(nn.Sequential):
    """Computes in float32 where training computes in bf16, too: a cluster is a mean of exact
    pixels, on every processor."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            for module in self:
                x = module(x)
        return x


def _weighed_mean(pixels: int, weight: float) -> Tensor:
    """Build the map (D, D, 1, 1) of patches that multiplies each channel's mean by the weight.

    Deviations from the mean stay as they are, and the map for `1 / weight` is its inverse. In
    PixelUnshuffle's order the pixels of a channel follow each other, so the map has a block for
    each channel.
    """
    mean = torch.full((pixels, pixels), 1 / pixels)
    of_channel = torch.eye(pixels) + (weight - 1) * mean
    return torch.block_diag(of_channel, of_channel, of_channel)[:, :, None, None]
