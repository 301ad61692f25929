"""Slightly moved versions of images, for corpora too small to learn from otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from cm3leon.config import NonNegativeFloat, NonNegativeInt
from cm3leon.io import digest_of


@dataclass(kw_only=True)
class AugmentConfig:
    """How training images are varied. Draws are uniform between minus and plus the value, unless
    the setting says otherwise."""

    versions: NonNegativeInt = 0
    """Versions of each training image besides the image itself; 0 = no augmentation, which is right
    for any large corpus."""
    degrees: NonNegativeFloat = 8.0
    """Rotation, in degrees."""
    scale: NonNegativeFloat = 0.08
    """Change of the width and of the height, drawn separately, as a share of each."""
    shear: NonNegativeFloat = 0.1
    """Horizontal shear, as a share of the height."""
    shift: NonNegativeFloat = 0.03
    """Shift in each direction, as a share of the image's side."""
    elastic: NonNegativeFloat = 0.02
    """Standard deviation of a smooth local displacement, as a share of the image's side."""
    shift_step: NonNegativeFloat = 0.0
    """Shifts are rounded to multiples of this share of the image's side; 0 = not rounded. With the
    side of one image code, the image's cells are moved but keep their content."""
    outside: Literal["black", "white"] = "black"
    """Colour of the area that comes into view from beyond the image's border."""
    shared: bool = False
    """Whether version k of every image is made by the same map, and a sample holds one version of
    all its documents: how the query is drawn can then be read from the documents before it, instead
    of being learned by heart."""


UNCHANGED = {"shift_step": 0.0, "outside": "black", "shared": False}
"""Values of the newer settings that give the versions made before these settings existed."""
SHARED_KEY = "shared"
"""The key that the maps are drawn by where all images share them."""


def varied(
    images_BHWC: np.ndarray, keys: Sequence[str], config: AugmentConfig, seed: int
) -> Iterator[np.ndarray]:
    """Yield one varied version of all images after the other, each uint8 (B, H, W, C): an affine
    map and a smooth local displacement.

    The versions of an image depend on the seed and its key alone, not on the images beside it, so
    that a corpus gives the same ones in whatever batches it is read. Where the maps are shared,
    they depend on the seed alone.

    Args:
        keys: a name for each image, such as its document's id.
    """
    B, H, W, _ = images_BHWC.shape
    if not B or not config.versions:
        return
    pixels_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float()

    # All numbers are drawn image by image, then read version by version.
    named = [SHARED_KEY if config.shared else key for key in keys]
    drawn = [_draws(name, config.versions, seed) for name in named]
    uniform_VB6, normal_VB244 = (
        torch.from_numpy(np.stack(numbers, axis=1)) for numbers in zip(*drawn, strict=True)
    )

    # grid_sample fills the outside with black; for white it is given the negative of the images.
    negative = config.outside == "white"
    if negative:
        pixels_BCHW = 255 - pixels_BCHW
    for uniform_B6, normal_B244 in zip(uniform_VB6, normal_VB244, strict=True):
        # The sampling grid says for each pixel where in the image it is taken from.
        affine_B23 = _affine(uniform_B6, config)
        grid_BHW2 = F.affine_grid(affine_B23, [B, 3, H, W], align_corners=False)
        bumps_B244 = normal_B244 * 2 * config.elastic
        bumps_B2HW = F.interpolate(bumps_B244, (H, W), mode="bicubic")
        grid_BHW2 = grid_BHW2 + bumps_B2HW.permute(0, 2, 3, 1)

        varied_BCHW = F.grid_sample(pixels_BCHW, grid_BHW2, align_corners=False)
        if negative:
            varied_BCHW = 255 - varied_BCHW

        bytes_BCHW = varied_BCHW.round().clamp(0, 255).to(torch.uint8)
        yield bytes_BCHW.permute(0, 2, 3, 1).contiguous().numpy()


def _draws(key: str, versions: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the numbers of each version of one image: uniform ones from -1 to 1 (V, 6) for the affine
    map, and normal ones (V, 2, 4, 4) for the displacement."""
    rng = np.random.default_rng([seed, int(digest_of(key)[:16], 16)])
    uniform_V6 = rng.uniform(-1, 1, (versions, 6)).astype(np.float32)
    return uniform_V6, rng.standard_normal((versions, 2, 4, 4), dtype=np.float32)


def _affine(uniform_B6: torch.Tensor, config: AugmentConfig) -> torch.Tensor:
    """Affine maps (B, 2, 3) that rotate, shear, stretch and shift."""
    B = len(uniform_B6)
    angle_B = uniform_B6[:, 0] * math.radians(config.degrees)
    size_B2 = 1 + uniform_B6[:, 1:3] * config.scale
    cos_B, sin_B = angle_B.cos(), angle_B.sin()
    rotation_B22 = torch.stack([cos_B, -sin_B, sin_B, cos_B], 1).view(B, 2, 2)
    shear_B22 = torch.eye(2).repeat(B, 1, 1)
    shear_B22[:, 0, 1] = uniform_B6[:, 3] * config.shear
    linear_B22 = rotation_B22 @ shear_B22 @ torch.diag_embed(size_B2)

    shift_B21 = uniform_B6[:, 4:, None] * config.shift
    if config.shift_step:
        shift_B21 = (shift_B21 / config.shift_step).round() * config.shift_step
    shift_B21 = 2 * shift_B21  # the sampling grid runs from -1 to 1
    return torch.cat([linear_B22, shift_B21], 2)
