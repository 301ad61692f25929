"""Sources of documents: what each format gives, and what is left out and why.

A source can be resumed at any item, its parts can be shared among workers, and its files may be
remote ones.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import io
import json
import os
import random
import shutil
import struct
import tarfile
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import CORPORA, encoded, picture, write_lines, write_tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cm3leon.data import parquet, webdataset
from cm3leon.data.fields import IMAGE_KEYS, TEXT_KEYS
from cm3leon.data.files import Files
from cm3leon.data.source import Skipped, Source
from cm3leon.registry import SOURCES, discover
from cm3leon.types import Document, ImageSegment, TextSegment, UserError

discover()

WITHOUT_FILES = ("digits", "scenes", "scene_entities", "emoji", "emoji_edits")
FILE_SOURCES = [name for name in CORPORA if name not in WITHOUT_FILES]

IMAGE, OTHER = encoded(picture(1)), encoded(picture(2))


def build(name: str, **fields: Any) -> Source:
    return SOURCES.build({"name": name, **fields})


def documents_of(source: Source) -> list[Document]:
    """The documents of a source, without the items that were left out."""
    return [item for item in source.documents() if isinstance(item, Document)]


def good(source: Source) -> dict[str, str]:
    """The text of every document by its id."""
    return {document.id: document.text for document in documents_of(source)}


def bad(source: Source) -> list[tuple[str, str]]:
    """File and reason of every item that was left out."""
    return [(item.file, item.reason) for item in source.documents() if isinstance(item, Skipped)]


def the_bad(source: Source) -> tuple[str, str]:
    """File and reason of the only item that was left out."""
    (only,) = bad(source)
    return only


def names_of(items: Iterable[Document | Skipped]) -> list[str]:
    """The id of every document and the file of every item that was left out, in order."""
    return [item.id if isinstance(item, Document) else item.file for item in items]


def told_of(items: Iterable[Document | Skipped]) -> list[str | Skipped]:
    """The id of every document, and all that is known of an item that was left out, in order."""
    return [item.id if isinstance(item, Document) else item for item in items]


def moved(settings: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    """The settings of a corpus that lies elsewhere: `before` in its paths becomes `after`."""
    there = dict(settings)
    for key, value in settings.items():
        if isinstance(value, str):
            there[key] = value.replace(before, after)
    return there


# ------------------------------------------------------------------------------------- every source


@pytest.mark.parametrize("name", FILE_SOURCES)
def test_a_part_is_read_on_from_every_item(name: str, tmp_path: Path) -> None:
    settings = CORPORA[name](tmp_path)
    source, again = build(name, **settings), build(name, **settings)
    parts = [names_of(source.read(part, 0)) for part in source.parts()]
    assert [each for part in parts for each in part] == names_of(source.documents())

    for part, ids in zip(again.parts(), parts, strict=True):
        for start in range(len(ids) + 1):
            assert names_of(again.read(part, start)) == ids[start:]


@pytest.mark.parametrize("name", FILE_SOURCES)
def test_the_fingerprint_tells_what_the_files_hold_and_not_where_they_lie(
    name: str, tmp_path: Path
) -> None:
    """A corpus that is moved, or copied with other times, is the same; one changed byte shows."""
    first, second = tmp_path / "first", tmp_path / "elsewhere" / "second"

    def fingerprint(place: Path) -> str:
        return build(name, **moved(written, str(first), str(place))).fingerprint()

    first.mkdir()
    written = CORPORA[name](first)
    before = fingerprint(first)

    shutil.copytree(first, second, copy_function=shutil.copyfile)
    for file in second.rglob("*"):
        os.utime(file, ns=(1, 10**9))
    assert fingerprint(second) == before

    for file in sorted(second.rglob("*")):
        if not file.is_file():
            continue
        # Not within a word of JSON or a header, which would leave nothing to read.
        content = file.read_bytes()
        place = len(content) // 2
        if file.suffix in (".tar", ".parquet"):
            place = len(content) - 3
        flipped = bytes([content[place] ^ 1])
        file.write_bytes(content[:place] + flipped + content[place + 1 :])
        os.utime(file, ns=(1, 10**9))
        if file.suffix not in (".json", ".jsonl"):
            assert fingerprint(second) != before, file
        file.write_bytes(content)
    assert fingerprint(second) == before

    with (first / "another.txt").open("w") as other:
        other.write("not of the corpus, unless it is a folder of images")
    assert (fingerprint(first) == before) == (name != "folder")


@pytest.mark.parametrize("name", FILE_SOURCES)
def test_an_empty_folder_and_a_missing_path_are_sentences(name: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    more = {"images": str(empty)} if name == "coco" else {}

    with pytest.raises(UserError, match=r"^data\.path: .*/none "):
        build(name, path=str(tmp_path / "none"), **more)

    if name == "folder":
        assert list(build(name, path=str(empty)).documents()) == []
        return

    with pytest.raises(UserError, match=r"^data\.path: "):
        list(build(name, path=str(empty), **more).documents())


@pytest.mark.parametrize("name", ["text_jsonl", "webdataset", "parquet"])
def test_globs_and_subfolders(name: str, tmp_path: Path) -> None:
    for sub in ("", "one", "one/two"):
        (tmp_path / sub).mkdir(exist_ok=True)
        CORPORA[name](tmp_path / sub)
    ending = {"text_jsonl": "jsonl", "webdataset": "tar", "parquet": "parquet"}[name]

    # Each of the three folders has two files.
    whole = build(name, path=str(tmp_path))
    assert len(whole.parts()) == 6
    assert build(name, path=f"{tmp_path}/**/*.{ending}").parts() == whole.parts()
    assert len(build(name, path=f"{tmp_path}/*.{ending}").parts()) == 2
    assert len(build(name, path=f"{tmp_path}/one/*/*.{ending}").parts()) == 2
    assert build(name, path=str(tmp_path / whole.parts()[0])).parts() == [whole.parts()[0]]


@pytest.mark.parametrize("name", FILE_SOURCES)
def test_remote_files_are_read_as_local_ones(name: str, tmp_path: Path) -> None:
    settings = CORPORA[name](tmp_path)
    memory = fsspec.filesystem("memory")
    root = f"/corpus-{name}"
    try:
        for file in tmp_path.rglob("*"):
            if file.is_file():
                memory.pipe(f"{root}/{file.relative_to(tmp_path)}", file.read_bytes())
        remote = moved(settings, str(tmp_path), f"memory:/{root}")
        assert good(build(name, **remote)) == good(build(name, **settings))
        assert bad(build(name, **remote)) == bad(build(name, **settings)) == []
    finally:
        memory.rm(root, recursive=True)


def test_files_behind_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "corpus").mkdir()
    CORPORA["webdataset"](tmp_path / "store")
    (tmp_path / "corpus" / "a.tar").symlink_to(tmp_path / "store" / "00000.tar")
    (tmp_path / "corpus" / "gone.tar").symlink_to(tmp_path / "store" / "none.tar")

    for path in (tmp_path / "corpus", tmp_path / "corpus" / "*.tar", tmp_path / "corpus" / "a.tar"):
        source = build("webdataset", path=str(path))
        assert source.parts()[0] == "a.tar"
        assert len(good(source)) == 4
        if path.name != "a.tar":
            assert the_bad(source) == ("gone.tar", "a link to what is not there")
        whole = build("webdataset", path=str(tmp_path / "corpus"))
        assert source.fingerprint() == whole.fingerprint()


def test_an_unknown_file_system_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^data\.path: nowhere://bucket/tars cannot be opened: "):
        build("webdataset", path="nowhere://bucket/tars")


@pytest.mark.parametrize("name", [*FILE_SOURCES, "packed"])
def test_every_file_is_closed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CORPORA[name.replace("packed", "text_jsonl")](tmp_path)
    if name == "packed":
        for file in tmp_path.glob("*.jsonl"):
            file.write_bytes(gzip.compress(file.read_bytes()))

    opened: list[Any] = []
    open_ = Files._open

    def open_and_keep(files: Files, *given: Any) -> Any:
        opened.append(open_(files, *given))
        return opened[-1]

    monkeypatch.setattr(Files, "_open", open_and_keep)
    source = build(name.replace("packed", "text_jsonl"), **settings)
    assert len(good(source)) >= 4

    # Also where a reader stops after its first item.
    for part in source.parts():
        reading = source.read(part)
        next(reading, None)
        reading.close()  # type: ignore[attr-defined]

    assert opened
    assert all(file.closed for file in opened)


@pytest.mark.parametrize("name", FILE_SOURCES)
def test_no_damage_is_fatal(name: str, tmp_path: Path) -> None:
    """A corpus with one damaged file is read, left out in part, or refused in a sentence.

    From its middle on, it is read as it is from the start. The damage is random, with a fixed seed.
    """
    rng = random.Random(0)
    settings = CORPORA[name](tmp_path)
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    for _ in range(60):
        # Up to six bytes of a file are changed, and half of the time it is cut as well.
        file = rng.choice(files)
        content = file.read_bytes()
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.choice([0, 255, rng.randrange(256)])
        file.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])

        try:
            source = build(name, **settings)
            for part in source.parts():
                whole = told_of(source.read(part))
                half = len(whole) // 2
                assert told_of(source.read(part, half)) == whole[half:]
        except UserError as error:
            assert str(error).startswith("data")  # noqa: PT017

        file.write_bytes(content)


# ------------------------------------------------------------------------------ images and captions


def bomb() -> bytes:
    """A PNG whose header promises 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def animated() -> bytes:
    """A WebP file of three frames."""
    frames = [Image.fromarray(picture(number)) for number in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "webp", save_all=True, append_images=frames[1:], lossless=True)
    return file.getvalue()


