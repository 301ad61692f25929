"""Slightly moved versions of images, for corpora too small to learn from otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from cm3leon.config import NonNegativeFloat, NonNegativeInt


@dataclass(kw_only=True)
class AugmentConfig:
    """How training images are varied; draws are uniform within plus and minus the value, unless it says otherwise."""

    versions: NonNegativeInt = 0
    """Versions of each training image besides itself; 0 = no augmentation, right for any large corpus."""
    degrees: NonNegativeFloat = 8.0
    """Rotation, in degrees."""
    scale: NonNegativeFloat = 0.08
    """Change of width and of height, each drawn for itself, as a share."""
    shear: NonNegativeFloat = 0.1
    """Horizontal shear, as a share of the height."""
    shift: NonNegativeFloat = 0.03
    """Shift in each direction, as a share of the image's side."""
    elastic: NonNegativeFloat = 0.02
    """Standard deviation of a smooth local displacement, as a share of the image's side."""


def vary(images_BHWC: np.ndarray, config: AugmentConfig, seed: int) -> np.ndarray:
    """One version of each image, uint8 (B, H, W, C): an affine map and a smooth displacement, resampled bilinearly.

    What comes in from outside is black.
    """
    generator = torch.Generator().manual_seed(seed)
    B, H, W, _ = images_BHWC.shape

    def uniform(limit: float, *shape: int) -> torch.Tensor:
        return (2 * torch.rand(B, *shape, generator=generator) - 1) * limit

    angle_B = uniform(math.radians(config.degrees))
    size_B2 = 1 + uniform(config.scale, 2)
    shear_B = uniform(config.shear)
    cos_B, sin_B = angle_B.cos(), angle_B.sin()
    rotation_B22 = torch.stack([cos_B, -sin_B, sin_B, cos_B], 1).view(B, 2, 2)
    shear_B22 = torch.eye(2).repeat(B, 1, 1)
    shear_B22[:, 0, 1] = shear_B
    linear_B22 = rotation_B22 @ shear_B22 @ torch.diag_embed(size_B2)
    shift_B21 = 2 * uniform(config.shift, 2, 1)  # the sampling grid runs from -1 to 1
    grid_BHW2 = F.affine_grid(
        torch.cat([linear_B22, shift_B21], 2), [B, 3, H, W], align_corners=False
    )
    bumps_B2 = torch.randn(B, 2, 4, 4, generator=generator) * 2 * config.elastic
    grid_BHW2 = grid_BHW2 + F.interpolate(bumps_B2, (H, W), mode="bicubic").permute(0, 2, 3, 1)
    pixels_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float()
    varied_BCHW = F.grid_sample(pixels_BCHW, grid_BHW2, align_corners=False)
    return (
        varied_BCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    )
