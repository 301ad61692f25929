"""Image files to uint8 RGB arrays, with limits on what is decoded.

    what a file holds                      what is read
    an orientation in EXIF                 the pixels as a viewer shows them
    transparent pixels                     the image on white
    16 bits per channel                    the upper 8
    several frames or pages                the first
    more than max_pixels, by its header    nothing: UnusableImage, before anything is decoded
    a format that is not read (HEIC)       nothing: UnusableImage, naming the format

Colour profiles are not applied.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features
from PIL.ImageFile import ImageFile

from cm3leon.data.pillow import bare_pillow
from cm3leon.types import UserError

READABLE = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
}
"""Endings of the image files that are read, by Pillow's names of their formats. AVIF is read if
Pillow was built with it."""
FORMATS = tuple(name for name in READABLE if name != "AVIF" or features.check("avif"))
"""Pillow's names of the formats that can be read here."""
RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2")
"""Endings of raw photographs; many are TIFF files that begin with a thumbnail."""
SUFFIXES = frozenset(
    {ending for endings in READABLE.values() for ending in endings}
    | {".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", *RAW}
)
"""Endings by which a file counts as an image; files of an unreadable format are left out with that
reason."""

MAX_PIXELS = 64_000_000
"""Most pixels of an image given by a user; for sources, `data.max_pixels` says so."""
MAX_FILE_BYTES = 512 * 2**20
"""Most bytes of an image file given by a user."""

ImageInput = str | Path | bytes | Image.Image | np.ndarray
"""An image: the path of its file, the file's bytes, a Pillow image, or an array of pixels."""


class UnusableImage(ValueError):
    """Why an image is left out; the message is a short reason."""