def converted(mode: str, format_: str) -> bytes:
    """The usual picture in another mode of colours."""
    file = io.BytesIO()
    Image.fromarray(picture()).convert(mode).save(file, format_)
    return file.getvalue()


def sixteen_bits() -> bytes:
    """A grey PNG of 16 bits, whose upper 8 are those of the usual picture."""
    file = io.BytesIO()
    Image.fromarray((picture()[..., 0].astype(np.uint16) << 8) + 7).save(file, "png")
    return file.getvalue()


USABLE = {
    "cmyk": lambda: converted("CMYK", "jpeg"),
    "grey": lambda: converted("L", "png"),
    "palette": lambda: converted("P", "png"),
    "sixteen_bits": sixteen_bits,
    "animated": animated,
    "gif": lambda: encoded(picture(), "gif"),
    "bmp": lambda: encoded(picture(), "bmp"),
    "tiff": lambda: encoded(picture(), "tiff"),
}
# How each file is made, and how the reason for leaving it out may begin.
UNUSABLE = {
    "truncated": (
        lambda: encoded(picture(side=80), "jpeg")[:2500],
        "unreadable: OSError: image file is truncated",
    ),
    "cut header": (lambda: encoded(picture())[:20], "unreadable: "),
    "no image": (lambda: b"<html>not found</html>", "unreadable: UnidentifiedImageError"),
    "empty": (lambda: b"", "no image: the row has neither bytes|unreadable: "),
    "heic": (lambda: b"\0\0\0\x18ftypheic" + bytes(99), "is HEIC; JPEG, PNG, WebP, GIF, BMP"),
    "bomb": (bomb, "too large: "),
}


def one_image(
    source: str, place: Path, content: bytes, caption: str | bytes = "a caption"
) -> Source:
    """A corpus of three documents: a good one, one with this image and caption, a good one."""
    contents = [encoded(picture(1)), content, encoded(picture(2))]
    captions = []
    for text in ("first", caption, "last"):
        captions.append(text.encode() if isinstance(text, str) else text)

    if source == "webdataset":
        members = []
        for n in range(3):
            members += [(f"{n}.jpg", contents[n]), (f"{n}.txt", captions[n])]
        return build(source, path=str(write_tar(place / "a.tar", members)))

    if source == "parquet":
        text = pa.array(captions, pa.binary()).view(pa.string())
        pq.write_table(pa.table({"jpg": contents, "caption": text}), place / "a.parquet")
        return build(source, path=str(place))

    for n, (image, text) in enumerate(zip(contents, captions, strict=True)):
        (place / f"{n}.jpg").write_bytes(image)
        (place / f"{n}.txt").write_bytes(text)
    if source == "jsonl":
        lines = []
        for n, text in enumerate(captions):
            lines.append(b'{"image": "%d.jpg", "text": "%b"}' % (n, text))
        (place / "a.jsonl").write_bytes(b"\n".join(lines))
    return build(source, path=str(place))


IMAGE_SOURCES = ["folder", "jsonl", "webdataset", "parquet"]


@pytest.mark.parametrize("source", IMAGE_SOURCES)
@pytest.mark.parametrize("kind", USABLE)
def test_images_of_every_mode_are_used(source: str, kind: str, tmp_path: Path) -> None:
    documents = list(one_image(source, tmp_path, USABLE[kind]()).documents())
    texts = [item.text for item in documents if isinstance(item, Document)]
    assert texts == ["first", "a caption", "last"]

    image = documents[1].image  # type: ignore[union-attr]
    assert image is not None
    assert (image.shape, image.dtype) == ((12, 12, 3), np.uint8)
    if kind == "animated":
        assert np.array_equal(image, picture(0))  # the first frame
    if kind == "sixteen_bits":
        assert np.array_equal(image, np.repeat(picture()[..., :1], 3, axis=2))


@pytest.mark.parametrize("source", IMAGE_SOURCES)
@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_images_are_left_out_and_nothing_else(
    source: str, kind: str, tmp_path: Path
) -> None:
    content, reason = UNUSABLE[kind]
    corpus = one_image(source, tmp_path, content())

    assert list(good(corpus).values()) == ["first", "last"]
    _, told = the_bad(corpus)
    assert any(told.startswith(start) for start in reason.split("|")), told
    assert "\n" not in told
    assert str(tmp_path) not in told


@pytest.mark.parametrize("source", IMAGE_SOURCES)
@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("x" * 100_000, "longer than 10000 bytes"),
        (b"caf\xe9", "UTF-8|utf-8"),
    ],
    ids=["empty", "blank", "100,000 characters", "latin-1"],
)
def test_captions_of_no_use_are_left_out_with_their_images(
    source: str, caption: str | bytes, reason: str, tmp_path: Path
) -> None:
    corpus = one_image(source, tmp_path, encoded(picture()), caption)

    assert list(good(corpus).values()) == ["first", "last"]
    _, told = the_bad(corpus)
    assert any(part in told for part in reason.split("|")), told


