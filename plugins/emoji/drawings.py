"""The pixels of the drawings, made once for each size and kept in the user's cache."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cm3leon.io import atomic, digest_of

from .catalogue import catalogue
from .sets import OpenMoji, opened
from .styles import OPENMOJI, Styles

VERSION = 1
"""Increased whenever the same packages are drawn to other pixels."""
_EQUAL_AT = 72
"""Side, in pixels, at which drawings are compared: the grid on which OpenMoji's are designed."""


@cache
def drawings(side: int, styles: Styles = OPENMOJI) -> np.ndarray:
    """All drawings of the catalogue on white, in order: (M, side, side, 3), uint8, read only.

    Raises:
        UserError: if one of the packages is not installed.
    """
    if len(styles.names) > 1:
        of_each = [drawings(side, styles.alone(name)) for name in styles.names]
        images_MHWC = np.concatenate(of_each)
        images_MHWC.flags.writeable = False
        return images_MHWC

    # A file of the cache is mapped, not read: processes that need it share its memory.
    file = _cache() / f"emoji-{made_with(styles)}-{side}.npy"
    try:
        images_MHWC = np.load(file, mmap_mode="r", allow_pickle=False)
        if images_MHWC.shape == (len(catalogue(styles)), side, side, 3):
            return images_MHWC
    except (OSError, ValueError):
        pass  # it does not exist yet or was cut off, so the drawings are made (again)

    images_MHWC = _drawn(side, styles)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as partial, partial.open("wb") as kept:
            np.save(kept, images_MHWC)
    except OSError:
        pass  # no room, or no home folder: the next process draws them again
    images_MHWC.flags.writeable = False
    return images_MHWC


@cache
def contents(styles: Styles = OPENMOJI) -> tuple[str, ...]:
    """A digest of what each drawing shows, the same for drawings that are equal pixel by pixel.

    For example, the pilot and the man pilot are equal, and so are the flags of Norway and Svalbard.
    """
    return tuple(digest_of(image_HWC.tobytes())[:16] for image_HWC in drawings(_EQUAL_AT, styles))


def made_with(styles: Styles = OPENMOJI) -> str:
    """A digest that changes with what names and draws: the versions of packages, and the content of
    the files of other styles than OpenMoji's."""
    made = f"{VERSION} {OpenMoji().made_with()}"
    if styles.names != OPENMOJI.names:
        made += f" {[opened(styles.alone(name)).made_with() for name in styles.names]}"
    return digest_of(made)[:16]


def _drawn(side: int, styles: Styles) -> np.ndarray:
    """Draw all drawings of one style at one size."""
    found, known = catalogue(styles), opened(styles)
    images_MHWC = np.empty((len(found), side, side, 3), np.uint8)
    (style,) = styles.names
    progress = tqdm(found, desc=f"drawings of {side} pixels ({style})", mininterval=2.0)
    for number, emoji in enumerate(progress):
        images_MHWC[number] = known.draw(emoji.code, side)
    return images_MHWC


def _cache() -> Path:
    """The folder for this user's files that can be made again, as the XDG base directory
    specification names it."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if given:
        return Path(given) / "cm3leon"
    return Path.home() / ".cache" / "cm3leon"