def read_image(image: ImageInput, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels (H, W, 3), uint8 RGB, of an image in any accepted form.

    The pixels are the same as those that a source reads from the image's file (see `decode_image`):
    upright as EXIF says, transparency on white, 16 bits reduced to the upper 8.

    Arrays are grey (H, W) or (H, W, 1), RGB (H, W, 3) or RGBA (H, W, 4). They hold uint8, uint16
    (of which the upper 8 bits are read) or bool (True is white).

    Raises:
        UnusableImage: as for `decode_image`, for a file that cannot be read, and for an array of
            another shape or type.
    """
    if isinstance(image, bytes):
        return decode_image(image, max_pixels)
    if isinstance(image, (str, Path)):
        return decode_image(_file_content(image), max_pixels, Path(image).name)
    if isinstance(image, Image.Image):
        name = os.fsdecode(image.filename) if isinstance(image, ImageFile) else ""
        with _reasons(name or "image"):
            return np.asarray(_decoded(image, max_pixels))
    if isinstance(image, np.ndarray):
        return _array_pixels(image, max_pixels)
    raise UnusableImage(
        f"it is of type {type(image).__name__}; it must be a path, bytes, a Pillow image or a "
        "NumPy array"
    )


def read_given_image(image: ImageInput, argument: str) -> np.ndarray:
    """Read an image as `read_image` does, for a user's argument of that name.

    Raises:
        UserError: naming the argument and, if the image is a file, its path.
    """
    try:
        return read_image(image)
    except UnusableImage as error:
        shown = f"{str(image)!a}" if isinstance(image, (str, Path)) else "the image"
        raise UserError(f"{argument}: {shown} cannot be used: {error}") from error


def decode_image(
    content: bytes, max_pixels: int, name: str = "image", *, size: int | None = None
) -> np.ndarray:
    """Decode an image file of one of `FORMATS` to pixels (H, W, 3), uint8 RGB. Any number of
    threads may decode at a time.

    The image is turned upright as EXIF says, transparency is laid on white, and 16 bits are reduced
    to 8. Of an animation the first frame is read, of a TIFF file the first page. Colour profiles
    are not applied. Pillow's warnings are printed with the file's name.

    Args:
        max_pixels: the only limit on the image's size; Pillow's own is not used.
        name: the file's name, for the reason.
        size: side of the central square to resize to, as by `square`; None = the whole image.

    Raises:
        UnusableImage: for a file that is unreadable, truncated, or has more than `max_pixels`; its
            size is read from the header, so that a decompression bomb is never decoded.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in RAW:
        raise UnusableImage(f"is a raw photograph ({suffix}); {_READ} are read")

    with _reasons(name), bare_pillow(name):
        try:
            return _opened_and_decoded(content, max_pixels, size)
        except UnidentifiedImageError:
            format_ = _format_of(content)
            if format_ is None:
                raise
            raise UnusableImage(f"is {format_}; {_READ} are read") from None
        except ValueError as error:
            # Pillow gives up if a text or a colour profile unpacks to more than a megabyte. Neither
            # is needed here.
            if isinstance(error, UnusableImage) or not content.startswith(_PNG):
                raise
            return _opened_and_decoded(_without_texts(content), max_pixels, size)


def decode_transparency(content: bytes, max_pixels: int, name: str = "mask") -> np.ndarray:
    """Find the wholly transparent pixels of an image file: bool (H, W), upright as EXIF says.

    Raises:
        UnusableImage: as for `decode_image`, and for an image without transparency.
    """
    with (
        _reasons(name),
        bare_pillow(name),
        Image.open(io.BytesIO(content), formats=FORMATS) as image,
    ):
        _check_size(image.width, image.height, max_pixels)
        with _room.taken(image.width * image.height):
            if not image.has_transparency_data:
                raise UnusableImage("it has no transparency")
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGBA").getchannel("A")) == 0


def read_mask(file: Path) -> np.ndarray:
    """Find the transparent pixels as `decode_transparency` does, for a file given by a user.

    Raises:
        UserError: for a file that cannot be used.
    """
    try:
        return decode_transparency(file.read_bytes(), MAX_PIXELS)
    except (OSError, UnusableImage) as error:
        raise UserError(f"mask: {str(file)!a} cannot be used: {error}") from error


def image_size(content: bytes, max_pixels: int, name: str = "image") -> tuple[int, int]:
    """The width and height of an image file by its header, before it is turned upright.

    Raises:
        UnusableImage: for a file that is unreadable or has more than `max_pixels`.
    """
    with (
        _reasons(name),
        bare_pillow(name),
        Image.open(io.BytesIO(content), formats=FORMATS) as image,
    ):
        _check_size(image.width, image.height, max_pixels)
        return image.size


def _opened_and_decoded(content: bytes, max_pixels: int, size: int | None) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        _check_size(image.width, image.height, max_pixels)
        with _room.taken(image.width * image.height):
            rgb = _decoded(image, max_pixels)
            if size is not None:
                rgb = _squared(rgb, size)
            return np.asarray(rgb)


def _decoded(image: Image.Image, max_pixels: int) -> Image.Image:
    """Bring an image that Pillow has opened to RGB; its pixels are decoded here at the latest."""
    _check_size(image.width, image.height, max_pixels)
    # What says which value is transparent is lost by decoding, so it is read first.
    mode, transparency = image.mode, _transparent_value(image)
    image.load()
    rgb = _rgb(ImageOps.exif_transpose(image), transparency)
    counter = _modes.get()
    if counter is not None:
        with _counting:
            counter[mode] += 1
    return rgb


_READ = "JPEG, PNG, WebP, GIF, BMP, TIFF" + (" and AVIF" if "AVIF" in FORMATS else "")
_PNG = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = {
    "HEIC": rb"....ftyp(?:hei|hev|mif1|msf1)",
    "AVIF": rb"....ftypavi",
    "Photoshop's PSD": rb"8BPS",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "SVG": rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?<svg",
    "PDF": rb"%PDF-",
}


def _format_of(content: bytes) -> str | None:
    """The name of the format of a file that cannot be read; None if its beginning is unknown."""
    beginning = content.removeprefix(b"\xef\xbb\xbf")[:4096]
    for format_, signature in _SIGNATURES.items():
        if format_ not in FORMATS and re.match(signature, beginning, re.DOTALL):
            return format_
    return None


def _without_texts(png: bytes) -> bytes:
    """Drop the texts and the colour profile of a PNG file."""
    kept, start = [_PNG], len(_PNG)
    while start < len(png):
        # A chunk is its length (4 bytes), type (4), data, and checksum (4).
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        if png[start + 4 : start + 8] not in (b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


PIXELS_AT_ONCE = 128_000_000
"""Most pixels of all images that are decoded at a time, each of 4 to 12 bytes; a larger image is
decoded alone."""


class _Room:
    """A bound on what all threads hold together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Wait until there is room for the amount; an amount above the limit waits until nothing
        else is held."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + amount <= self._limit)
            self._taken += amount
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()


_room = _Room(PIXELS_AT_ONCE)


def _file_content(path: str | Path) -> bytes:
    """Read a file of this machine. Raises UnusableImage."""
    try:
        file = Path(path).expanduser()
        if file.exists() and not file.is_file():  # reading a pipe or a device may never end
            raise UnusableImage("it is not a file")
        with file.open("rb") as opened:
            content = read_limited(opened, MAX_FILE_BYTES)
    except OSError as error:
        raise UnusableImage(f"unreadable: {error.strerror}") from error
    except (RuntimeError, ValueError) as error:  # a home folder of nobody, a NUL in the name
        if isinstance(error, UnusableImage):
            raise
        raise UnusableImage(f"unreadable: {error}") from error
    return content


def read_limited(file: BinaryIO, limit: int) -> bytes:
    """Read the rest of a file piece by piece, so that little is held of a file that is too long.

    Raises:
        UnusableImage: for more bytes than the limit.
    """
    pieces, size = [], 0
    while piece := file.read(2**20):
        size += len(piece)
        if size > limit:
            raise UnusableImage(f"too large: more than {limit} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _array_pixels(pixels: np.ndarray, max_pixels: int) -> np.ndarray:
    """Bring an array to pixels (H, W, 3), uint8 RGB. Raises UnusableImage."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or not pixels.size:
        raise UnusableImage(
            f"an array of shape {pixels.shape}; it must be (H, W), (H, W, 1), (H, W, 3) or "
            "(H, W, 4)"
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
    """Turn whatever Pillow raises inside the block into an UnusableImage about that image."""
    try:
        yield
    except UnusableImage:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, TypeError, ...
        # Pillow's message contains the address of the buffer, which differs in every run.
        message = _BUFFER.sub(lambda _: repr(name), f"{type(error).__name__}: {error}")
        raise UnusableImage(f"unreadable: {message}") from error


@contextmanager
def counted_modes() -> Iterator[Counter[str]]:
    """Count the images decoded inside the block by their mode in the file, such as RGB or CMYK."""
    counter: Counter[str] = Counter()
    token = _modes.set(counter)
    try:
        yield counter
    finally:
        _modes.reset(token)


_BUFFER = re.compile(r"<_io\.BytesIO object at 0x[0-9a-fA-F]+>")
_counting = threading.Lock()
_modes: ContextVar[Counter[str] | None] = ContextVar("modes", default=None)


def _transparent_value(image: Image.Image) -> int | tuple[int, ...] | None:
    """The one transparent value or colour of a PNG file in the units of the decoded pixels, None
    without one.

    The file states it in its own number of bits, in which Pillow leaves it.
    """
    value = image.info.get("transparency")
    if not isinstance(value, (int, tuple)) or image.mode == "P":
        return None
    tiles = image.tile if isinstance(image, ImageFile) else ()
    raw_mode = str(tiles[0].args) if tiles else image.mode
    if isinstance(value, tuple):
        if not raw_mode.endswith(";16B"):
            return value
        return tuple(each >> 8 for each in value)
    return value * {"1": 255, "L;2": 85, "L;4": 17}.get(raw_mode, 1)


def _rgb(image: Image.Image, transparency: int | tuple[int, ...] | None = None) -> Image.Image:
    """Bring an image to RGB, with transparency on white and 16 bits reduced to the upper 8.

    Args:
        transparency: the grey value or the colour that is transparent, if one is.
    """
    if image.mode == "F":
        raise UnusableImage("its pixels are floating point numbers, whose range is not known")
    # Older versions of Pillow open 16 bits as 32.
    if image.mode.startswith("I"):
        values_HW = np.asarray(image).astype(np.int64)
        if values_HW.min() < 0 or values_HW.max() > 0xFFFF:
            raise UnusableImage("its pixels have 32 bits, whose range is not known")
        grey_HW = (values_HW >> 8).astype(np.uint8)
        if transparency is not None:
            grey_HW[values_HW == transparency] = 255
        return Image.fromarray(grey_HW).convert("RGB")

    if transparency is not None:
        rgb_HWC = np.array(image.convert("RGB"))
        rgb_HWC[(rgb_HWC == transparency).all(axis=2)] = 255
        return Image.fromarray(rgb_HWC)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def square(pixels_HWC: np.ndarray, size: int) -> np.ndarray:
    """Resize the central square of an image (bicubic, antialiased) to (size, size, 3), uint8."""
    return np.asarray(_squared(Image.fromarray(pixels_HWC), size))


def fitted(pixels_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize the largest central part of that shape, as `square` does, to (height, width, 3)."""
    image = Image.fromarray(pixels_HWC)
    return np.asarray(ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC))


def _squared(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