# -------------------------------------------------------------------------------------------- jsonl


def test_lines_become_documents_of_their_segments(tmp_path: Path) -> None:
    source = build("jsonl", **CORPORA["jsonl"](tmp_path))
    documents = {document.id: document for document in documents_of(source)}
    assert [type(s) for s in documents["a.jsonl/0"].segments] == [TextSegment, ImageSegment]
    assert [type(s) for s in documents["b.jsonl/1"].segments] == [TextSegment]
    assert [type(s) for s in documents["b.jsonl/2"].segments] == [ImageSegment]

    page = documents["b.jsonl/3"].segments
    texts = [s.text if isinstance(s, TextSegment) else "image" for s in page]
    assert texts == ["before", "image", "between", "image"]
    for index, number in ((1, 4), (3, 5)):
        assert np.array_equal(page[index].pixels_HWC, picture(number))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "the line is not usable JSON: "),
        ("[1]", "the line is not a JSON object"),
        ("[" * 100_000, "the line is not usable JSON: nested too deep"),
        ('{"a": ' * 50_000, "the line is not usable JSON: nested too deep"),
        ("{}", "the line has none of text, image and segments"),
        ('{"text": 7}', "the text of segment 0 is int, not a string"),
        ('{"image": 7}', "image is int, not a path"),
        ('{"text": "a", "image": "../x.png"}', "the image '../x.png' lies outside the folder"),
        ('{"image": "/etc/passwd"}', "the image '/etc/passwd' lies outside the folder"),
        (
            '{"image": "http://host/x.png"}',
            "the image 'http://host/x.png' is an address; images are not",
        ),
        ('{"image": "none.png"}', "unreadable: FileNotFoundError: the image 'none.png'"),
        ('{"image": "."}', "unreadable: IsADirectoryError: the image '.'"),
        ('{"image": "a\\u0000b.png"}', "unreadable: ValueError: the image 'a\\x00b.png'"),
        (f'{{"image": "{"x" * 300}.png"}}', "unreadable: File name too long: the image 'xxx"),
        (
            '{"image": "circle.png"}',
            "unreadable: Too many levels of symbolic links: the image 'circle.png'",
        ),
        ('{"segments": []}', "the page is empty"),
        ('{"segments": {}}', "segments is not a list"),
        (
            '{"segments": [{"text": "x", "image": "x.png"}]}',
            'segment 0 is neither {"text": ...} nor {"image": ...}',
        ),
        ('{"segments": [7]}', 'segment 0 is neither {"text": ...} nor {"image": ...}'),
        ('{"segments": [{"video": "x"}]}', 'segment 0 is neither {"text": ...} nor {"image": ...}'),
        ('{"text": "\\ud800"}', "the text of segment 0 is not UTF-8"),
        ('{"id": "1", "text": "again"}', "its id occurs twice in this part; the first one is kept"),
    ],
)
def test_lines_of_no_use_are_named(line: str, reason: str, tmp_path: Path) -> None:
    lines = ['{"id": "1", "text": "first"}', line, "", '{"text": "last"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "circle.png").symlink_to("circle.png")

    source = build("jsonl", path=str(tmp_path))
    assert good(source) == {"a.jsonl/1": "first", "a.jsonl/4": "last"}
    file, told = the_bad(source)
    assert told.startswith(reason)
    assert file in ("a.jsonl:2", "a.jsonl/2", "a.jsonl/1")


def test_a_missing_key_may_be_null_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    page = [{"text": "before", "image": None}, {"text": None, "image": "a.png"}]
    lines = [{"id": None, "text": "words", "image": None}, {"segments": page}]
    write_lines(tmp_path / "a.jsonl", lines)
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + (tmp_path / "a.jsonl").read_bytes())
    assert good(build("jsonl", path=str(tmp_path))) == {"a.jsonl/1": "words", "a.jsonl/2": "before"}

    for source in ("folder", "webdataset"):
        place = tmp_path / source
        place.mkdir()
        corpus = one_image(source, place, encoded(picture()), codecs.BOM_UTF8 + b"a caption")
        assert list(good(corpus).values()) == ["first", "a caption", "last"]


