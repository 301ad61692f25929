"""Image files as cameras, editors and scanners write them: what is read, and what is refused."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import encoded, picture
from PIL import Image, TiffImagePlugin, features

from cm3leon.data import ahead, images, pillow
from cm3leon.data.images import UnusableImage, decode_image
from cm3leon.registry import SOURCES, discover
from cm3leon.types import Document

discover()

WHITE = 255


def saved(image: Image.Image, format_: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def png(width: int, height: int, kind: tuple[int, int], rows: bytes, transparent: bytes) -> bytes:
    """A PNG put together by hand, of any bit depth and colour type.

    `kind` is (bits, colour type); `rows` are the pixels with the filter byte of each row, and
    `transparent` is the content of the tRNS chunk: the colour that is transparent.
    """

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, *kind, 0, 0, 0))
    content = chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + content + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "jpg", "gif", "bmp", "tif", "tiff", "webp"])
def test_every_usual_ending_is_read(suffix: str, tmp_path: Path) -> None:
    format_ = {"jfif": "jpeg", "jpe": "jpeg", "jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix)
    content = encoded(np.full((9, 9, 3), 77, np.uint8), format_)
    (tmp_path / f"A.{suffix.upper()}").write_bytes(content)
    (tmp_path / "A.txt").write_text("grey")
    (item,) = SOURCES.build({"name": "folder", "path": str(tmp_path)}).documents()
    assert isinstance(item, Document)
    assert item.text == "grey"
    assert item.image is not None
    assert np.abs(item.image.astype(int) - 77).max() <= 2


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
def test_avif_is_read() -> None:
    content = encoded(np.full((16, 16, 3), 77, np.uint8), "avif")
    assert np.abs(decode_image(content, 256).astype(int) - 77).max() <= 2


def test_the_first_frame_and_the_first_page_are_taken() -> None:
    frames = [Image.fromarray(np.full((5, 5, 3), value, np.uint8)) for value in (40, 200)]
    for format_ in ("gif", "tiff", "png"):
        content = saved(frames[0], format_, save_all=True, append_images=frames[1:])
        assert np.abs(decode_image(content, 25).astype(int) - 40).max() <= 1


@pytest.mark.parametrize("place", [33, -12], ids=["before the pixels", "after them"])
def test_texts_and_profiles_of_any_size_do_not_matter(place: int) -> None:
    """The header of a PNG ends at byte 33, its closing chunk is the last 12 bytes."""
    profile = b"z" * 3_000_000 if place > 0 else None
    content = saved(Image.fromarray(picture()), icc_profile=profile)
    for text in (
        b"zTXta\0\0" + zlib.compress(b"x" * 3_000_000),
        b"iTXta\0\1\0\0\0" + zlib.compress(b"y" * 3_000_000),
    ):
        chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
        content = content[:place] + chunk + content[place:]
    assert np.array_equal(decode_image(content, 10**6), picture())


def test_the_limit_on_pixels_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = encoded(picture(side=40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit, made small

    # An error, were Pillow to warn of a file that our own limit lets pass.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(content, 1600).shape == (40, 40, 3)

    with pytest.raises(UnusableImage, match="too large: 40x40 pixels"):
        decode_image(content, 1599)
    with pytest.raises(UnusableImage, match="too large: 40x40 pixels"):
        decode_image(content, 700)

    assert Image.MAX_IMAGE_PIXELS == 100
    assert capsys.readouterr().err == ""


BROKEN = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\x40\0\0\0\xff\xff\0\0\0\0\0\0"
"""EXIF block whose first value lies behind the block's end, of which Pillow warns."""


def test_warnings_name_the_file_a_few_times_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pillow, "_warned", Counter())
    content = encoded(picture(), "jpeg", exif=BROKEN)
    for number in range(9):
        decode_image(content, 10**6, f"{number}.jpg")
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == [f"'{n}.jpg'" for n in range(5)]
    assert all("Pillow warns: " in line for line in told)
    assert told[-1].endswith("further files are not named")


