"""Sources of documents, what they skip and why, splits, augmentation, and shuffled streams."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import os
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cm3leon.data.augment import AugmentConfig, varied
from cm3leon.data.corpus import Corpus, split_of_key
from cm3leon.data.digits import TEMPLATES, WORDS
from cm3leon.data.images import UnusableImage, read_image, square
from cm3leon.data.shuffle import RowStream, shuffled
from cm3leon.data.source import Skipped
from cm3leon.experiment import load_experiment
from cm3leon.io import digest_of
from cm3leon.registry import SOURCES, discover
from cm3leon.types import Document, TextSegment, UserError

discover()

# ------------------------------------------------------------------------------------------ folder


def picture(width: int = 12, height: int = 8) -> Image.Image:
    """Four quarters: red and green above, blue and white below."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (250, 10, 10)
    pixels[: height // 2, width // 2 :] = (10, 250, 10)
    pixels[height // 2 :, : width // 2] = (10, 10, 250)
    pixels[height // 2 :, width // 2 :] = (250, 250, 250)
    return Image.fromarray(pixels)


def noise_image(width: int, height: int) -> Image.Image:
    """Random pixels, which hardly compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format_: str, **options: Any) -> bytes:
    """The image as a file of a format."""
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


PNG = encoded(picture(), "PNG")


def read(folder: Path, **fields: Any) -> tuple[dict[str, Document], dict[str, str]]:
    """The documents of a folder by id, and by file the reasons for what was skipped.

    Each reason is one line, and names no folder of this machine.
    """
    items = list(SOURCES.build({"name": "folder", "path": str(folder), **fields}).documents())
    documents = {item.id: item for item in items if isinstance(item, Document)}
    skipped = {item.file: item.reason for item in items if isinstance(item, Skipped)}

    assert len(documents) + len(skipped) == len(items)  # nothing is reported twice
    assert all(
        reason and "\n" not in reason and str(folder) not in reason for reason in skipped.values()
    )

    return documents, skipped


def write(
    folder: Path, name: str, content: bytes, caption: str | bytes | None = "a caption"
) -> Path:
    """Write an image file, and its caption beside it; None writes none."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if isinstance(caption, str):
        caption = caption.encode()
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A folder with one good image, which has to be kept whatever lies beside it."""
    write(tmp_path, "good.png", PNG, "a good one")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "tolerance"),
    [
        ("a.png", encoded(picture(), "PNG"), 0),
        ("a.PNG", encoded(picture(), "PNG"), 0),
        ("a.jpg", encoded(picture(32, 32), "JPEG", quality=95), 30),
        ("a.jpeg", encoded(picture(32, 32), "JPEG", progressive=True, quality=95), 30),
        ("a.webp", encoded(picture(), "WEBP", lossless=True), 0),
        ("deep/er/ünïcode name.png", encoded(picture(), "PNG"), 0),
        ("a png that is a.jpg", encoded(picture(), "PNG"), 0),
    ],
)
def test_images_are_read_with_their_captions(
    tmp_path: Path, name: str, content: bytes, tolerance: int
) -> None:
    write(tmp_path, name, content, "  a caption – with ünïcode\n")
    documents, skipped = read(tmp_path)

    assert not skipped
    assert documents[name].text == "a caption – with ünïcode"
    pixels_HWC = documents[name].image
    assert pixels_HWC.dtype == np.uint8

    expected = np.asarray(picture(pixels_HWC.shape[1], pixels_HWC.shape[0]))
    # JPEG changes pixels a little, at least half of them by a tenth of the tolerance or less.
    assert np.median(np.abs(pixels_HWC.astype(int) - expected)) <= tolerance / 10
    assert np.abs(pixels_HWC[1, 1].astype(int) - expected[1, 1]).max() <= tolerance
    assert documents[name].label is None


def test_captions_from_one_file_go_before_those_beside_the_images(tmp_path: Path) -> None:
    write(tmp_path, "a.png", PNG, "beside a")
    write(tmp_path, "b.png", PNG, "beside b")
    write(tmp_path, "sub/c.png", PNG, None)
    write(tmp_path, "sub/d.png", PNG, None)

    lines = [
        {"file": "a.png", "caption": "from the file"},
        {"file": "./sub/c.png", "caption": "c, ünïcode", "more": 1},
    ]

    # The first line in ASCII, the second in UTF-8, around them what editors leave behind.
    text = "\n".join(json.dumps(line, ensure_ascii=n > 0) for n, line in enumerate(lines))
    (tmp_path / "captions.jsonl").write_text("\n" + text + "\r\n  \n")

    documents, skipped = read(tmp_path)
    assert {name: document.text for name, document in documents.items()} == {
        "a.png": "from the file",
        "b.png": "beside b",
        "sub/c.png": "c, ünïcode",
    }
    assert skipped == {"sub/d.png": "no caption: neither 'd.txt' nor a line of captions.jsonl"}


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises that many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        size, checksum = len(content), zlib.crc32(kind + content)
        return struct.pack(">I", size) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


BAD_IMAGES = {
    "truncated.jpg": (encoded(picture(200, 200), "JPEG")[:-400], "unreadable: "),
    "truncated.png": (encoded(noise_image(90, 90), "PNG")[:-2000], "unreadable: "),
    "truncated.webp": (encoded(noise_image(90, 90), "WEBP")[:-500], "unreadable: "),
    "header only.jpg": (encoded(picture(), "JPEG")[:20], "unreadable: "),
    "text.png": (b"I am not an image\n", "unreadable: UnidentifiedImageError"),
    "nothing.png": (b"", "unreadable: UnidentifiedImageError"),
    "half.gif": (encoded(picture(), "GIF")[:30], "unreadable: "),
    "heic.jpg": (b"\0\0\0\x18ftypheic" + bytes(99), "is HEIC; JPEG, PNG, WebP, GIF, BMP, TIFF"),
    "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG; JPEG, PNG, WebP, "),
    "raw.nef": (encoded(picture(), "TIFF"), "is a raw photograph (.nef); JPEG, PNG, WebP, "),
    "bomb.png": (bomb(60_000, 60_000), "too large: 60000x60000 pixels"),
    "large.png": (bomb(9_000, 8_000), "too large: 9000x8000 pixels"),
    "zero.png": (bomb(0, 5), "unreadable: "),
    "no pixels.png": (bomb(5, 5), "unreadable: "),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_skipped_with_a_reason(good: Path, name: str) -> None:
    content, reason = BAD_IMAGES[name]
    write(good, name, content)
    documents, skipped = read(good)
    assert set(documents) == {"good.png"}
    assert set(skipped) == {name}
    assert skipped[name].startswith(reason)


def test_many_bad_images_leave_all_good_ones(tmp_path: Path) -> None:
    for number, (name, (content, _)) in enumerate(BAD_IMAGES.items()):
        write(tmp_path, f"{number:02d} {name}", content)
        write(tmp_path, f"{number:02d} good.png", PNG)
    documents, skipped = read(tmp_path)
    assert len(documents) == len(skipped) == len(BAD_IMAGES)
    assert all(name.endswith("good.png") for name in documents)


def test_a_large_image_is_not_decoded(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(good, "large.png", encoded(picture(30, 10), "PNG"))
    decoded = []
    load = Image.Image.load

    def noted(image: Image.Image) -> Any:
        decoded.append(image.size)
        return load(image)

    monkeypatch.setattr(Image.Image, "load", noted)

    documents, skipped = read(good, max_pixels=299)
    assert skipped == {"large.png": "too large: 30x10 pixels"}
    assert set(documents) == {"good.png"}
    assert (30, 10) not in decoded
    assert set(read(good, max_pixels=300)[0]) == {"good.png", "large.png"}


def orientations() -> list[tuple[int, Callable[[np.ndarray], np.ndarray]]]:
    """Each EXIF orientation, and how the upright image is made of the stored one.

    EXIF 2.3, tag 0x0112.
    """
    return [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (5, lambda p: p.transpose(1, 0, 2)),
        # The stored image's top is the right-hand side: a clockwise quarter turn.
        (6, lambda p: p.transpose(1, 0, 2)[:, ::-1]),
        (7, lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda p: p.transpose(1, 0, 2)[::-1]),
    ]


@pytest.mark.parametrize(("orientation", "upright"), orientations())
@pytest.mark.parametrize(
    ("format_", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})]
)
def test_exif_orientation_is_applied(
    tmp_path: Path,
    orientation: int,
    upright: Callable[..., np.ndarray],
    format_: str,
    options: dict[str, Any],
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture(48, 32)
    path = tmp_path / "image.png"
    path.write_bytes(encoded(stored, format_, exif=exif, **options))

    pixels_HWC = read_image(path, 10**6)
    expected_HWC = upright(np.asarray(stored))
    assert pixels_HWC.shape == expected_HWC.shape

    for row, column in ((4, 4), (4, -4), (-4, 4), (-4, -4)):
        difference = pixels_HWC[row, column].astype(int) - expected_HWC[row, column]
        assert np.abs(difference).max() < 20


def colour(path: Path, content: bytes) -> list[int]:
    """The upper left pixel of an image."""
    path.write_bytes(content)
    pixels_HWC = read_image(path, 10**6)
    assert pixels_HWC.shape[2] == 3
    assert pixels_HWC.dtype == np.uint8
    return pixels_HWC[0, 0].tolist()


def test_colour_modes_become_rgb(tmp_path: Path) -> None:
    path = tmp_path / "image.png"

    grey16 = Image.fromarray(np.full((4, 4), 0xABCD, np.uint16))
    assert colour(path, encoded(grey16, "PNG")) == [0xAB] * 3
    assert colour(path, encoded(Image.new("L", (4, 4), 77), "PNG")) == [77] * 3
    assert colour(path, encoded(Image.new("1", (4, 4), 1), "PNG")) == [255] * 3

    palette = Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert colour(path, encoded(palette, "PNG")) == [10, 200, 30]
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # full magenta and yellow: red
    red, green, blue = colour(path, encoded(cmyk, "JPEG", quality=95))
    assert red > 200
    assert max(green, blue) < 50

    assert colour(path, encoded(Image.new("L", (16, 16), 77), "JPEG")) == [77] * 3


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    for format_, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        # A fifth of the colour and four fifths of white.
        half = encoded(Image.new("RGBA", (4, 4), (200, 0, 100, 51)), format_, **options)
        assert colour(path, half) == pytest.approx([244, 204, 224], abs=1)
        clear = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), format_, **options)
        assert colour(path, clear) == [255] * 3

    assert colour(path, encoded(Image.new("LA", (4, 4), (0, 0)), "PNG")) == [255] * 3

    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert colour(path, encoded(palette, "PNG", transparency=1)) == [255] * 3
    assert colour(path, encoded(palette, "PNG")) == [9] * 3


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    colours = ((200, 0, 0), (0, 200, 0), (0, 0, 200))
    first, *others = [Image.new("RGB", (8, 8), colour) for colour in colours]
    options: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "PNG": {}}
    for format_, more in options.items():
        content = encoded(first, format_, save_all=True, append_images=others, **more)
        assert Image.open(io.BytesIO(content)).n_frames == 3
        assert colour(tmp_path / "image.png", content) == [200, 0, 0]


@pytest.mark.filterwarnings("ignore")
def test_no_damage_to_an_image_is_fatal(tmp_path: Path) -> None:
    """Bytes of good images are overwritten at random, with a fixed seed.

    The images are small and their EXIF block is large, so that most hits are in a header.
    """
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a description", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01"
    exif.get_ifd(0x8825)[1] = "N"

    images = [encoded(picture().convert(mode), "JPEG", exif=exif) for mode in ("RGB", "CMYK")]
    images += [encoded(picture(), format_, exif=exif) for format_ in ("PNG", "WEBP")]

    rng, path, kept = random.Random(0), tmp_path / "image.png", 0
    for number in range(1200):
        content = bytearray(images[number % len(images)])
        for _ in range(rng.randint(1, 6)):
            position = rng.randrange(min(len(content), 300))
            content[position] = rng.choice([0, 255, rng.randrange(256)])

        path.write_bytes(content)
        try:
            assert read_image(path, 10**6).shape[2] == 3
            kept += 1
        except UnusableImage as error:
            assert str(error)  # noqa: PT017

    assert kept > 50


def test_a_broken_exif_block_does_not_end_a_run(good: Path) -> None:
    blocks = (b"Exif\0\0", b"Exif\0\0MM\0*", b"Exif\0\0nonsense nonsense", b"\xff" * 40)
    for number, block in enumerate(blocks):
        write(good, f"{number}.jpg", encoded(picture(), "JPEG", exif=block))

    documents, skipped = read(good)
    assert "good.png" in documents
    assert len(documents) + len(skipped) == 5


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "no caption: neither 'image.txt' nor a line of captions.jsonl"),
        ("", "unusable caption: the caption is empty"),
        (" \n\t ", "unusable caption: the caption is empty"),
        ("é" * 51, "unusable caption: the caption is longer than 100 bytes"),
        (b"caf\xe9", "unusable caption: 'utf-8' codec can't decode byte"),
        (b"\xff\xfea\x00b\x00", "unusable caption: 'utf-8' codec can't decode byte"),
    ],
)
def test_bad_captions_are_skipped_with_a_reason(
    good: Path, caption: str | bytes | None, reason: str
) -> None:
    write(good, "image.png", PNG, caption)
    documents, skipped = read(good, max_caption_bytes=100)
    assert set(documents) == {"good.png"}
    assert set(skipped) == {"image.png"}
    assert skipped["image.png"].startswith(reason)


def test_a_caption_of_just_the_allowed_length_is_kept(tmp_path: Path) -> None:
    write(tmp_path, "image.png", PNG, "é" * 50)
    assert read(tmp_path, max_caption_bytes=100)[0]["image.png"].text == "é" * 50


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"file": "image.png", "caption": "cut', "unusable line: "),
        (b"not json", "unusable line: "),
        (b'{"file": "image.png"}', "unusable line: no caption under a usual name or data.text_key"),
        (
            b'{"caption": "a caption"}',
            "unusable line: no image under a usual name or data.image_key",
        ),
        (b'["image.png", "a caption"]', "unusable line: "),
        (b"null", "unusable line: "),
        (b"7", "unusable line: "),
        (b'{"file": 7, "caption": "a caption"}', "unusable line: "),
        (b'{"file": "image.png", "caption": 7}', "unusable line: the caption is empty"),
        (b'{"file": "image.png", "caption": null}', "unusable line: no caption under"),
        (b'{"file": "image.png", "caption": " "}', "unusable line: the caption is empty"),
        (
            b'{"file": "image.png", "caption": "' + b"x" * 101 + b'"}',
            "unusable line: the caption is longer than 100 bytes",
        ),
        (
            b'{"file": "image.png", "caption": "\\ud800"}',
            "unusable line: 'utf-8' codec can't encode",
        ),
        (
            b'{"file": "image.png", "caption": "caf\xe9"}',
            "unusable line: it is not usable JSON: 'utf-8' codec can't decode",
        ),
        pytest.param(
            b"[" * 200_000,
            "unusable line: ",
            id="nested",
        ),
    ],
)
def test_broken_lines_of_the_captions_file_are_skipped(
    good: Path, line: bytes, reason: str
) -> None:
    write(good, "image.png", PNG, None)
    first = b'{"file": "good.png", "caption": "from the file"}\n'
    (good / "captions.jsonl").write_bytes(first + line + b"\n")

    documents, skipped = read(good, max_caption_bytes=100)
    assert documents["good.png"].text == "from the file"
    assert set(documents) == {"good.png"}
    assert set(skipped) == {"captions.jsonl:2", "image.png"}
    assert skipped["captions.jsonl:2"].startswith(reason)


@pytest.mark.parametrize(
    "name",
    ["missing.png", "../outside.png", "ABSOLUTE", "sub/../../outside.png", "sub", "", "a\0.png"],
)
def test_names_without_an_image_in_the_folder_are_skipped(good: Path, name: str) -> None:
    """Some of these names lead out of the folder: no file outside of it is read."""
    folder = good / "corpus"
    (folder / "sub").mkdir(parents=True)
    write(folder, "good.png", PNG)
    write(good, "outside.png", PNG, None)
    if name == "ABSOLUTE":
        name = str(good / "outside.png")
    (folder / "captions.jsonl").write_text(json.dumps({"file": name, "caption": "outside"}) + "\n")

    items = list(SOURCES.build({"name": "folder", "path": str(folder)}).documents())
    assert [item.id for item in items if isinstance(item, Document)] == ["good.png"]
    (skipped,) = (item for item in items if isinstance(item, Skipped))
    assert "there is no such image in the folder" in skipped.reason


def test_a_file_name_that_is_no_utf8_does_not_end_a_run(good: Path) -> None:
    name = os.path.join(os.fsencode(good), b"caf\xe9")
    try:
        for suffix, content in ((b".png", PNG), (b".txt", b"a caption")):
            with open(name + suffix, "wb") as file:
                file.write(content)
    except OSError:
        pytest.skip("the file system has no such names")

    source = SOURCES.build({"name": "folder", "path": str(good)})
    assert source.fingerprint()
    documents = [item for item in source.documents() if isinstance(item, Document)]
    assert "good.png" in [document.id for document in documents]

    # Its key decides the split, so it has to be usable as well.
    for document in documents:
        split_of_key(document.split_key, validation=0.1, held_out=0.1)


@pytest.mark.parametrize("what", ["missing", "a file"])
def test_a_folder_that_is_none_is_one_sentence(tmp_path: Path, what: str) -> None:
    path = tmp_path / "here"
    if what == "a file":
        path.write_text("")
    with pytest.raises(UserError) as refusal:
        SOURCES.build({"name": "folder", "path": str(path)})
    sentence = f"data.path: {path} is not a folder; give the folder that holds the images"
    assert str(refusal.value) == sentence


def test_an_empty_folder_and_other_files_give_nothing(tmp_path: Path) -> None:
    assert read(tmp_path) == ({}, {})
    (tmp_path / "notes.md").write_text("")
    (tmp_path / "image.xcf").write_bytes(b"gimp xcf")
    (tmp_path / "folder.png").mkdir()
    assert read(tmp_path) == ({}, {})


def test_order_is_by_path_and_the_fingerprint_tells_changes(tmp_path: Path) -> None:
    source = SOURCES.build({"name": "folder", "path": str(tmp_path)})
    prints = [source.fingerprint()]
    for name in ("b.png", "a/z.png", "c.png"):
        write(tmp_path, name, PNG)
        prints.append(source.fingerprint())

    assert [item.id for item in source.documents()] == ["a/z.png", "b.png", "c.png"]

    (tmp_path / "b.txt").write_text("another caption")
    prints.append(source.fingerprint())
    (tmp_path / "captions.jsonl").write_text("\n")
    prints.append(source.fingerprint())
    (tmp_path / "c.png").unlink()
    prints.append(source.fingerprint())
    assert len(set(prints)) == len(prints)

    # A file that is neither an image nor a caption changes nothing.
    (tmp_path / "notes.md").write_text("")
    assert source.fingerprint() == prints[-1]
    assert source.class_in("a seven") is None


# ------------------------------------------------------------------------------------------ digits


def digits(**fields: Any) -> Any:
    return SOURCES.build({"name": "digits", **fields})


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    documents = list(digits().documents())
    scans = load_digits()

    assert len(documents) == 1797
    assert [document.label for document in documents] == scans.target.tolist()

    for row in (0, 1000, 1796):
        pixels_HWC = documents[row].image
        assert pixels_HWC.dtype == np.uint8
        assert np.array_equal(pixels_HWC[..., 0], pixels_HWC[..., 2])
        np.testing.assert_allclose(pixels_HWC[..., 0] / 255, scans.images[row] / 16, atol=0.5 / 255)
    assert len({document.id for document in documents}) == 1797


def test_every_caption_names_its_digit() -> None:
    source = digits()
    documents = list(source.documents())
    assert all(source.class_in(document.text) == document.label for document in documents)

    # Which template each caption was made by.
    drawn: collections.Counter[str] = collections.Counter()
    for document in documents:
        digit = {"word": WORDS[document.label], "number": document.label}
        templates = {template.format(**digit): template for template in TEMPLATES}
        drawn[templates[document.text]] += 1

    assert set(drawn) == set(TEMPLATES)
    assert min(drawn.values()) > 1797 / len(TEMPLATES) * 0.8  # drawn evenly
    assert source.class_names == WORDS


def test_captions_are_fixed_by_their_seed() -> None:
    def texts(**fields: Any) -> list[str]:
        return [document.text for document in digits(**fields).documents()]

    assert texts(caption_seed=0) == texts(caption_seed=0) != texts(caption_seed=1)
    assert digits().fingerprint() == digits().fingerprint()
    only = texts(templates=["number {number}!"])
    assert only[:3] == ["number 0!", "number 1!", "number 2!"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a handwritten seven 7", 7),
        ("seven seven seven", 7),
        ("SEVEN", 7),
        ("seven or eight", None),
        ("7 or eight", None),
        ("sevenths", None),
        ("seventy", None),
        ("someone wrote", None),
        ("77", None),
        ("7th", None),
        ("the 7.", 7),
        ("(nine)", 9),
        ("zero", 0),
        ("0", 0),
        ("", None),
        ("٣", None),
        ("seven\neight", None),
        ("often two", 2),
    ],
)
def test_class_in(text: str, expected: int | None) -> None:
    assert digits().class_in(text) == expected


@pytest.mark.parametrize(
    "template", ["a digit", "{word} {number}", "{word} {other}", "{", "{word}{", "{0}", "{word!r}"]
)
def test_templates_without_one_place_for_the_digit_are_refused(template: str) -> None:
    with pytest.raises(UserError, match=re.escape("each must have one {word} or one {number}")):
        digits(templates=[template])


def test_no_templates_are_refused() -> None:
    with pytest.raises(UserError, match="templates is empty"):
        digits(templates=[])


# ---------------------------------------------------------------------------------- corpus, splits


def splits_of(keys: list[str], *, validation: float, held_out: float) -> list[str]:
    return [split_of_key(key, validation=validation, held_out=held_out) for key in keys]


def test_copies_of_an_image_fall_together_whatever_their_names(tmp_path: Path) -> None:
    for number in range(4):
        for copy in ("a", "b"):
            content = encoded(picture(number + 8, 8), "png")
            (tmp_path / f"{copy}{number}.png").write_bytes(content)
            (tmp_path / f"{copy}{number}.txt").write_text(f"{copy} {number}")

    source = SOURCES.build({"name": "folder", "path": str(tmp_path)})
    found = [document for document in source.documents() if isinstance(document, Document)]
    keys = {document.id: document.split_key for document in found}

    # Two files of each image: eight documents, four keys.
    assert len(keys) == 8
    assert len(set(keys.values())) == 4
    by_number: dict[str, set[str]] = {}
    for id_, key in keys.items():
        by_number.setdefault(id_[1], set()).add(key)
    assert all(len(same) == 1 for same in by_number.values())


def test_texts_of_the_same_words_fall_together() -> None:
    one, same, other = (
        Document(id_, (TextSegment(text),))
        for id_, text in (("1", "x y"), ("2", "x y"), ("3", "z"))
    )
    assert one.split_key == same.split_key != other.split_key


def test_splits_are_the_same_on_every_machine() -> None:
    ids = [f"scan-{n:04d}" for n in range(20)]
    splits = splits_of(ids, validation=0.1, held_out=0.2)
    held_out = [n for n, split in enumerate(splits) if split == "held_out"]
    validation = [n for n, split in enumerate(splits) if split == "validation"]
    # The numbers follow from the SHA-256 of each id.
    assert (held_out, validation) == ([2, 6, 7, 8, 12, 17], [10, 14, 18])


def test_the_digits_are_divided_by_number_as_ever() -> None:
    """The project's figures on digits have always been measured on the same images.

    In the order of their hashes, the first fifth is held out and the next tenth validates.
    """
    ids = [f"scan-{n:04d}" for n in range(1797)]
    shares = load_experiment("digits").split
    splits = splits_of(ids, validation=shares.validation, held_out=shares.held_out)

    order = sorted(ids, key=digest_of)
    expected = dict.fromkeys(order, "train") | dict.fromkeys(order[:539], "validation")
    expected |= dict.fromkeys(order[:359], "held_out")
    assert splits == [expected[id_] for id_ in ids]


def test_corpus_is_saved_and_read_back(tmp_path: Path) -> None:
    texts = ["a", "line\u2028separator \x85 \x1c", "ünïcode \U0001f98e\nsecond line"]
    corpus = Corpus(
        ids=["x/ü.png", "y", "z"],
        captions=texts,
        images_BHWC=np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8),
        labels=[None, 3, 0],
        splits=["train", "validation", "held_out"],
    )

    # Line separators within a caption must not become the ends of lines.
    corpus.save(tmp_path)
    loaded = Corpus.load(tmp_path)
    assert (loaded.ids, loaded.captions, loaded.labels, loaded.splits) == (
        corpus.ids,
        texts,
        corpus.labels,
        corpus.splits,
    )

    assert np.array_equal(loaded.images_BHWC, corpus.images_BHWC)
    assert len(loaded) == 3
    rows = [loaded.rows(split).tolist() for split in ("train", "validation", "held_out")]
    assert rows == [[0], [1], [2]]

    document = loaded.document(1)
    assert (document.id, document.text, document.label) == ("y", texts[1], 3)
    assert np.array_equal(document.image, corpus.images_BHWC[1])


# ---------------------------------------------------------------------------------------- geometry


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24))
def test_square_has_the_asked_size(width: int, height: int, size: int) -> None:
    pixels_HWC = square(np.full((height, width, 3), (10, 200, 90), np.uint8), size)
    assert pixels_HWC.shape == (size, size, 3)
    assert pixels_HWC.dtype == np.uint8
    assert (pixels_HWC == (10, 200, 90)).all()


@pytest.mark.parametrize(("width", "height"), [(60, 20), (20, 60), (20, 20)])
def test_square_is_the_middle_of_the_image(width: int, height: int) -> None:
    pixels_HWC = np.zeros((height, width, 3), np.uint8)
    middle = (
        slice((height - 20) // 2, (height + 20) // 2),
        slice((width - 20) // 2, (width + 20) // 2),
    )
    pixels_HWC[middle] = np.random.default_rng(0).integers(0, 256, (20, 20, 3))
    assert np.array_equal(square(pixels_HWC, 20), pixels_HWC[middle])

    # Halved by bicubic resampling, near the mean of four pixels.
    small = square(pixels_HWC, 10).astype(float)
    averaged = pixels_HWC[middle].reshape(10, 2, 10, 2, 3).mean((1, 3))
    assert np.abs(small - averaged).mean() < 25
    assert np.corrcoef(small.ravel(), averaged.ravel())[0, 1] > 0.9


def test_square_is_smooth_when_it_shrinks() -> None:
    """Without antialiasing a fine checkerboard would leave stripes."""
    board_HW = np.indices((64, 64)).sum(0) % 2 * 255
    pixels_HWC = square(np.repeat(board_HW[..., None], 3, 2).astype(np.uint8), 8)
    assert pixels_HWC.std() < 3
    assert pixels_HWC.mean() == pytest.approx(127.5, abs=3)


def test_square_agrees_with_a_crop_done_by_hand() -> None:
    noise = noise_image(90, 50)
    expected = noise.crop((20, 0, 70, 50)).resize((25, 25), Image.Resampling.BICUBIC)
    got = square(np.asarray(noise), 25)
    inner = np.s_[2:-2, 2:-2]  # at the edges the crop lacks what lies beside it
    assert np.abs(got.astype(int) - np.asarray(expected))[inner].max() <= 1
    assert np.array_equal(got, np.asarray(ImageOps.fit(noise, (25, 25), Image.Resampling.BICUBIC)))


# ------------------------------------------------------------------------------------ augmentation


def test_varied_images_are_fixed_by_seed_and_key_and_still_look_alike() -> None:
    documents = itertools.islice(digits().documents(), 40)
    images_BHWC = np.stack([document.image for document in documents])
    keys = [f"scan-{number}" for number in range(40)]
    config = AugmentConfig(versions=2)
    first, again, other = (
        np.stack(list(varied(images_BHWC, keys, config, seed))) for seed in (0, 0, 1)
    )

    # The same seed gives the same images, another one others, and so do the two versions.
    assert first.shape == (2, *images_BHWC.shape)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert (first != other).mean() > 0.2
    assert (first[0] != first[1]).mean() > 0.2

    # Each varied image is like its own, and less like one of another digit.
    alike = mean_correlation(images_BHWC, first[0])
    assert alike > 0.8
    assert mean_correlation(images_BHWC, first[0][::-1]) < alike - 0.2


def mean_correlation(first_BHWC: np.ndarray, second_BHWC: np.ndarray) -> float:
    """Mean over pairs of images of the correlation of their pixels."""
    correlations = []
    for first, second in zip(first_BHWC, second_BHWC, strict=True):
        correlations.append(np.corrcoef(first.ravel(), second.ravel())[0, 1])
    return float(np.mean(correlations))


def test_an_image_is_varied_alike_whatever_is_beside_it() -> None:
    images_BHWC = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    config = AugmentConfig(versions=2)
    together, _ = varied(images_BHWC, "abc", config, 5)
    alone, _ = varied(images_BHWC[[1]], "b", config, 5)
    assert np.array_equal(together[1], alone[0])
    assert list(varied(images_BHWC[:0], "", config, 5)) == []


def test_without_any_movement_images_stay_as_they_are() -> None:
    still = AugmentConfig(versions=1, degrees=0, scale=0, shear=0, shift=0, elastic=0)
    images_BHWC = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    assert np.array_equal(next(varied(images_BHWC, "abc", still, 0)), images_BHWC)


STILL = {"degrees": 0, "scale": 0, "shear": 0, "elastic": 0}


def test_shared_versions_move_all_images_by_the_same_whole_codes_and_show_white_behind_them() -> (
    None
):
    rng = np.random.default_rng(0)
    images_BHWC = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    config = AugmentConfig(
        versions=12, shared=True, shift=0.3, shift_step=0.25, outside="white", **STILL
    )

    moves = set()
    # The image in the middle of a white frame, of which each move cuts a window.
    framed_BHWC = np.pad(images_BHWC, ((0, 0), (4, 4), (4, 4), (0, 0)), constant_values=255)
    for version_BHWC in varied(images_BHWC, "abc", config, 0):
        found = []
        for down, right in itertools.product((-4, 0, 4), repeat=2):
            window = framed_BHWC[:, 4 - down : 20 - down, 4 - right : 20 - right]
            if np.array_equal(version_BHWC, window):
                found.append((down, right))
        assert len(found) == 1
        moves.add(found[0])
    assert len(moves) > 4

    # Not shared, two copies of an image move by their keys.
    own = dataclasses.replace(config, shared=False)
    by_key = np.stack(list(varied(images_BHWC[[0, 0]], "ab", own, 0)))
    assert not np.array_equal(by_key[:, 0], by_key[:, 1])


def test_varying_does_not_touch_the_global_generator() -> None:
    import torch

    state = torch.get_rng_state()
    list(varied(np.zeros((2, 8, 8, 3), np.uint8), "ab", AugmentConfig(versions=1), 0))
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------- order


@given(st.integers(0, 2**32), st.integers(1, 50), st.integers(0, 5))
def test_every_epoch_is_a_permutation(seed: int, count: int, epoch: int) -> None:
    def order() -> list[int]:
        return [shuffled(seed, epoch * count + position, count) for position in range(count)]

    items = order()
    assert sorted(items) == list(range(count))
    assert items == order()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = set()
    for seed in range(5):
        for epoch in range(5):
            orders.add(tuple(shuffled(seed, epoch * 30 + position, 30) for position in range(30)))
    assert len(orders) == 25


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 12), st.integers(0, 100))
def test_row_stream_resumes_anywhere(count: int, batch_size: int, step: int, seed: int) -> None:
    def stream() -> RowStream:
        return RowStream(count, lambda items: items.copy(), batch_size=batch_size, seed=seed)

    whole, resumed = stream(), stream()
    batches = [whole.next() for _ in range(step + 4)]
    assert all(batch.shape == (batch_size,) for batch in batches)

    order = np.concatenate(batches).tolist()
    assert order == [shuffled(seed, position, count) for position in range(len(order))]

    # A stream that is resumed after some steps gives what the whole one gave from there on.
    for _ in range(step):
        resumed.next()
    fresh = stream()
    fresh.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
    for batch in batches[step:]:
        assert np.array_equal(fresh.next(), batch)
    assert fresh.state_dict() == whole.state_dict()