def test_images_relative_to_another_folder(tmp_path: Path) -> None:
    """With a folder of images given, paths begin there, and must not lead out of it."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encoded(picture()))
    write_lines(tmp_path / "a.jsonl", [{"image": "a.png"}, {"image": "../a.jsonl"}])
    source = build("jsonl", path=str(tmp_path / "a.jsonl"), images=str(tmp_path / "pictures"))
    assert list(good(source)) == ["a.jsonl/1"]
    assert "outside" in the_bad(source)[1]


def one_line(place: Path, line: dict[str, Any], **settings: Any) -> Document | Skipped:
    """The item that a line of JSON makes, in a folder with the image a.png."""
    (place / "a.png").write_bytes(IMAGE)
    write_lines(place / "a.jsonl", [line])
    (item,) = build("jsonl", path=str(place / "a.jsonl"), **settings).documents()
    return item


@given(
    st.sampled_from(TEXT_KEYS),
    st.sampled_from(IMAGE_KEYS),
    st.sampled_from([str.lower, str.upper, str.title]),
    st.sampled_from([{}, {"id": "7", "width": 12, "license": "CC BY 4.0", "thumb": "b.png"}]),
)
def test_a_pair_is_read_under_every_usual_name(
    text: str, image: str, written: Callable[[str], str], more: dict[str, Any]
) -> None:
    line = {**more, written(text): "a dog", written(image): "a.png"}
    with tempfile.TemporaryDirectory() as folder:
        item = one_line(Path(folder), line)
    assert isinstance(item, Document)
    assert [type(segment) for segment in item.segments] == [TextSegment, ImageSegment]
    assert item.text == "a dog"


@pytest.mark.parametrize(
    ("line", "settings", "segments"),
    [
        ({"captions": [None, " ", "first", "second"], "image": "a.png"}, {}, ["first", "image"]),
        ({"sentences": [{"raw": "said"}], "filename": "a.png"}, {}, ["said", "image"]),
        ({"text": "a", "image": {"path": "a.png"}}, {}, ["a", "image"]),
        ({"text": "a", "images": ["a.png"]}, {}, ["a", "image"]),
        ({"text": "a", "image": "a.png", "file_name": "a.png"}, {}, ["a", "image"]),
        ({"text": "a", "image": ""}, {}, ["a"]),
        ({"text": "a", "path": "shard 3"}, {}, ["a"]),
        ({"text": "a", "Bild": "a.png"}, {"image_key": "Bild"}, ["a", "image"]),
        ({"Legende": "a", "image": "a.png"}, {"text_key": "Legende"}, ["a", "image"]),
        (
            {"image": "a.png", "mask": "b.png", "file": "c.png", "text": "a"},
            {"image_key": "image"},
            ["a", "image"],
        ),
        ({"image": "a.png", "license": "CC BY 4.0"}, {"text_key": "text"}, ["image"]),
        (
            {
                "image": "a.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": "A dog."},
                ],
            },
            {},
            ["image", "What is it?\nA dog."],
        ),
        (
            {"image": "a.png", "messages": [{"role": "user", "content": "See <image> there"}]},
            {},
            ["See", "image", "there"],
        ),
        (
            {
                "images": ["a.png", "a.png"],
                "messages": [{"role": "user", "content": "<image> or <image>?"}],
            },
            {},
            ["image", "or", "image", "?"],
        ),
        (
            {"image": "a.png", "conversations": [{"value": "What is it?"}]},
            {},
            ["image", "What is it?"],
        ),
    ],
)
def test_what_else_a_line_may_hold(
    line: dict[str, Any], settings: dict[str, str], segments: list[str], tmp_path: Path
) -> None:
    item = one_line(tmp_path, line, **settings)
    assert isinstance(item, Document), item
    found = [s.text if isinstance(s, TextSegment) else "image" for s in item.segments]
    assert found == segments


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            {"text": "a", "Bild": "a.png"},
            "'Bild': looks like an image and is not read; set data.image_key",
        ),
        ({"text": "a", "Bild": {"bytes": "x"}}, "'Bild': looks like an image"),
        ({"text": "a", "Bilder": ["a.png"]}, "'Bilder': looks like an image"),
        ({"text": "a", "Bild": "https://x.org/a.jpg?size=3"}, "'Bild': looks like an image"),
        ({"caption": "a", "url": "https://x.org/7"}, "'url': looks like an image"),
        (
            {"image": "a.png", "Legende": "ein Hund"},
            "'Legende': looks like a text and is not read; set data.text_key",
        ),
        ({"image": "a.png", "Legenden": ["ein Hund"]}, "'Legenden': looks like a text"),
        (
            {"image": "a.png", "file_name": "b.png", "text": "a"},
            "several images, under image, file_name; say which",
        ),
        (
            {"images": ["a.png", "b.png"], "text": "a"},
            "images lists 2 images; a page is written as segments",
        ),
        (
            {"conversations": [{"value": "<image> What is it?"}]},
            "the turns have 1 times <image>, the line 0 images",
        ),
        (
            {"conversations": [{"value": "What is it?"}], "Bild": "a.png"},
            "'Bild': looks like an image",
        ),
        (
            {"image": "a.png", "conversations": [{"value": 7}]},
            "turn 0 of conversations has no text",
        ),
        ({"Titel": "dog"}, "the line has none of text, image and segments, but 'Titel'"),
    ],
)
def test_half_of_a_pair_is_never_read_without_a_word(
    line: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    item = one_line(tmp_path, line)
    assert isinstance(item, Skipped), item
    assert item.reason.startswith(reason)


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_that_is_too_long_is_not_held(packed: bool, tmp_path: Path) -> None:
    content = b'{"text": "first"}\n{"text": "' + b"x" * 5000 + b'"}\n{"text": "last"}'
    name = "a.jsonl"
    if packed:
        name, content = "a.jsonl.gz", gzip.compress(content)
    (tmp_path / name).write_bytes(content)
    source = build("text_jsonl", path=str(tmp_path), max_file_bytes=1000)
    assert list(good(source).values()) == ["first", "last"]
    assert the_bad(source) == (f"{name}:2", "the line is longer than 1000 bytes")


def test_a_packed_file_that_is_cut_keeps_what_is_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = "".join(json.dumps({"text": rng.bytes(300).hex()}) + "\n" for _ in range(400))
    packed = gzip.compress(lines.encode())

    # Random lines do not pack well: half of the file holds about half of them.
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    source = build("text_jsonl", path=str(tmp_path))
    assert 50 < len(good(source)) < 350
    assert [reason.partition(":")[0] for _, reason in bad(source)][-1] == "the file ends early"


def test_invalid_utf8_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "good"}\n')
    source = build("text_jsonl", path=str(tmp_path))
    assert list(good(source).values()) == ["good"]
    assert "the line is not usable JSON: 'utf-8'" in the_bad(source)[1]


def test_texts_from_another_field(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"content": "words"}, {"text": "other"}, {"content": " "}])
    source = build("text_jsonl", path=str(tmp_path), field="content")
    assert list(good(source).values()) == ["words"]
    assert [reason for _, reason in bad(source)] == [
        "the line has no content, but 'text'",
        "the text is empty",
    ]


# --------------------------------------------------------------------------------------- webdataset


def test_tars_are_read_as_the_webdataset_library_reads_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    members = []
    for number in range(20):
        members += [
            (f"sub/{number:05d}.jpg", encoded(picture(number), "jpeg")),
            (f"sub/{number:05d}.txt", b"a %d" % number),
        ]
    write_tar(tmp_path / "00000.tar", members)

    theirs = list(
        webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False).decode("rgb8")
    )
    ours = documents_of(build("webdataset", path=str(tmp_path)))
    assert [item.id for item in ours] == [f"00000.tar/{sample['__key__']}" for sample in theirs]
    for item, sample in zip(ours, theirs, strict=True):
        assert item.text == sample["txt"]
        assert np.array_equal(item.image, sample["jpg"])


def test_captions_from_json_and_pages(tmp_path: Path) -> None:
    source = build("webdataset", **CORPORA["webdataset"](tmp_path))
    assert good(source) == {
        "00000.tar/00000": "json 0",
        "00000.tar/00001": "picture 1",
        "00000.tar/00002": "json 2",
        "00000.tar/00003": "picture 3",
        "00001.tar/page": "between",
    }
    page = next(item for item in source.read("00001.tar") if isinstance(item, Document)).segments
    assert [type(segment) for segment in page] == [ImageSegment, TextSegment, ImageSegment]
    assert np.array_equal(page[2].pixels_HWC, picture(8))  # type: ignore[union-attr]


# Whatever lies between these two pairs in a tar, both are read.
PAIR = [("a.png", encoded(picture(1))), ("a.txt", b"first")]
LAST = [("z.png", encoded(picture(2))), ("z.txt", b"last")]


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    """A member that is no file of its own."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("members", "file", "reason"),
    [
        ([("../b.png", b"x"), ("../b.txt", b"x")], "../b.png", "outside"),
        ([("/etc/b.txt", b"x")], "/etc/b.txt", "outside"),
        ([("c/../../b.png", b"x")], "c/../../b.png", "outside"),
        (
            [(link("b.png", "/etc/passwd", tarfile.SYMTYPE), b"")],
            "b.png",
            "a symbolic link, not a file",
        ),
        ([(link("b.png", "a.png", tarfile.LNKTYPE), b"")], "b.png", "a hard link, not a file"),
        ([(link("b.png", "", tarfile.CHRTYPE), b"")], "b.png", "a device, not a file"),
        ([(link("b.png", "", tarfile.GNUTYPE_SPARSE), b"")], "b.png", "a sparse file, not a file"),
        (
            [("b.png", encoded(picture(3)))],
            "b",
            "no caption: the key has only .png; data.text_key names a member, or a key in .json",
        ),
        ([("b.txt", b"x")], "b", "no image: the key has only .txt"),
        (
            [("b.png", encoded(picture(3))), ("b.json", b"{")],
            "b",
            "the member .json is not usable JSON",
        ),
        (
            [("b.json", b'{"segments": [{"image": "0.png"}]}')],
            "b",
            "no image: the key has no member .0.png",
        ),
    ],
)
def test_members_of_no_use_are_named(
    members: list[tuple[Any, bytes]], file: str, reason: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "a.tar", [*PAIR, *members, *LAST])
    source = build("webdataset", path=str(tmp_path))
    assert good(source) == {"a.tar/a": "first", "a.tar/z": "last"}
    named = bad(source)
    assert (f"a.tar/{file}") in [name for name, _ in named]
    assert all(reason in told for _, told in named), named
    assert not (tmp_path.parent / "b.png").exists()


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*PAIR, ("b.png", b"x" * 5000), ("b.txt", b"x"), *LAST])
    source = build("webdataset", path=str(tmp_path), max_file_bytes=4000)
    assert list(good(source).values()) == ["first", "last"]
    assert the_bad(source) == (
        "a.tar/b",
        "too large: the member .png has 5000 bytes, more than 4000",
    )


