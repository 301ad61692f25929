"""Image files to uint8 RGB arrays, with limits on what is decoded."""

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
"""Endings of the image files that are read, by Pillow's name of their format; AVIF where Pillow was
built with it."""
FORMATS = tuple(name for name in READABLE if name != "AVIF" or features.check("avif"))
"""Pillow's names of the formats that are read here."""
RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2")
"""Endings of raw photographs; many are TIFF files whose first image is a thumbnail."""
SUFFIXES = frozenset(
    {ending for endings in READABLE.values() for ending in endings}
    | {".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", *RAW}
)
"""Endings that make a file count as an image; those of no readable format are left out with that
reason."""

MAX_PIXELS = 64_000_000
"""Pixels that an image given by hand may have; sources have `data.max_pixels`."""
MAX_FILE_BYTES = 512 * 2**20
"""Bytes that an image file given by hand may have."""

ImageInput = str | Path | bytes | Image.Image | np.ndarray
"""What stands for one image: the path of a file, the bytes of one, a Pillow image, or an array of
pixels."""


class UnusableImage(ValueError):
    """Why one image is left out; the message is a short reason."""


def read_image(image: ImageInput, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Pixels (H, W, 3), uint8 RGB, of an image in any form that it can be given in.

    Whatever a picture is given as, its pixels are those that a source reads from its file (see
    `decode_image`): the orientation that EXIF states is applied, transparency is laid on white, 16
    bits are reduced to their upper 8.

    Arrays are grey (H, W) or (H, W, 1), RGB (H, W, 3) or RGBA (H, W, 4). Their pixels are uint8; or
    uint16, whose upper 8 bits are read; or bool, where True is white.

    Raises:
        UnusableImage: as `decode_image`, for a file that cannot be read, and for an array of
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


def decode_image(
    content: bytes, max_pixels: int, name: str = "image", *, size: int | None = None
) -> np.ndarray:
    """Pixels (H, W, 3), uint8 RGB, of an image file of one of `FORMATS`; any number of threads may
    decode at a time.

    The orientation that EXIF states is applied, transparency is laid on white, 16 bits are reduced
    to 8, the first frame of an animation and the first page of a TIFF file are taken; colour
    profiles are not applied. What Pillow warns of is printed with the file's name.

    Args:
        max_pixels: the only limit on the image's size; Pillow's own does not count.
        name: what the reason calls the file.
        size: side of the central square that the image is brought to, as by `square`; None = it is
            left as it is.

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
            # Pillow gives up where a text or a colour profile unpacks to more than a megabyte.
            # Neither is needed.
            if isinstance(error, UnusableImage) or not content.startswith(_PNG):
                raise
            return _opened_and_decoded(_without_texts(content), max_pixels, size)


def decode_transparency(content: bytes, max_pixels: int, name: str = "mask") -> np.ndarray:
    """Which pixels of an image file are wholly transparent: boolean (H, W), upright as EXIF says.

    Raises:
        UnusableImage: as `decode_image`, and for an image without transparency.
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
    """Which pixels of an image file are wholly transparent, as `decode_transparency`, for a file
    that a user gave.

    Raises:
        UserError: for a file that cannot be used.
    """
    try:
        return decode_transparency(file.read_bytes(), MAX_PIXELS)
    except (OSError, UnusableImage) as error:
        raise UserError(f"mask: {str(file)!a} cannot be used: {error}") from error


def image_size(content: bytes, max_pixels: int, name: str = "image") -> tuple[int, int]:
    """Width and height of an image file by its header, in which it lies as it does in the file.

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
            return np.asarray(rgb if size is None else _squared(rgb, size))


def _decoded(image: Image.Image, max_pixels: int) -> Image.Image:
    """An image that Pillow has opened, in RGB; one that holds no pixels yet is decoded here."""
    _check_size(image.width, image.height, max_pixels)
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
    """The format of a file that is not read, None if its beginning does not tell it."""
    beginning = content.removeprefix(b"\xef\xbb\xbf")[:4096]
    for format_, signature in _SIGNATURES.items():
        if format_ not in FORMATS and re.match(signature, beginning, re.DOTALL):
            return format_
    return None


def _without_texts(png: bytes) -> bytes:
    """A PNG file without its texts and colour profile."""
    kept, place = [_PNG], len(_PNG)
    while place < len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] not in (b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
            kept.append(png[place:end])
        place = end
    return b"".join(kept)


PIXELS_AT_ONCE = 128_000_000
"""Pixels of all images that are being decoded at a time, of which each takes 4 to 12 bytes; a
larger one is alone."""


class _Room:
    """Bounds what threads hold together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Wait until there is room for the amount; one above the limit waits until nothing else is
        there."""
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
    """The bytes of a file on this machine. Raises UnusableImage."""
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
    """The rest of a file, read piece by piece so that no more is held than there is.

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
    """Whatever Pillow raises inside the block becomes an UnusableImage about the image of that
    name."""
    try:
        yield
    except UnusableImage:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, TypeError, ...
        # Pillow's message holds the address of the buffer, which is another one in every run.
        message = _BUFFER.sub(lambda _: repr(name), f"{type(error).__name__}: {error}")
        raise UnusableImage(f"unreadable: {message}") from error


@contextmanager
def counted_modes() -> Iterator[Counter[str]]:
    """Counts the images decoded inside the block by their mode in the file: RGB, L, CMYK, I;16
    ..."""
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
        return tuple(each >> 8 for each in value) if raw_mode.endswith(";16B") else value
    return value * {"1": 255, "L;2": 85, "L;4": 17}.get(raw_mode, 1)


def _rgb(image: Image.Image, transparency: int | tuple[int, ...] | None = None) -> Image.Image:
    """The image in RGB, its transparency on white, 16 bits reduced to their upper 8.

    Args:
        transparency: the grey value or the colour that is transparent.
    """
    if image.mode == "F":
        raise UnusableImage("its pixels are floating point numbers, whose range is not known")
    if image.mode.startswith("I"):  # older versions of Pillow open 16 bits as 32
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
    """The central square of an image, resized (bicubic, antialiased) to (size, size, 3), uint8."""
    return np.asarray(_squared(Image.fromarray(pixels_HWC), size))


def fitted(pixels_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of an image, as much as has that shape, resized as in `square` to (height, width,
    3), uint8."""
    image = Image.fromarray(pixels_HWC)
    return np.asarray(ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC))


def _squared(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
