"""What codes keep of images: figures of originals and their reconstructions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from cm3leon.evaluation.images import (
    WINDOW,
    Extractor,
    features,
    frechet_distance,
    lpips,
    ssim,
)
from cm3leon.evaluation.metrics import average, codebook_use, psnr, psnr_each
from cm3leon.tokenizers.image.perceptual import SMALLEST, Perceptual


def averages(
    images_BHWC: np.ndarray, rebuilt_BHWC: np.ndarray, codes_BN: np.ndarray, codebook_size: int
) -> dict[str, float]:
    """Figures that are cheap enough to compute during training."""
    use, perplexity = codebook_use(codes_BN, codebook_size)
    return {
        "psnr_db": psnr(images_BHWC, rebuilt_BHWC),
        "codebook_use": use,
        "codebook_perplexity": perplexity,
    }


def reconstruction_figures(
    images_BHWC: np.ndarray,
    rebuilt_BHWC: np.ndarray,
    codes_BN: np.ndarray,
    codebook_size: int,
    *,
    perceptual: Perceptual | None = None,
    extractor: Extractor | None = None,
) -> dict[str, Any]:
    """All figures of reconstructions by name, None for those that were not measured.

    Figures of single images come with the 95 % interval of their mean.

    Args:
        perceptual: measures `lpips`.
        extractor: measures `rfid`, the Fréchet distance of originals and reconstructions in its
            features.
    """
    figures: dict[str, Any] = {"psnr_db": None, "ssim": None, "lpips": None, "rfid": None}

    # An image that comes back exactly has no PSNR.
    psnr_B = psnr_each(images_BHWC, rebuilt_BHWC)
    known_B = np.isfinite(psnr_B)
    if known_B.any():
        figures["psnr_db"] = asdict(average(psnr_B[known_B]))

    # Small images have no SSIM and LPIPS.
    side = min(images_BHWC.shape[1:3])
    if side >= WINDOW:
        figures["ssim"] = asdict(average(ssim(images_BHWC, rebuilt_BHWC)))
    if perceptual is not None and side >= SMALLEST:
        figures["lpips"] = asdict(average(lpips(perceptual, images_BHWC, rebuilt_BHWC)))
    if extractor is not None and len(images_BHWC) > 1:
        originals_BD = features(extractor, images_BHWC)
        figures["rfid"] = frechet_distance(originals_BD, features(extractor, rebuilt_BHWC))

    use, perplexity = codebook_use(codes_BN, codebook_size)
    return {
        "images": len(images_BHWC),
        **figures,
        "codebook_use": use,
        "codebook_perplexity": perplexity,
    }
