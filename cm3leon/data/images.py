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

from cm3leon.types import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
FORMATS = ("JPEG", "PNG", "WEBP")


MAX_PIXELS = 64_000_000
"""Pixels that an image given by hand may have; sources have `data.max_pixels`."""
MAX_FILE_BYTES = 512 * 2**20
"""Bytes that an image file given by hand may have."""

ImageInput = str | Path | bytes | Image.Image | np.ndarray
"""What stands for one image: the path of a file, the bytes of one, a Pillow image, or an array of pixels."""


class UnusableImage(ValueError):
    """Why one image is left out; the message is a short reason."""


def read_image(image: ImageInput, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Pixels (H, W, 3), uint8 RGB, of an image in any form that it can be given in.

    Whatever a picture is given as, its pixels are those that a source reads from its file (see `decode_image`): the
    orientation that EXIF states is applied, transparency is laid on white, 16 bits are reduced to their upper 8.

    Arrays are grey (H, W) or (H, W, 1), RGB (H, W, 3) or RGBA (H, W, 4). Their pixels are uint8; or uint16, whose
    upper 8 bits are read; or bool, where True is white.

    Raises:
        UnusableImage: as `decode_image`, for a file that cannot be read, and for an array of another shape or type.
    """
    if isinstance(image, bytes):
        return decode_image(image, max_pixels)
    if isinstance(image, (str, Path)):
        return decode_image(_file_content(image), max_pixels, Path(image).name)
    if isinstance(image, Image.Image):
        return _decoded(image, max_pixels, getattr(image, "filename", "") or "image")
    if isinstance(image, np.ndarray):
        return _array_pixels(image, max_pixels)
    raise UnusableImage(
        f"it is of type {type(image).__name__}; it must be a path, bytes, a Pillow image or a NumPy array"
    )


def read_given_image(image: ImageInput, argument: str) -> np.ndarray:
    """As `read_image`, for an image that a user gave as the argument of that name.

    Raises:
        UserError: naming the argument, and the file if it is one.
    """
    try:
        return read_image(image)
    except UnusableImage as error:
        shown = f"{str(image)!a}" if isinstance(image, (str, Path)) else "the image"
        raise UserError(f"{argument}: {shown} cannot be used: {error}") from error


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
    with _reasons(name), Image.open(io.BytesIO(content), formats=FORMATS) as image:
        return _decoded(image, max_pixels, name)


def _decoded(image: Image.Image, max_pixels: int, name: str) -> np.ndarray:
    """Pixels (H, W, 3) of an image that Pillow has opened; one that holds no pixels yet is decoded here."""
    _check_size(image.width, image.height, max_pixels)
    with _reasons(name):
        mode = image.mode
        image.load()
        pixels_HWC = np.asarray(_rgb(ImageOps.exif_transpose(image)))
    counter = _modes.get()
    if counter is not None:
        counter[mode] += 1
    return pixels_HWC


def _file_content(path: str | Path) -> bytes:
    """The bytes of a file on this machine. Raises UnusableImage."""
    try:
        file = Path(path).expanduser()
        if file.exists() and not file.is_file():  # reading a pipe or a device may never end
            raise UnusableImage("it is not a file")
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UnusableImage(f"unreadable: {error.strerror}") from error
    except (RuntimeError, ValueError) as error:  # a home folder of nobody, a NUL in the name
        if isinstance(error, UnusableImage):
            raise
        raise UnusableImage(f"unreadable: {error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise UnusableImage(f"too large: more than {MAX_FILE_BYTES} bytes")
    return content


def _array_pixels(pixels: np.ndarray, max_pixels: int) -> np.ndarray:
    """Pixels (H, W, 3), uint8 RGB, of an array. Raises UnusableImage."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or not pixels.size:
        raise UnusableImage(
            f"an array of shape {pixels.shape}; it must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
    _check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise UnusableImage(f"an array of {pixels.dtype}; it must be uint8, uint16 or bool")
    if channels == 1:
        pixels = pixels.reshape(pixels.shape[:2])
    return np.asarray(_rgb(Image.fromarray(np.ascontiguousarray(pixels))))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UnusableImage(f"too large: {width}x{height} pixels")
    if not width or not height:
        raise UnusableImage("it has no pixels")


@contextmanager
def _reasons(name: str) -> Iterator[None]:
    """Whatever Pillow raises inside the block becomes an UnusableImage about the image of that name."""
    try:
        yield
    except UnusableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnusableImage("too large: the header promises a decompression bomb") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, TypeError, ...
        # Pillow's message holds the address of the buffer, which is another one in every run.
        message = _BUFFER.sub(lambda _: repr(name), f"{type(error).__name__}: {error}")
        raise UnusableImage(f"unreadable: {message}") from error


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
    if image.mode == "F":
        raise UnusableImage("its pixels are floating point numbers, whose range is not known")
    if image.mode.startswith("I"):  # older versions of Pillow open 16 bits as 32
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
