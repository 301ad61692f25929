"""Encoder and decoder of the VQGAN family (Esser et al. 2021, arXiv 2012.09841).

taming-transformers, LlamaGen, Janus and Chameleon share this geometry; `published.py` reads their
files. For 256x256 pixels, channels 128 and multipliers 1 1 2 4 the encoder has

    level   0          1          2        3
    width   128        128        256      512
    size    256x256    128x128    64x64    32x32  -> middle -> z_channels x 32x32

and the decoder goes the same way back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
EPSILON = 1e-6
"""Epsilon of the group norms, as in all published weights; PyTorch's default is 1e-5."""


@dataclass(frozen=True)
class Architecture:
    """Shape of an encoder and of the decoder that mirrors it. Level 0 has full resolution."""

    channels: int
    """Channels at full resolution."""
    multipliers: tuple[int, ...]
    """Channels of each level, as multiples of `channels`. All levels but the last halve the
    resolution."""
    residual_blocks: int
    """Residual blocks of a level of the encoder; the decoder has one more."""
    attention_levels: tuple[int, ...]
    """Levels with attention after each residual block; the middle always has attention once."""
    z_channels: int
    """Channels between the encoder and the projection onto codes."""

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.channels * multiplier for multiplier in self.multipliers]

    @property
    def downsampling(self) -> int:
        """Pixels along a side of a code."""
        return 2 ** (len(self.multipliers) - 1)


class ImageEncoder(nn.Module):
    """Images (B, 3, H, W) to (B, z_channels, H / downsampling, W / downsampling)."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        widths = shape.widths
        self.conv_in = nn.Conv2d(3, shape.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[level - 1] if level else shape.channels
            resample = Downsample(width) if level < len(widths) - 1 else None
            self.levels.append(Level(shape, level, before, shape.residual_blocks, resample))
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], shape.z_channels, 3, padding=1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(images_BCHW)
        for level in self.levels:
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BCHW))))


class ImageDecoder(nn.Module):
    """The mirror of `ImageEncoder`: (B, z_channels, h, w) to images, the coarsest level first."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        widths = shape.widths
        self.conv_in = nn.Conv2d(shape.z_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1])
        self.levels = nn.ModuleList()
        for level in reversed(range(len(widths))):
            before = widths[min(level + 1, len(widths) - 1)]
            resample = Upsample(widths[level]) if level else None
            self.levels.append(Level(shape, level, before, shape.residual_blocks + 1, resample))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(z_BCHW))
        for level in self.levels:
            x_BCHW = level(x_BCHW)
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))


class Level(nn.Module):
    """Residual blocks of one resolution, on some levels with attention after each; resampling."""

    def __init__(
        self, shape: Architecture, level: int, before: int, count: int, resample: nn.Module | None
    ) -> None:
        super().__init__()
        width = shape.widths[level]
        self.blocks = nn.ModuleList(
            ResidualBlock(width if number else before, width) for number in range(count)
        )
        has_attention = level in shape.attention_levels
        self.attentions = nn.ModuleList(
            SpatialAttention(width) for _ in range(count if has_attention else 0)
        )
        self.resample = resample or nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x_BCHW = block(x_BCHW)
            if self.attentions:
                x_BCHW = self.attentions[number](x_BCHW)
        return self.resample(x_BCHW)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))).

    Where the number of channels changes, the first x passes through a 1x1 convolution.
    """

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(before), nn.Conv2d(before, width, 3, padding=1)
        self.norm2, self.conv2 = _norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Identity() if before == width else nn.Conv2d(before, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        return self.shortcut(x_BCHW) + self.conv2(F.silu(self.norm2(h_BCHW)))


class SpatialAttention(nn.Module):
    """x + attention of every position to all positions, with one head as wide as the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        normed_BCHW = self.norm(x_BCHW)
        # (B, C, H, W) -> (B, 1 head, H * W, C)
        q, k, v = (
            part(normed_BCHW).flatten(2).transpose(1, 2)[:, None]
            for part in (self.q, self.k, self.v)
        )
        mixed_BTC = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x_BCHW + self.out(mixed_BTC.transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Half the resolution by a convolution of stride 2, padded below and to the right only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution by repeating pixels, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(width, width), SpatialAttention(width), ResidualBlock(width, width)
    )


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=EPSILON)
