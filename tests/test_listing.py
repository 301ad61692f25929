"""What a path of a corpus stands for.

It may name several paths, links, folders that cannot be read, and files whose names are written
in another way on another system.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from corpora import CORPORA, encoded, picture, write_lines, write_tar
from hypothesis import given
from hypothesis import strategies as st

from cm3leon.data.paths import all_paths, expand, split_paths
from cm3leon.data.source import Skipped, Source
from cm3leon.registry import SOURCES, discover
from cm3leon.types import Document, UserError

discover()

IMAGE = encoded(picture(1))


def build(name: str, path: Any, **fields: Any) -> Source:
    if not isinstance(path, list):
        path = str(path)
    return SOURCES.build({"name": name, "path": path, **fields})


def items(source: Source) -> tuple[dict[str, str], dict[str, str]]:
    """The text of each document by its id, and why each file is left out that is."""
    documents, left_out = {}, {}
    for item in source.documents():
        if isinstance(item, Skipped):
            left_out[item.file] = item.reason
        else:
            documents[item.id] = item.text
    return documents, left_out


def pair(folder: Path, name: str, text: str = "words") -> None:
    """An image with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(IMAGE)
    (folder / f"{name}.txt").write_text(text)


# ------------------------------------------------------------------------------------ several paths


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.tar::b.tar", ["a.tar", "b.tar"]),
        ("s3://x/a.tar::s3://x/b.tar", ["s3://x/a.tar", "s3://x/b.tar"]),
        ("zip://*.tar::x.zip", ["zip://*.tar::x.zip"]),
        ("zip://*.tar::simplecache::s3://x/y.zip", ["zip://*.tar::simplecache::s3://x/y.zip"]),
        ("simplecache::s3://x/a.tar", ["simplecache::s3://x/a.tar"]),
        ("zip://a.tar::x.zip::b.tar", ["zip://a.tar::x.zip", "b.tar"]),
    ],
)
def test_paths_between_colons(path: str, expected: list[str]) -> None:
    assert split_paths(path) == expected


