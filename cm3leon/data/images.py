"""Image files to uint8 RGB arrays, with limits on what is decoded."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
FORMATS = ("JPEG", "PNG", "WEBP")


class UnusableImage(ValueError):
    """Why one image file is left out; the message is a short reason."""


def read_image(path: Path, max_pixels: int) -> np.ndarray:
    """As `decode_image`, of a local file.

    Raises:
        UnusableImage: as `decode_image`, and for a file that cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnusableImage(f"unreadable: {error.strerror}") from error
    return decode_image(content, max_pixels, path.name)


def decode_image(content: bytes, max_pixels: int, name: str = "image") -> np.ndarray:
    """Pixels (H, W, 3), uint8 RGB, of a JPEG, PNG or WebP file.

    The orientation that EXIF states is applied, transparency is laid on white, 16 bits are reduced to 8, the first
    frame of an animation is taken.

    Args:
        name: what the reason calls the file.

    Raises:
        UnusableImage: for a file that is unreadable, truncated, or has more than `max_pixels`; its size is read from
            the header, so that a decompression bomb is never decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise UnusableImage(f"too large: {image.width}x{image.height} pixels")
            mode = image.mode
            image.load()
            pixels_HWC = np.asarray(_rgb(ImageOps.exif_transpose(image)))
    except UnusableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnusableImage("too large: the header promises a decompression bomb") from error
    except (
        Exception
    ) as error:  # for broken files Pillow raises OSError, SyntaxError, struct.error, TypeError, ...
        # Pillow's message holds the address of the buffer, which is another one in every run.
        message = _BUFFER.sub(lambda _: repr(name), f"{type(error).__name__}: {error}")
        raise UnusableImage(f"unreadable: {message}") from error
    counter = _modes.get()
    if counter is not None:
        counter[mode] += 1
    return pixels_HWC


@contextmanager
def counted_modes() -> Iterator[Counter[str]]:
    """Counts the images decoded inside the block by their mode in the file: RGB, L, CMYK, I;16 ..."""
    counter: Counter[str] = Counter()
    token = _modes.set(counter)
    try:
        yield counter
    finally:
        _modes.reset(token)


_BUFFER = re.compile(r"<_io\.BytesIO object at 0x[0-9a-fA-F]+>")
_modes: ContextVar[Counter[str] | None] = ContextVar("modes", default=None)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(
            (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def square(pixels_HWC: np.ndarray, size: int) -> np.ndarray:
    """The central square of an image, resized (bicubic, antialiased) to (size, size, 3), uint8."""
    image = ImageOps.fit(Image.fromarray(pixels_HWC), (size, size), method=Image.Resampling.BICUBIC)
    return np.asarray(image)