def test_keys_and_members_that_occur_twice(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*PAIR, ("a.txt", b"again"), *LAST, *PAIR])
    source = build("webdataset", path=str(tmp_path))
    assert good(source) == {"a.tar/a": "first", "a.tar/z": "last"}
    again = "occurs twice in the tar; the first one is kept"
    assert bad(source) == [("a.tar/a.txt", again), ("a.tar/a.png", again), ("a.tar/a.txt", again)]


def tar_of(place: Path, members: dict[str, bytes], **settings: Any) -> Source:
    """A source of one tar with these members."""
    return build("webdataset", path=str(write_tar(place / "a.tar", members.items())), **settings)


@given(st.permutations([f"{key}.{kind}" for key in "abcd" for kind in ("png", "txt", "json")]))
def test_the_order_of_members_does_not_matter(names: list[str]) -> None:
    contents = {"png": IMAGE, "json": b'{"caption": "from json"}'}
    members = {name: contents.get(name[2:], f"text {name[0]}".encode()) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        items = list(tar_of(Path(folder), members).documents())
    texts = {item.id: item.text for item in items if isinstance(item, Document)}
    assert texts == {f"a.tar/{key}": f"text {key}" for key in "abcd"}
    assert len(items) == 4


@given(st.permutations([f"{key}.{kind}" for key in "abcd" for kind in ("png", "txt")]))
def test_pairs_of_a_remote_tar_may_lie_apart(names: list[str]) -> None:
    members = {name: IMAGE if "png" in name else name[:1].encode() for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "a.tar", members.items())
        fsspec.filesystem("memory").pipe("/apart/a.tar", path.read_bytes())
    source = build("webdataset", path="memory://apart/a.tar")
    assert good(source) == {f"a.tar/{key}": key for key in "abcd"}
    assert bad(source) == []


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_held_of_an_unsorted_tar_has_a_limit(packed: bool, tmp_path: Path) -> None:
    """All images stand before all captions; there is room for two of the images."""
    big = encoded(picture(3, 60))
    members = {f"{key}.png": big for key in "abcd"} | {f"{key}.txt": b"words" for key in "abcd"}
    members["z.png"], members["z.txt"] = big, b"together"
    path = write_tar(tmp_path / "a.tar", members.items(), "w:gz" if packed else "w")
    source = build("webdataset", path=str(path), max_held_bytes=2 * len(big) + 3000)
    assert list(good(source)) == ["a.tar/a", "a.tar/b", "a.tar/z"]

    for file, reason in bad(source):
        assert file in ("a.tar/c", "a.tar/d")
        assert "lie apart in the tar" in reason
        assert "tar --sort=name" in reason


def test_the_members_of_one_key_have_a_limit_together(tmp_path: Path) -> None:
    members = {f"page.{n}.png": encoded(picture(n, 60)) for n in range(5)}
    page = {"segments": [{"image": f"{n}.png"} for n in range(5)]}
    members |= {"page.json": json.dumps(page).encode(), "z.png": IMAGE, "z.txt": b"last"}
    source = tar_of(tmp_path, members, max_held_bytes=30_000)
    assert list(good(source)) == ["a.tar/z"]
    assert bad(source) == [
        ("a.tar/page", "too large: the members of the key have more than 30000 bytes")
    ]


def test_a_packed_tar_of_one_key_takes_little_memory(tmp_path: Path) -> None:
    """Members of one key that unpack to 160 MiB, in a file of a few hundred kilobytes."""
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", compresslevel=9) as tar:
        for number in range(40):
            info = tarfile.TarInfo(f"a.{number}.png")
            info.size = 4 * 2**20
            tar.addfile(info, io.BytesIO(bytes(info.size)))

    source = build("webdataset", path=str(tmp_path), max_held_bytes=8 * 2**20)
    tracemalloc.start()
    assert [file for file, _ in bad(source)] == ["a.tar.gz/a"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * 2**20


@pytest.mark.parametrize("same_key", [True, False])
def test_a_packed_tar_of_many_members_takes_little_memory(
    same_key: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names take memory too: there are 20,000 of them, and there is room for a hundred."""
    monkeypatch.setattr(webdataset, "MAX_LISTED_BYTES", 100 * webdataset.MEMBER_BYTES)
    key = "a." if same_key else ""
    names = (f"{key}{n}.png" for n in range(20_000))
    write_tar(tmp_path / "a.tar.gz", ((name, b"x") for name in names), "w:gz")

    source = build("webdataset", path=str(tmp_path), max_held_bytes=100 * webdataset.MEMBER_BYTES)
    source.parts()

    # Listing the parts is not measured, only reading.
    tracemalloc.start()
    left_out = sum(isinstance(item, Skipped) for item in source.documents())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert left_out == (1 if same_key else 20_000)
    assert peak < 2**20


@pytest.mark.parametrize(
    ("members", "settings", "text"),
    [
        ({"a.input.jpg": IMAGE, "a.outputs.txt": b"x"}, ("input.jpg", "outputs.txt"), "x"),
        ({"a.INPUT.JPG": IMAGE, "a.outputs.TXT": b"x"}, (".input.jpg", ".outputs.txt"), "x"),
        ({"a.jpg": IMAGE, "a.caption": b"x"}, (None, None), "x"),
        ({"a.jpg": IMAGE, "a.text": b"x"}, (None, None), "x"),
        ({"a.jpg": IMAGE, "a.json": b'{"prompt": "x"}'}, (None, None), "x"),
        ({"a.jpg": IMAGE, "a.json": b'{"TEXT": "x"}'}, (None, None), "x"),
        ({"a.jpg": IMAGE, "a.json": b'{"captions": [" ", "x", "y"]}'}, (None, None), "x"),
        ({"a.jpg": IMAGE, "a.json": b'{"Legende": "x"}'}, (None, "Legende"), "x"),
        ({"a.jpg": IMAGE, "a.txt": b"x", "a.json": b'{"own": "y"}'}, (None, "own"), "y"),
        ({"a.photo": IMAGE, "a.txt": b"x"}, ("photo", None), "x"),
        ({"a.png": OTHER, "a.webp": IMAGE, "a.txt": b"x"}, ("webp", None), "x"),
        ({"a.jpg": IMAGE, "a.mask.png": OTHER, "a.txt": b"x"}, (None, None), "x"),
    ],
)
def test_members_are_found_by_their_usual_names_and_by_keys(
    members: dict[str, bytes], settings: tuple[str | None, str | None], text: str, tmp_path: Path
) -> None:
    source = tar_of(tmp_path, members, image_key=settings[0], text_key=settings[1])
    (item,) = source.documents()
    assert isinstance(item, Document)
    assert item.text == text
    assert np.array_equal(item.image, picture(1))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (
            {"a.png": OTHER, "a.webp": IMAGE, "a.txt": b"x"},
            "several images: the key has .png, .webp; ",
        ),
        (
            {"a.input.jpg": IMAGE, "a.outputs.txt": b"x"},
            "the key has only .input.jpg, .outputs.txt; ",
        ),
        ({"a.photo": IMAGE, "a.txt": b"x"}, "no image: the key has only .photo, .txt; "),
        ({"a.jpg": IMAGE, "a.cls": b"7"}, "no caption: the key has only .cls, .jpg; data.text_key"),
        (
            {"a.jpg": IMAGE, "a.json": b'{"title": "a dog"}'},
            "'title': looks like a text and is not",
        ),
        ({"a.jpg": IMAGE, "a.json": b'{"text": 7}'}, "the caption is int, not a string"),
    ],
)
def test_no_half_of_a_key_is_read(members: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    source = tar_of(tmp_path, members)
    assert good(source) == {}
    assert reason in the_bad(source)[1]


def many(place: Path, mode: str = "w", name: str = "a.tar") -> bytes:
    """A tar of twenty documents."""
    members = []
    for number in range(20):
        members += [
            (f"{number:03d}.png", encoded(picture(number, 40))),
            (f"{number:03d}.txt", b"picture %d" % number),
        ]
    return write_tar(place / name, members, mode).read_bytes()


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_is_cut_keeps_what_is_there(share: float, mode: str, tmp_path: Path) -> None:
    content = many(tmp_path, mode)
    (tmp_path / "a.tar").write_bytes(content[: int(share * len(content))])
    source = build("webdataset", path=str(tmp_path))
    assert 20 * share - 3 <= len(good(source)) <= 20 * share + 1
    assert "the tar ends early" in bad(source)[-1][1]


def test_damage_in_the_middle_of_a_tar_is_passed_over(tmp_path: Path) -> None:
    content = bytearray(many(tmp_path))
    header = content.index(b"010.png")
    content[header : header + 512] = b"\xff" * 512
    (tmp_path / "a.tar").write_bytes(content)

    source = build("webdataset", path=str(tmp_path))
    assert len(good(source)) == 19
    assert any("damaged" in reason for _, reason in bad(source))


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\0" * 10_240])
def test_what_is_no_tar_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    write_tar(tmp_path / "b.tar", PAIR)
    source = build("webdataset", path=str(tmp_path))
    assert list(good(source).values()) == ["first"]
    if content.strip(b"\0"):
        assert the_bad(source) == ("a.tar", "not a tar file")


def test_long_names_of_every_tar_format(tmp_path: Path) -> None:
    name = "folder/" * 30 + "ü"
    for number, format_ in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=format_) as tar:
            for suffix, content in (("png", encoded(picture())), ("txt", b"long")):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    source = build("webdataset", path=str(tmp_path))
    assert good(source) == {f"{number}.tar/{name}": "long" for number in range(2)}


# ------------------------------------------------------------------------------------------ parquet


def test_rows_in_groups_and_structs(tmp_path: Path) -> None:
    """Two files of eight rows, one with structs of bytes and path, read in their order."""
    documents = list(build("parquet", **CORPORA["parquet"](tmp_path)).documents())
    assert [item.id for item in documents if isinstance(item, Document)] == [
        f"{file}.parquet/{row}" for file in "ab" for row in range(8)
    ]
    for index, item in enumerate(documents):
        assert isinstance(item, Document)
        assert item.text == f"picture {index % 8}"
        assert np.array_equal(item.image, picture(index % 8))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"image_column": "image"},
            r"a\.parquet has no column image for data\.image_column; its columns are jpg, cap",
        ),
        (
            {"caption_column": "text"},
            r"has no column text for data\.caption_column; its columns are jpg, caption",
        ),
        ({"id_column": "key"}, r"has no column key for data\.id_column"),
        (
            {"image_column": "number"},
            r"has int64 in column number; data\.image_column must hold bytes or paths of image",
        ),
        (
            {"caption_column": "jpg"},
            r"has binary in column jpg; data\.caption_column must hold strings or lists of them",
        ),
    ],
)
def test_wrong_columns_are_one_sentence(
    fields: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    table = pa.table({"jpg": [IMAGE], "caption": ["a"], "number": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = build("parquet", path=str(tmp_path), **fields)
    with pytest.raises(UserError, match=sentence):
        list(source.documents())


def test_a_later_file_with_other_columns_is_left_out(tmp_path: Path) -> None:
    settings = CORPORA["parquet"](tmp_path)
    pq.write_table(pa.table({"other": [1, 2]}), tmp_path / "c.parquet")
    source = build("parquet", **settings)
    assert len(good(source)) == 16
    assert the_bad(source)[0] == "c.parquet"
    assert "has no column of images under a usual name" in the_bad(source)[1]


PATHS = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    "image",
    [
        pa.array([IMAGE]),
        pa.array([IMAGE], pa.large_binary()),
        pa.array([IMAGE], pa.binary_view()),
        pa.array([IMAGE], pa.binary(len(IMAGE))),
        pa.array([IMAGE]).dictionary_encode(),
        pa.array(["sub/a.png"]),
        pa.array(["sub/a.png"], pa.string_view()),
        pa.array(["sub/a.png"]).dictionary_encode(),
        pa.array([{"bytes": None, "path": "sub/a.png"}], PATHS),
        pa.array([{"bytes": None, "path": "sub\\a.png"}], PATHS),
        pa.array([{"bytes": b"", "path": "sub/a.png"}], PATHS),
        pa.array([{"bytes": IMAGE, "path": "/no/such/file.png"}], PATHS),
        pa.array([{"path": "sub/a.png"}]),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize(
    "caption",
    [
        pa.array(["words"]),
        pa.array(["words"], pa.large_string()),
        pa.array(["words"], pa.string_view()),
        pa.array(["words"]).dictionary_encode(),
        pa.array([[None, " ", "words", "more"]]),
        pa.array([["words"]], pa.large_list(pa.string_view())),
        pa.array([["words", "more"]], pa.list_(pa.string(), 2)),
    ],
    ids=lambda column: str(column.type),
)
def test_columns_of_every_type(image: pa.Array, caption: pa.Array, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(IMAGE)
    pq.write_table(pa.table({"image": image, "text": caption}), tmp_path / "a.parquet")
    (item,) = build("parquet", path=str(tmp_path)).documents()
    assert isinstance(item, Document), item
    assert item.text == "words"
    assert np.array_equal(item.image, picture(1))


def test_paths_of_images_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(IMAGE)
    (tmp_path / "tables").mkdir()
    images = pa.array([{"bytes": None, "path": path} for path in ("a.png", "../a.png")], PATHS)
    table = pa.table({"image": images, "text": ["a", "b"]})
    pq.write_table(table, tmp_path / "tables" / "a.parquet")

    # Where no folder is named, the images are looked for beside the table.
    alone = build("parquet", path=str(tmp_path / "tables"))
    assert good(alone) == {}
    for (_, reason), told in zip(bad(alone), ("FileNotFoundError", "outside"), strict=True):
        assert told in reason
        assert "data.images" in reason
        assert "embed_table_storage" in reason

    source = build("parquet", path=str(tmp_path / "tables"), images=str(tmp_path / "pictures"))
    assert good(source) == {"a.parquet/0": "a"}


def test_the_images_that_rows_name_change_the_fingerprint(tmp_path: Path) -> None:
    """An image file counts only where the table does not hold the bytes of its images."""
    (tmp_path / "a.png").write_bytes(IMAGE)
    for image, counts in (
        (pa.array(["a.png"]), True),
        (pa.array([{"bytes": None, "path": "a.png"}], PATHS), True),
        (pa.array([{"bytes": IMAGE, "path": "a.png"}], PATHS), False),
        (pa.array([IMAGE]), False),
    ):
        pq.write_table(pa.table({"image": image, "text": ["a"]}), tmp_path / "a.parquet")
        source = build("parquet", path=str(tmp_path))

        before = source.fingerprint()
        (tmp_path / "a.png").write_bytes(OTHER)
        assert (source.fingerprint() != before) == counts
        (tmp_path / "a.png").write_bytes(IMAGE)
        assert source.fingerprint() == before


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"image": [IMAGE], "text": pa.nulls(1)}, "the caption is empty"),
        ({"image": [IMAGE], "text": [[]]}, "the caption is empty"),
        ({"image": pa.array([None], PATHS), "text": ["a"]}, "no image: the row has neither bytes"),
        ({"image": pa.nulls(1, pa.binary()), "text": ["a"]}, "no image: the row has neither bytes"),
    ],
)
def test_rows_without_a_half_are_left_out(
    columns: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    columns = {name: pa.array(values) for name, values in columns.items()}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = build("parquet", path=str(tmp_path))
    assert the_bad(source)[1].startswith(reason)


def test_two_columns_of_images_are_one_sentence(tmp_path: Path) -> None:
    columns = {"jpg": [OTHER], "image": [IMAGE], "file_name": ["a.png"], "caption": ["a"]}

    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    sentence = r"several columns of images, image, jpg; say which with data\.image_column"
    with pytest.raises(UserError, match=sentence):
        list(build("parquet", path=str(tmp_path)).documents())

    (item,) = build("parquet", path=str(tmp_path), image_column="image").documents()
    assert isinstance(item, Document)
    assert np.array_equal(item.image, picture(1))


def test_fewer_rows_are_held_where_their_images_are_large(tmp_path: Path) -> None:
    """A dictionary makes large images look small: of both tables, 3 to 5 rows are held."""
    images = [bytes(200_000)] * 64
    for name, same in (("a", True), ("b", False)):
        table = pa.table({"jpg": images, "caption": ["x"] * 64})
        pq.write_table(table, tmp_path / f"{name}.parquet", use_dictionary=same)
        group = pq.ParquetFile(tmp_path / f"{name}.parquet").metadata.row_group(0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parquet, "HELD", 1_000_000)
            assert 3 <= parquet._rows_at_a_time(group, "jpg") <= 5
        assert parquet._rows_at_a_time(group, "jpg") == 32


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [encoded(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(12)]
    table = pa.table({"jpg": images, "caption": [f"picture {n}" for n in range(12)]})
    file = tmp_path / "a.parquet"
    pq.write_table(
        table,
        file,
        row_group_size=4,
        write_page_checksum=True,
        use_dictionary=False,
        write_statistics=False,
    )

    # One bit of the sixth image is flipped: it is in the second of three row groups.
    content = bytearray(file.read_bytes())
    content[content.index(images[5][100:130])] ^= 1
    file.write_bytes(content)

    source = build("parquet", path=str(tmp_path))
    assert list(good(source).values()) == [f"picture {n}" for n in (*range(4), *range(8, 12))]
    assert [name for name, _ in bad(source)] == [f"a.parquet/{row}" for row in range(4, 8)]
    assert all("row group 1 is damaged" in reason for _, reason in bad(source))
    rest = names_of(source.read("a.parquet", 6))
    assert rest == [f"a.parquet/{row}" for row in range(6, 12)]


def test_what_is_no_parquet_and_missing_values(tmp_path: Path) -> None:
    table = pa.table({"jpg": [encoded(picture()), None], "caption": [None, "x"], "key": ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")
    source = build("parquet", path=str(tmp_path), id_column="key")
    assert good(source) == {}
    assert [file for file, _ in bad(source)] == ["a.parquet/a", "a.parquet/b", "b.parquet"]
    assert "not a readable parquet file" in bad(source)[2][1]


def test_an_id_is_taken_by_a_row_of_no_use_wherever_reading_begins(tmp_path: Path) -> None:
    images = [None, *(encoded(picture(n)) for n in range(5))]
    keys = ["x", "y", "z", "x", None, "y"]
    table = pa.table({"jpg": images, "caption": list("abcdef"), "key": keys})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = build("parquet", path=str(tmp_path), id_column="key")
    assert good(source) == {"a.parquet/y": "b", "a.parquet/z": "c"}

    told = told_of(source.read("a.parquet"))
    for start in range(7):
        assert told_of(source.read("a.parquet", start)) == told[start:]


@pytest.mark.parametrize("told", [[3, 4, 1], [2, 4, 2]])
def test_row_counts_that_do_not_agree(
    told: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row groups hold 3, 3 and 2 rows; there is an item for each row that the footer tells."""
    CORPORA["parquet"](tmp_path)
    source = build("parquet", path=str(tmp_path / "a.parquet"))
    monkeypatch.setattr(parquet, "_rows_of_groups", lambda metadata: told)

    whole = names_of(source.read("a.parquet"))
    assert whole == [f"a.parquet/{row}" for row in range(8)]
    for start in range(9):
        assert names_of(source.read("a.parquet", start)) == whole[start:]


def test_a_footer_whose_row_counts_differ() -> None:
    class Footer:
        num_rows, num_row_groups = 7, 1

        def row_group(self, group: int) -> Any:
            return type("Group", (), {"num_rows": 10**15})

    with pytest.raises(pa.ArrowInvalid, match="hold 1000000000000000 rows, its footer says 7"):
        parquet._rows_of_groups(Footer())  # type: ignore[arg-type]


def test_a_column_name_that_is_no_utf8(tmp_path: Path) -> None:
    source = build("parquet", **CORPORA["parquet"](tmp_path))
    content = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content.replace(b"caption", b"capti\xffn"))
    assert len(good(source)) == 8
    assert the_bad(source)[0] == "b.parquet"
    assert the_bad(source)[1].startswith("not a readable parquet file: ")


def test_a_failing_disk_is_no_damage_to_a_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() < 100:  # the rows; the footer lies at the end
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    source = build("parquet", **CORPORA["parquet"](tmp_path))
    monkeypatch.setattr(
        Files, "open_raw", lambda files, name: Failing((tmp_path / name).read_bytes())
    )
    with pytest.raises(OSError, match="Input/output error"):
        list(source.documents())


def test_an_id_is_the_same_in_every_environment_and_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"id": f"https://h/a?part={n}&sig=s{n}", "text": str(n)} for n in ("seven", "eight")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    # A variable of the environment that stands in the id by chance is not taken for a secret.
    ids = [f"https://h/a?part={n}&sig=***" for n in ("seven", "eight")]
    for secret in ("unrelated", "part=seven"):
        monkeypatch.setenv("A_TOKEN", secret)
        found = documents_of(build("text_jsonl", path=str(tmp_path)))
        assert [document.id.partition("/")[2] for document in found] == ids


def test_ids_that_occur_twice(tmp_path: Path) -> None:
    images = [encoded(picture(n)) for n in range(3)]
    table = pa.table({"jpg": images, "caption": list("abc"), "key": ["x", "y", "x"]})
    pq.write_table(table, tmp_path / "a.parquet")

    source = build("parquet", path=str(tmp_path), id_column="key")
    assert good(source) == {"a.parquet/x": "a", "a.parquet/y": "b"}
    assert the_bad(source) == (
        "a.parquet/x",
        "its id occurs twice in this part; the first one is kept",
    )


# --------------------------------------------------------------------------------------------- coco


def test_captions_images_and_labels(tmp_path: Path) -> None:
    source = build("coco", **CORPORA["coco"](tmp_path))
    documents = documents_of(source)
    assert [item.text for item in documents] == [
        "a dog in the grass",
        "picture 1",
        "picture 2",
        "picture 3",
    ]
    assert [item.label for item in documents] == [1, None, None, None]

    # A text has the class that it names, and none if it names two.
    assert source.class_names == ("person", "dog", "hot dog")
    assert source.class_in("A hot dog!") == 2
    assert source.class_in("a dog and a person") is None

    every = build("coco", **CORPORA["coco"](_fresh(tmp_path)), captions="all")
    assert len(good(every)) == 8


def _fresh(place: Path) -> Path:
    (place / "again").mkdir()
    return place / "again"


def broken_coco(place: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a corpus whose captions file has some lists replaced."""
    settings = CORPORA["coco"](place)
    content = json.loads((place / "captions.json").read_text())
    content.update(changes)
    (place / "captions.json").write_text(json.dumps(content))
    return settings


@pytest.mark.parametrize("write", [str, lambda id_: f"{id_:012d}", float])
def test_ids_match_however_they_are_written(write: Callable[[int], Any], tmp_path: Path) -> None:
    settings = CORPORA["coco"](tmp_path)
    whole = list(build("coco", **settings).documents())

    # As strings, with zeros in front, or as numbers with a fraction.
    for name in ("captions.json", "instances.json"):
        content = json.loads((tmp_path / name).read_text())
        for annotation in content["annotations"]:
            for key in ("image_id", "category_id"):
                if key in annotation:
                    annotation[key] = write(annotation[key])
        (tmp_path / name).write_text(json.dumps(content))

    again = list(build("coco", **settings).documents())
    for item, other in zip(whole, again, strict=True):
        assert isinstance(item, Document)
        assert isinstance(other, Document)
        assert (item.id, item.text, item.label) == (other.id, other.text, other.label)
    assert whole[0].label is not None  # type: ignore[union-attr]


def test_entries_of_no_use_are_named(tmp_path: Path) -> None:
    images = [
        {"id": 0, "file_name": "000000000000.jpg"},
        {"id": 1, "file_name": "../captions.json"},
        {"id": 2, "file_name": "none.jpg"},
        {"id": 9, "file_name": "000000000003.jpg"},
        {"file_name": 7},
        {"id": [1], "file_name": "x.jpg"},
        "no entry",
    ]

    source = build("coco", **broken_coco(tmp_path, images=images))

    # Number 9 has no caption; the others lie outside, are not there, or are no entries.
    assert list(good(source)) == ["captions/0-0"]
    assert [reason.partition(":")[0] for _, reason in bad(source)] == [
        "the image '../captions.json' lies outside the folder",
        "unreadable",
        "no caption",
        *["an image without an id or a file_name"] * 3,
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not usable JSON"),
        ("[" * 100_000, "is not usable JSON: nested too deep"),
        ("[]", "has no list under images"),
        ('{"images": []}', "has no list under annotations"),
        ('{"images": [], "annotations": []}', "lists no images"),
        (
            '{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}',
            "has annotations without captions",
        ),
    ],
)
def test_what_is_no_captions_file_is_one_sentence(
    content: str, sentence: str, tmp_path: Path
) -> None:
    settings = CORPORA["coco"](tmp_path)
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        list(build("coco", **settings).documents())


def test_instances_of_no_use(tmp_path: Path) -> None:
    settings = CORPORA["coco"](tmp_path)
    instances = json.loads((tmp_path / "instances.json").read_text())
    annotations = [*instances["annotations"], 7, {"image_id": [1], "category_id": {}}]
    (tmp_path / "instances.json").write_text(json.dumps({**instances, "annotations": annotations}))

    # Annotations that are no use are passed over.
    labels = [document.label for document in documents_of(build("coco", **settings))]
    assert labels == [1, None, None, None]

    # A category that cannot be named is a mistake.
    unnamed = {"annotations": [], "categories": [{"id": 1}]}
    (tmp_path / "instances.json").write_text(json.dumps(unnamed))
    with pytest.raises(
        UserError, match=r"^data\.instances: .* has a category without an id or a name; "
    ):
        build("coco", **settings)

    # So is a path at which there is nothing, or a folder.
    for setting in ("images", "instances"):
        with pytest.raises(UserError, match=rf"^data\.{setting}: .*/none does not exist"):
            build("coco", **{**settings, setting: str(tmp_path / "none")})
    with pytest.raises(UserError, match=r"^data\.instances: .* is not a file"):
        build("coco", **{**settings, "instances": str(tmp_path / "images")})


# -------------------------------------------------------------------------------- files that vanish


def test_a_caption_that_vanishes_costs_its_image_alone(tmp_path: Path) -> None:
    source = build("folder", **CORPORA["folder"](tmp_path))
    parts = source.parts()
    (tmp_path / "sub" / "3.txt").unlink()

    items = [item for part in parts for item in source.read(part)]
    skipped = [item for item in items if isinstance(item, Skipped)]
    assert skipped == [Skipped("sub/3.png", "unusable caption: FileNotFoundError")]
    assert len(items) == 6


@pytest.mark.parametrize("name", ["folder", "jsonl"])
def test_a_failing_disk_is_no_matter_of_one_image(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(name, **CORPORA[name](tmp_path))
    read = Files._open

    def failing(files: Files, file: str) -> Any:
        if file.endswith("2.png"):
            raise OSError(errno.EIO, "Input/output error")
        return read(files, file)

    monkeypatch.setattr(Files, "_open", failing)
    with pytest.raises(OSError, match="Input/output error"):
        list(source.documents())


def test_files_that_vanish_or_may_not_be_read(tmp_path: Path) -> None:
    source = build("text_jsonl", **CORPORA["text_jsonl"](tmp_path))
    parts = source.parts()
    (tmp_path / "a.jsonl").unlink()

    items = [item for part in parts for item in source.read(part)]
    reasons = [item.reason for item in items if isinstance(item, Skipped)]
    assert reasons == ["deleted since the corpus was listed"]
    assert sum(isinstance(item, Document) for item in items) == 4