@pytest.mark.parametrize(
    "path",
    [
        "a{1..3}b",
        "{00..12}.tar",
        "{098..102}",
        "x{a,b}{c,d}",
        "{a,{b,c}d}",
        "{a}",
        "{",
        "a}b{c",
        "{a,b",
        "{10..0..5}",
        "{c..a}",
        "{-02..2}",
        "x{,y}",
        "{a,b}.{1..2}",
        "{1..x}",
    ],
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash to compare with")
def test_braces_are_those_of_the_shell(path: str) -> None:
    shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {path}"], capture_output=True, text=True)
    assert list(expand(path)) == shell.stdout.splitlines()


@given(st.text("ab{},.1:/", max_size=12))
def test_any_text_is_at_least_one_path(text: str) -> None:
    assert list(expand(text))
    if "{" not in text:
        assert list(expand(text)) == [text]


def test_braces_for_too_many_paths_are_one_sentence() -> None:
    for path, named in (
        ("x/{1..10000000000}.tar", "{1..10000000000} in x/{1..10000000000}.tar"),
        ("{1..1000}{1..1000}", "{1..1000}{1..1000}"),
    ):
        with pytest.raises(UserError) as refusal:
            all_paths(path, "data.path")
        assert str(refusal.value) == (
            f"data.path: {named} stands for more than 100,000 paths; give a folder or a glob "
            "instead"
        )
    with pytest.raises(UserError, match=r"data\.path has an empty path"):
        all_paths([], "data.path")


@pytest.mark.parametrize("form", ["list", "colons", "braces", "range", "globs"])
def test_every_one_of_several_paths_is_read(form: str, tmp_path: Path) -> None:
    for number in range(8, 12):
        content = [("x.png", IMAGE), ("x.txt", b"tar %d" % number)]
        write_tar(tmp_path / f"{number:02d}.tar", content)

    names = [f"{tmp_path}/{number:02d}.tar" for number in range(8, 12)]
    path = {
        "list": names,
        "colons": "::".join(names),
        "braces": f"{tmp_path}/{{08,09,10,11}}.tar",
        "range": f"{tmp_path}/{{08..11}}.tar",
        "globs": [f"{tmp_path}/0*.tar", f"{tmp_path}/1*.tar", names[0]],
    }[form]

    # Whatever the form, it is the corpus of the whole folder.
    source = build("webdataset", path)
    whole = build("webdataset", tmp_path)
    assert items(source) == items(whole)
    assert source.fingerprint() == whole.fingerprint()


def test_several_folders_have_the_names_of_the_folder_above(tmp_path: Path) -> None:
    for name in ("train", "test", "other"):
        pair(tmp_path / name, "a", name)
    source = build("folder", f"{tmp_path}/{{train,test}}")
    assert items(source)[0] == {"train/a.png": "train", "test/a.png": "test"}


def test_a_path_of_several_that_is_not_read_is_a_sentence(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x.png", IMAGE), ("x.txt", b"words")])
    (tmp_path / "empty").mkdir()
    for path, sentence in (
        ([f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"], "b.tar does not exist"),
        (f"{tmp_path}/{{a,b}}.tar", "b.tar does not exist"),
        (f"{tmp_path}/a.tar::{tmp_path}/b.tar", "b.tar does not exist"),
        ([f"{tmp_path}/a.tar", f"{tmp_path}/empty"], "empty holds no files that end in .tar"),
        ([f"{tmp_path}/a.tar", f"{tmp_path}/*.tgz"], r"\*.tgz holds no files that end in .tar"),
        ([f"{tmp_path}/a.tar", "memory://x"], "does not exist|lie on different file systems"),
    ):
        with pytest.raises(UserError, match=sentence):
            build("webdataset", path).parts()


def test_a_name_with_braces_or_colons_is_that_of_the_file(tmp_path: Path) -> None:
    for name in ("{a,b}", "a::b"):
        write_tar(tmp_path / f"{name}.tar", [("x.png", IMAGE), ("x.txt", b"words")])
        assert items(build("webdataset", tmp_path / f"{name}.tar"))[0] == {f"{name}.tar/x": "words"}


def test_names_inside_a_zip_file_are_whole(tmp_path: Path) -> None:
    write_tar(tmp_path / "first.tar", [("x.png", IMAGE), ("x.txt", b"words")])
    (tmp_path / "lines.jsonl").write_text('{"text": "words", "image": "a.png"}')
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        for name in ("first.tar", "lines.jsonl"):
            packed.write(tmp_path / name, name)
        packed.writestr("a.png", IMAGE)
        packed.writestr("sub/b.png", IMAGE)
        packed.writestr("sub/b.txt", "b")

    for path in (f"zip://*.tar::{tmp_path}/x.zip", f"zip://first.tar::{tmp_path}/x.zip"):
        assert items(build("webdataset", path))[0] == {"first.tar/x": "words"}
    documents = items(build("jsonl", f"zip://*.jsonl::{tmp_path}/x.zip"))
    assert documents == ({"lines.jsonl/1": "words"}, {})
    assert items(build("folder", f"zip://::{tmp_path}/x.zip"))[0] == {"sub/b.png": "b"}


# -------------------------------------------------------------------------------------------- links


def test_linked_folders_are_read_once_and_circles_are_left(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    pair(corpus / "real", "a")
    pair(tmp_path / "elsewhere" / "deep", "b")

    # Links inside the corpus, out of it and back, in circles, and to nothing.
    (corpus / "again").symlink_to("real")
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(corpus)
    (corpus / "real" / "self").symlink_to(".")
    (corpus / "up").symlink_to("..")
    (corpus / "circle").symlink_to("circle")
    (corpus / "gone").symlink_to("nowhere")
    (corpus / "gone.png").symlink_to("nowhere.png")
    (corpus / "notes.md").symlink_to("nowhere.md")

    documents, left_out = items(build("folder", corpus))
    assert list(documents) == ["linked/deep/b.png", "real/a.png"]
    assert left_out == {
        "again": "a link to a folder that is read already",
        "real/self": "a link to a folder that is read already",
        "linked/back": "a link to a folder that is read already",
        "up": "a link to a folder that this one lies in",
        "circle": "a link to what is not there",
        "gone": "a link to what is not there",
        "gone.png": "a link to what is not there",
    }


@pytest.mark.parametrize("name", ["jsonl", "text_jsonl", "webdataset", "parquet", "folder"])
def test_every_source_follows_links_and_names_what_it_cannot_read(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "corpus").mkdir()
    CORPORA[name](tmp_path / "store")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "corpus" / "again").symlink_to(tmp_path / "store")

    documents, left_out = items(build(name, tmp_path / "corpus"))
    assert len(documents) == len(items(build(name, tmp_path / "store"))[0])
    assert left_out == {"linked": "a link to a folder that is read already"}


def test_a_folder_that_may_not_be_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair(tmp_path / "open", "a")
    pair(tmp_path / "closed", "b")
    scan = os.scandir

    def refusing(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)

    assert items(build("folder", tmp_path)) == (
        {"open/a.png": "words"},
        {"closed": "the folder cannot be read: Permission denied"},
    )
    with pytest.raises(UserError, match="closed cannot be read: Permission denied"):
        build("folder", tmp_path / "closed").parts()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pair(tmp_path, "a")
    os.mkfifo(tmp_path / "b.png")
    documents, left_out = items(build("folder", tmp_path))
    assert list(documents) == ["a.png"]
    assert left_out == {"b.png": "not a file, but a pipe, a socket or a device"}

    write_lines(tmp_path / "a.jsonl", [{"image": "b.png"}])
    assert "the image 'b.png'" in items(build("jsonl", tmp_path / "a.jsonl"))[1]["a.jsonl/1"]


# -------------------------------------------------------------------------------------------- names


COMPOSED = "Stra\u00dfencaf\u00e9"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_may_be_composed_or_not(form: str, tmp_path: Path) -> None:
    """A Mac writes the names of files with decomposed accents."""
    written = normalize(form, COMPOSED)
    on_disk = normalize("NFD" if form == "NFC" else "NFC", COMPOSED)
    assert on_disk != written

    (tmp_path / f"{on_disk}.png").write_bytes(IMAGE)
    (tmp_path / f"{written}.txt").write_text("beside")
    assert items(build("folder", tmp_path)) == ({f"{on_disk}.png": "beside"}, {})

    line = {"file": f"{written}.png", "caption": "from the table"}
    (tmp_path / "captions.jsonl").write_text(json.dumps(line))
    assert items(build("folder", tmp_path)) == ({f"{on_disk}.png": "from the table"}, {})

    write_lines(tmp_path / "a.jsonl", [{"text": "words", "image": f"{written}.png"}])
    assert items(build("jsonl", tmp_path / "a.jsonl")) == ({"a.jsonl/1": "words"}, {})


def test_names_of_another_system_match(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("IMG.JPG", "b.png"):
        (tmp_path / "sub" / name).write_bytes(IMAGE)
    (tmp_path / "sub" / "IMG.TXT").write_text("beside")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "sub\\b.png", "caption": "b"}))
    assert items(build("folder", tmp_path)) == ({"sub/IMG.JPG": "beside", "sub/b.png": "b"}, {})

    # A backslash separates folders, and cannot lead out of the corpus either.
    write_lines(tmp_path / "a.jsonl", [{"image": "sub\\b.png"}, {"image": "..\\b.png"}])
    documents, left_out = items(build("jsonl", tmp_path / "a.jsonl"))
    assert list(documents) == ["a.jsonl/1"]
    assert "outside" in left_out["a.jsonl/2"]


def test_whole_paths_inside_the_folder_are_read(tmp_path: Path) -> None:
    pair(tmp_path / "in", "a")
    pair(tmp_path, "out")
    paths = ("in/a.png", "out.png", "in/../out.png")
    lines = [{"image": f"{tmp_path}/{path}"} for path in paths]
    write_lines(tmp_path / "in" / "a.jsonl", lines)

    documents, left_out = items(build("jsonl", tmp_path / "in" / "a.jsonl"))
    assert list(documents) == ["a.jsonl/1"]
    assert all("outside" in reason for reason in left_out.values())
    assert len(left_out) == 2


@pytest.mark.parametrize("table", ["captions.jsonl", "metadata.jsonl", "metadata.csv"])
def test_tables_of_captions_hold_for_their_folder(table: str, tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name / "sub").mkdir(parents=True)
        for image in ("a.png", "sub/b.png"):
            (tmp_path / name / image).write_bytes(IMAGE)
        rows = [("a.png", f"{name} a, really"), ("sub/b.png", f"{name} b"), ("a.png", "more")]
        if table.endswith("csv"):
            lines = ["file_name,text", *(f'{image},"{text}"' for image, text in rows)]
            (tmp_path / name / table).write_text("\n".join(lines))
        else:
            lines = [json.dumps({"file_name": image, "text": text}) for image, text in rows]
            (tmp_path / name / table).write_text("\n".join(lines))

    # Each table has two rows of one image, of which the first counts.
    documents, left_out = items(build("folder", tmp_path))
    assert documents == {
        "test/a.png": "test a, really",
        "test/sub/b.png": "test b",
        "train/a.png": "train a, really",
        "train/sub/b.png": "train b",
    }
    assert set(left_out.values()) == {"an earlier line has a caption of this image"}


def test_a_table_in_a_deeper_folder_goes_first(tmp_path: Path) -> None:
    pair(tmp_path / "sub", "a", "beside")
    for folder, text in ((tmp_path, "above"), (tmp_path / "sub", "near")):
        file = "a.png" if text == "near" else "sub/a.png"
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": file, "text": text}))
    assert items(build("folder", tmp_path))[0] == {"sub/a.png": "near"}


def test_other_keys_of_a_table(tmp_path: Path) -> None:
    pair(tmp_path, "a", "beside")
    line = {"Bild": "a.png", "Legende": "ein Hund", "text": "no"}
    (tmp_path / "captions.jsonl").write_text(json.dumps(line))
    source = build("folder", tmp_path, image_key="Bild", text_key="Legende")
    assert items(source) == ({"a.png": "ein Hund"}, {})


@pytest.mark.parametrize("content", [b"file_name,text\n\xff,x\n", b'file_name,text\n"a.png,x', b""])
def test_a_damaged_csv_costs_its_rows_alone(content: bytes, tmp_path: Path) -> None:
    pair(tmp_path, "b", "beside")
    (tmp_path / "metadata.csv").write_bytes(content)
    assert items(build("folder", tmp_path))[0] == {"b.png": "beside"}


def test_images_that_share_a_caption_are_named(tmp_path: Path) -> None:
    """A photograph and its mask may share one, for example."""
    pair(tmp_path, "a")
    (tmp_path / "a.jpg").write_bytes(encoded(np.zeros((9, 9, 3), np.uint8), "jpeg"))
    pair(tmp_path, "b")
    (tmp_path / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic")  # it could not be read anyway

    documents, left_out = items(build("folder", tmp_path))
    assert list(documents) == ["b.png"]
    shared = "several images share 'a.txt'; name them in captions.jsonl"
    assert left_out["a.jpg"] == left_out["a.png"] == shared
    assert left_out["b.HEIC"].startswith("is HEIC; JPEG, PNG")

    # A table of captions says which one is meant.
    (tmp_path / "captions.jsonl").write_text('{"file": "a.jpg", "caption": "the photograph"}')
    assert items(build("folder", tmp_path))[0] == {"a.jpg": "the photograph", "b.png": "words"}


def test_documents_are_those_of_a_folder_elsewhere(tmp_path: Path) -> None:
    """Ids do not depend on where a folder lies."""
    pair(tmp_path / "one", "a")
    (tmp_path / "two").symlink_to("one")
    for name in ("one", "two"):
        documents = build("folder", tmp_path / name).documents()
        assert [item.id for item in documents if isinstance(item, Document)] == ["a.png"]
