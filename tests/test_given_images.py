"""One function reads images of every form, and finds the pixels that a source would read."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cm3leon.data.images import MAX_PIXELS, UnusableImage, read_given_image, read_image
from cm3leon.registry import SOURCES, discover
from cm3leon.types import Document, UserError

discover()

H, W = 16, 24


def pixels() -> np.ndarray:
    """A picture that is neither symmetric nor square."""
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def rotated(format_: str) -> tuple[Image.Image, dict[str, Any]]:
    """A picture whose EXIF block says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return Image.fromarray(pixels()), {"exif": exif, "format": format_}


def transparent() -> Image.Image:
    alpha = np.random.default_rng(1).integers(0, 256, (H, W, 1), dtype=np.uint8)
    return Image.fromarray(np.concatenate([pixels(), alpha], 2))


def sixteen_bits() -> Image.Image:
    return Image.fromarray(pixels()[..., 0].astype(np.uint16) * 256 + 77)


FORMS: dict[str, Callable[[], tuple[Image.Image, dict[str, Any]]]] = {
    "RGB": lambda: (Image.fromarray(pixels()), {"format": "PNG"}),
    "16 bits": lambda: (sixteen_bits(), {"format": "PNG"}),
    "transparent": lambda: (transparent(), {"format": "PNG"}),
    "transparent grey": lambda: (transparent().convert("LA"), {"format": "PNG"}),
    "transparent palette": lambda: (
        Image.fromarray(pixels()).quantize(8),
        {"format": "PNG", "transparency": 3},
    ),
    "rotated JPEG": lambda: rotated("JPEG"),
    "rotated PNG": lambda: rotated("PNG"),
    "grey": lambda: (Image.fromarray(pixels()).convert("L"), {"format": "PNG"}),
    "palette": lambda: (Image.fromarray(pixels()).quantize(8), {"format": "PNG"}),
    "black and white": lambda: (Image.fromarray(pixels()).convert("1"), {"format": "PNG"}),
    "CMYK": lambda: (Image.fromarray(pixels()).convert("CMYK"), {"format": "JPEG"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_is_read_as_a_source_reads_its_file(form: str, tmp_path: Path) -> None:
    image, options = FORMS[form]()
    file = tmp_path / "picture.png"
    image.save(file, **options)
    (tmp_path / "picture.txt").write_text("a picture")
    (document,) = SOURCES.build({"name": "folder", "path": str(tmp_path)}).documents()
    assert isinstance(document, Document)
    expected_HWC = document.image
    assert expected_HWC is not None

    # As a path, a text, bytes, and an image that Pillow has opened.
    with Image.open(file) as opened:
        mode = opened.mode
        given = [file, str(file), file.read_bytes(), opened]
        found = [read_image(each) for each in given]
        assert opened.mode == mode  # the caller's own object stays as it was

    for pixels_HWC in found:
        assert pixels_HWC.dtype == np.uint8
        assert np.array_equal(pixels_HWC, expected_HWC)


@pytest.mark.parametrize(
    ("array", "expected_HWC"),
    [
        (pixels(), pixels()),
        (pixels()[:, ::-1], pixels()[:, ::-1]),  # in another order of memory
        (pixels()[..., 0], pixels()[..., [0, 0, 0]]),
        (pixels()[..., :1], pixels()[..., [0, 0, 0]]),
        (pixels()[..., 0] > 99, np.repeat((pixels()[..., :1] > 99).astype(np.uint8) * 255, 3, 2)),
        (pixels().astype(np.uint16) * 256 + 9, pixels()),
        (np.dstack([pixels(), np.full((H, W), 255, np.uint8)]), pixels()),
        (np.dstack([pixels(), np.zeros((H, W), np.uint8)]), np.full((H, W, 3), 255, np.uint8)),
    ],
)
def test_arrays_are_read_by_their_shape_and_type(
    array: np.ndarray, expected_HWC: np.ndarray
) -> None:
    assert np.array_equal(read_image(array), expected_HWC)


def test_an_array_and_a_file_of_the_same_pixels_are_one_picture(tmp_path: Path) -> None:
    for name, image in (("alpha", transparent()), ("bits", sixteen_bits())):
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_image(np.asarray(image)), read_image(tmp_path / f"{name}.png"))


def float_image() -> Image.Image:
    return Image.fromarray(np.zeros((4, 4), np.float32))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (
            pixels().astype(np.float32) / 255,
            "an array of float32; it must be uint8, uint16 or bool",
        ),
        (pixels().astype(np.int64), "an array of int64; it must be"),
        (pixels()[None], r"an array of shape \(1, 16, 24, 3\); it must be \(H, W\)"),
        (pixels()[..., :2], r"an array of shape \(16, 24, 2\)"),
        (pixels().transpose(2, 0, 1), r"an array of shape \(3, 16, 24\)"),
        (pixels()[0, 0], r"an array of shape \(3,\)"),
        (np.zeros((0, 4), np.uint8), r"an array of shape \(0, 4\)"),
        (np.zeros((8001, 8000), np.uint8), "too large: 8000x8001 pixels"),
        (np.array(["a"]), "an array of shape"),
        (float_image(), "floating point"),
        (Image.new("RGB", (0, 4)), "it has no pixels"),
        (Image.new("1", (8000, 8001)), "too large"),
        (b"", "unreadable"),
        (b"GIF89a", "unreadable"),
        (torch.zeros(3, 4, 4), "it is of type Tensor; it must be a path, bytes, a Pillow image"),
        (None, "it is of type NoneType"),
        (7, "it is of type int"),
        ("no such file.png", "'no such file.png' cannot be used: unreadable: No such file"),
        ("a\0b", r"cannot be used: unreadable"),
        ("~nobody-of-that-name/a.png", "cannot be used: unreadable"),
        (os.devnull, "it is not a file"),
        (Path("/"), "it is not a file"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(image: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        read_given_image(image, "image")
    assert str(caught.value).startswith("image: ")
    assert "\n" not in str(caught.value)


def test_a_cut_file_is_refused_though_it_was_opened(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels()).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:-200])

    # Pillow reads a file's pixels when they are first asked for, so opening it succeeds.
    with Image.open(tmp_path / "cut.png") as opened, pytest.raises(UnusableImage, match="trunc"):
        read_image(opened)

    closed = Image.open(tmp_path / "cut.png")
    closed.close()
    with pytest.raises(UnusableImage, match="unreadable"):
        read_image(closed)


def test_the_limit_of_pixels_is_that_of_the_sources() -> None:
    assert SOURCES.check({"name": "folder", "path": "."}).config.max_pixels == MAX_PIXELS