def test_threads_read_images_at_the_same_time() -> None:
    contents = [encoded(picture(number, 30)) for number in range(8)]
    found: dict[int, np.ndarray] = {}

    def read(number: int) -> None:
        found[number] = decode_image(contents[number], 900)

    # Decoding must not change Pillow's own limit, which all threads share.
    limit = Image.MAX_IMAGE_PIXELS
    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(np.array_equal(found[number], picture(number, 30)) for number in range(8))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_pythons_warnings_are_left_alone_while_a_thread_decodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Filters of other code may begin while an image is decoded and end after it, or the reverse.

    A thread that set filters of its own and put the earlier ones back would undo theirs.
    """
    monkeypatch.setattr(pillow, "_warned", Counter())

    bad = encoded(picture(), "jpeg", exif=BROKEN)
    inside, leave = threading.Event(), threading.Event()
    decoded = images._decoded

    def waits(image: Image.Image, max_pixels: int) -> Image.Image:
        inside.set()
        assert leave.wait(30)
        return decoded(image, max_pixels)

    monkeypatch.setattr(images, "_decoded", waits)
    thread = threading.Thread(target=decode_image, args=(bad, 10**6, "bad.jpg"))

    before = (warnings.filters[:], warnings.showwarning)

    # Filters of this thread begin before the other decodes, and further ones while it does.
    with warnings.catch_warnings(action="ignore"):
        own = warnings.filters[:]
        thread.start()
        assert inside.wait(30)
        assert warnings.filters == own
        with warnings.catch_warnings(action="error"):
            with pytest.raises(UserWarning, match="mine"):
                warnings.warn("mine", stacklevel=1)
            leave.set()
            thread.join()
        assert warnings.filters == own

    assert (warnings.filters, warnings.showwarning) == before
    assert capsys.readouterr().err.startswith("'bad.jpg': Pillow warns: ")


def test_pillow_warns_others_as_ever() -> None:
    # The second is what Pillow 11 and 12 say.
    with pytest.warns(UserWarning, match="Tag data|Truncated File Read") as told:
        Image.open(io.BytesIO(encoded(picture(), "jpeg", exif=BROKEN))).getexif()
    assert told[0].filename == TiffImagePlugin.__file__


def test_a_warning_names_the_file_that_its_thread_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pillow, "_warned", Counter())
    good, bad = encoded(picture(), "jpeg"), encoded(picture(), "jpeg", exif=BROKEN)
    monkeypatch.setattr(ahead, "threads", lambda: 4)

    # Every fiftieth of 200 images warns, while other threads decode good ones.
    def decode(number: int) -> np.ndarray:
        content = good if number % 50 else bad
        return decode_image(content, 10**6, f"{number}.jpg")

    list(ahead.worked_ahead(range(200), decode))

    told = capsys.readouterr().err.splitlines()
    warned = sorted(line.split(":")[0] for line in told)
    assert warned == ["'0.jpg'", "'100.jpg'", "'150.jpg'", "'50.jpg'"]


@pytest.mark.parametrize(
    ("kind", "row", "transparent", "expected"),
    [
        ((16, 0), struct.pack(">2H", 0x1234, 0x1235), struct.pack(">H", 0x1234), [WHITE, 0x12]),
        ((8, 0), bytes([50, 51]), struct.pack(">H", 50), [WHITE, 51]),
        ((4, 0), bytes([0x34]), struct.pack(">H", 3), [WHITE, 68]),
        ((2, 0), bytes([0b01_10_0000]), struct.pack(">H", 1), [WHITE, 170]),
        ((1, 0), bytes([0b01_000000]), struct.pack(">H", 0), [WHITE, 255]),
        (
            (16, 2),
            struct.pack(">6H", *[0x1234] * 3, *[0x5678] * 3),
            struct.pack(">3H", *[0x1234] * 3),
            [WHITE, 0x56],
        ),
        ((8, 2), bytes([9, 9, 9, 8, 8, 8]), struct.pack(">3H", 9, 9, 9), [WHITE, 8]),
    ],
)
def test_one_transparent_colour_lies_on_white(
    kind: tuple[int, int], row: bytes, transparent: bytes, expected: list[int]
) -> None:
    pixels_HWC = decode_image(png(2, 1, kind, b"\0" + row, transparent), 2)
    assert pixels_HWC[0, :, 0].tolist() == expected


def test_pixels_of_an_unknown_range_are_refused() -> None:
    for pixels in (np.full((3, 3), 0.5, np.float32), np.full((3, 3), 70_000, np.int32)):
        with pytest.raises(UnusableImage, match="whose range is not known"):
            decode_image(saved(Image.fromarray(pixels), "tiff"), 9)
