"""The measure: which of all drawings an image comes closest to. Nothing here was trained for it.

Images are compared by pixels, and by features that have nothing to do with any tokenizer:
histograms of oriented gradients (Dalal and Triggs 2005) and the mean colours of cells in CIELAB,
both by scikit-image. The drawings are made from their files at the size of the answers; nothing of
the corpus, its split or its codes is used.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from cm3leon.io import digest_of
from cm3leon.types import UserError

from .catalogue import Emoji, catalogue
from .drawings import drawings
from .styles import OPENMOJI, Styles

CELLS = 6
"""Cells per side, of gradients and of colours."""
ORIENTATIONS = 8
AT_ONCE = 256
"""Images that are compared at a time."""


class Drawings:
    """All drawings at one size, with everything by which images are compared with them."""

    def __init__(self, side: int, styles: Styles) -> None:
        self.side = side
        images_MHWC = drawings(side, styles)
        self.looks = [digest_of(image_HWC.tobytes()) for image_HWC in images_MHWC]
        """Digests of the pixels, equal for drawings that cannot be told apart at this size."""
        twins: dict[str, list[Emoji]] = {}
        for emoji, look in zip(catalogue(styles), self.looks, strict=True):
            twins.setdefault(look, []).append(emoji)
        self._twins = [twins[look] for look in self.looks]
        self._pixels_MD = _flat(images_MHWC)
        gradients_MD, colours_MD = gradients(images_MHWC), colours(images_MHWC)

        # Both parts weigh the same: each is measured in units of its own spread over all drawings.
        self._units = _spread(gradients_MD), _spread(colours_MD)
        self._features_MD = self._scaled(gradients_MD, colours_MD)

    def nearest_by_pixels(self, images_BHWC: np.ndarray) -> list[int]:
        """The index of the drawing with the smallest squared distance to each image."""
        return _nearest(_flat(self._checked(images_BHWC)), self._pixels_MD)

    def nearest_by_features(self, images_BHWC: np.ndarray) -> list[int]:
        """The index of the drawing whose features have the smallest squared distance to those of
        each image."""
        images_BHWC = self._checked(images_BHWC)
        features_BD = self._scaled(gradients(images_BHWC), colours(images_BHWC))
        return _nearest(features_BD, self._features_MD)

    def same(self, one: int, other: int) -> bool:
        """Whether two drawings cannot be told apart at this size."""
        return self.looks[one] == self.looks[other]

    def named(self, number: int) -> list[Emoji]:
        """All emojis with this drawing: it may be the man's as well as the pilot's."""
        return self._twins[number]

    def _scaled(self, gradients_BD: np.ndarray, colours_BD: np.ndarray) -> np.ndarray:
        """Gradients and colours as one vector, each in its own unit."""
        return np.concatenate(
            [gradients_BD / self._units[0], colours_BD / self._units[1]], axis=1
        ).astype(np.float32)

    def _checked(self, images_BHWC: np.ndarray) -> np.ndarray:
        """The images, if they have the size of the drawings. Raises UserError if not."""
        if images_BHWC.shape[1:] != (self.side, self.side, 3):
            height, width = images_BHWC.shape[1:3]
            raise UserError(
                f"protocol.side is {self.side}, but the images that are measured have "
                f"{width} x {height} pixels; side must be that of the model's images"
            )
        return images_BHWC


def all_drawings(side: int, styles: Styles = OPENMOJI) -> Drawings:
    """The drawings of a size, prepared once in a process."""
    return _prepared(side, styles)


@cache
def _prepared(side: int, styles: Styles) -> Drawings:
    return Drawings(side, styles)


def meets(asked: Emoji, found: Emoji) -> bool:
    """Whether a caption may mean a drawing: it differs only in what the caption leaves open.

    `firefighter` leaves the gender open, and a name of which there are several tones leaves the
    tone open.
    """
    if found.subject != asked.subject or found.style != asked.style:
        return False
    return gender_met(asked, found) and tone_met(asked, found)


def gender_met(asked: Emoji, found: Emoji) -> bool:
    """Whether a drawing has the gender that a caption states, if it states one."""
    return asked.gender not in ("woman", "man") or found.gender == asked.gender


def tone_met(asked: Emoji, found: Emoji) -> bool:
    """Whether a drawing has the tones that a caption states, if it states any."""
    return found.tones == asked.tones or (not asked.tones and asked.has_tones)


@cache
def by_caption(styles: Styles = OPENMOJI) -> dict[str, int]:
    """The indices of the drawings by their captions, in lower case."""
    return {emoji.caption.lower(): number for number, emoji in enumerate(catalogue(styles))}


# --------------------------------------------------------------------------------------- features


def gradients(images_BHWC: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients (B, D) of uint8 images.

    One block is the whole image, so that noise in plain cells is not raised to the height of
    outlines.
    """
    hog = _scikit_image("feature").hog
    side = images_BHWC.shape[1]
    cell = max(2, side // CELLS)
    histograms = []
    for image_HWC in images_BHWC:
        histogram_D = hog(
            image_HWC,
            orientations=ORIENTATIONS,
            pixels_per_cell=(cell, cell),
            cells_per_block=(CELLS, CELLS),
            channel_axis=-1,
        )
        histograms.append(histogram_D)
    return np.stack(histograms)


def colours(images_BHWC: np.ndarray) -> np.ndarray:
    """Mean colours (B, D) of the cells of uint8 images, in CIELAB."""
    rgb2lab = _scikit_image("color").rgb2lab
    edges = np.linspace(0, images_BHWC.shape[1], CELLS + 1).round().astype(int)[:-1]
    sizes_Y = np.diff([*edges, images_BHWC.shape[1]])
    means = []
    for first in range(0, len(images_BHWC), AT_ONCE):
        # The sum over each cell, divided by its number of pixels.
        lab_BHWC = rgb2lab(np.asarray(images_BHWC[first : first + AT_ONCE]))
        sums_BYXC = np.add.reduceat(np.add.reduceat(lab_BHWC, edges, axis=1), edges, axis=2)
        means_BYXC = sums_BYXC / (sizes_Y[:, None] * sizes_Y)[..., None]
        means.append(means_BYXC.reshape(len(means_BYXC), -1))
    return np.concatenate(means)


def _scikit_image(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"skimage.{module}")
    except ImportError as error:
        raise UserError(
            "protocol.name is emoji, which needs the package scikit-image: pip install scikit-image"
        ) from error


def _spread(features_MD: np.ndarray) -> float:
    """The root of the mean squared distance of features to their mean."""
    return float(np.sqrt(features_MD.var(axis=0).sum()))


def _flat(images_BHWC: np.ndarray) -> np.ndarray:
    """Images as vectors of numbers from 0 to 1."""
    return images_BHWC.reshape(len(images_BHWC), -1).astype(np.float32) / 255


def _nearest(queries_BD: np.ndarray, known_MD: np.ndarray) -> list[int]:
    """The row of `known_MD` that is closest to each query; the first of several."""
    squares_M = np.square(known_MD).sum(axis=1)
    found: list[int] = []
    for first in range(0, len(queries_BD), AT_ONCE):
        # The query's own square is the same for all, and is left out.
        distances_BM = squares_M - 2 * queries_BD[first : first + AT_ONCE] @ known_MD.T
        found += distances_BM.argmin(axis=1).tolist()
    return found
