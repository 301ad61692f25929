"""Corpora on S3 are read like local ones, through throttling and lost connections.

Each mistake, and what S3 refuses, ends in one sentence that says nothing of the credentials.
"""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
from command_line import cm3leon
from corpora import CORPORA, encoded, picture, write_tar

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from s3 import (
    KEY_ID,
    SECRET,
    Fault,
    Gate,
    Handler,
    gate_to,
    moto_server,
    served,
    surroundings,
    upload,
)

from cm3leon.data import remote
from cm3leon.data.files import Files
from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES, discover
from cm3leon.types import Document, UserError

discover()


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with moto_server() as port:
        yield port


@pytest.fixture
def gate(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The user's S3, which makes no trouble yet. There is no waiting between tries."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    with gate_to(server) as made, surroundings(made, tmp_path):
        yield made


def build(name: str, **fields: Any) -> Any:
    return SOURCES.build({"name": name, **fields})


def contents(source: Any) -> list[tuple[Any, ...]]:
    """Everything that a source gives, in a form that can be compared."""
    found: list[tuple[Any, ...]] = []
    for item in source.documents():
        if isinstance(item, Skipped):
            found.append(tuple(item))
        else:
            images = [image.tobytes() for image in item.images]
            found.append((item.id, item.text, item.label, item.group, images))
    return found


def uploaded(name: str, place: Path, bucket: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a corpus on disk, and those of the same one in a bucket."""
    place.mkdir()
    settings = CORPORA[name](place)
    upload(place, f"s3://{bucket}/corpus")
    there = dict(settings)
    for key, value in settings.items():
        if isinstance(value, str):
            there[key] = value.replace(str(place), f"s3://{bucket}/corpus")
    return settings, there


def on_s3(name: str, place: Path, bucket: str) -> tuple[Any, Any]:
    """A corpus on disk, and the same one in a bucket."""
    settings, there = uploaded(name, place, bucket)
    return build(name, **settings), build(name, **there)


FORMATS = ("folder", "jsonl", "text_jsonl", "webdataset", "parquet", "coco")


@pytest.mark.parametrize("name", FORMATS)
def test_a_corpus_on_s3_is_read_as_a_local_one(name: str, gate: Gate, tmp_path: Path) -> None:
    local, there = on_s3(name, tmp_path / "corpus", name.replace("_", "-"))
    assert there.parts() == local.parts()
    expected = contents(local)
    assert any(len(item) == 5 for item in expected)
    assert contents(there) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_corpus_on_s3_is_another_one_once_an_object_changes(
    name: str, gate: Gate, tmp_path: Path
) -> None:
    place, bucket = tmp_path / "corpus", f"changed-{name.replace('_', '-')}"
    _, settings = uploaded(name, place, bucket)
    fingerprint = build(name, **settings).fingerprint()
    assert build(name, **settings).fingerprint() == fingerprint

    changed = min(path for path in place.rglob("*") if path.is_file())
    changed.write_bytes(changed.read_bytes() + b"\n")
    upload(place, f"s3://{bucket}/corpus")
    assert build(name, **settings).fingerprint() != fingerprint


@pytest.mark.parametrize("name", ["webdataset", "parquet", "jsonl"])
@pytest.mark.parametrize("kind", ["503", "500", "reset", "cut"])
def test_passing_trouble_is_waited_out(name: str, kind: str, gate: Gate, tmp_path: Path) -> None:
    bucket = f"trouble-{name}-{kind}"
    local, there = on_s3(name, tmp_path / "corpus", bucket)

    # Listing the bucket and reading each part fail three times each before they work.
    expected = contents(local)
    gate.faults = [Fault(kind, "list-type=2", 3)]
    gate.faults += [Fault(kind, f"GET /{bucket}/corpus/{part}", 3) for part in local.parts()]

    assert contents(there) == expected
    assert [fault.count for fault in gate.faults] == [0] * len(gate.faults)


@pytest.mark.parametrize(
    "text", ["list-type=2", "HEAD /lasting/corpus/a.tar", "GET /lasting/corpus/a.tar"]
)
def test_trouble_that_lasts_is_a_sentence_after_a_bounded_number_of_tries(
    text: str, gate: Gate, tmp_path: Path
) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", encoded(picture())), ("0.txt", b"one")])
    upload(tmp_path, "s3://lasting/corpus")
    gate.asked.clear()
    gate.faults = [Fault("503", text, 10_000)]
    reason = r"(.*reduce your request rate|Service Unavail)"
    message = rf"^data\.path: .*lasting/corpus.* cannot be reached \({reason}.*\)"
    with pytest.raises(UserError, match=message):
        contents(build("webdataset", path="s3://lasting/corpus"))
    assert gate.count(text) == remote.TRIES


@pytest.mark.parametrize(("kind", "count"), [("503", 4), ("500", 2)])
def test_s3fs_tries_within_each_try_and_botocore_does_not(
    kind: str, count: int, server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tries of s3fs, which are five for users, within each of two."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(remote, "TRIES", 2)
    write_tar(tmp_path / "a.tar", [("0.png", encoded(picture())), ("0.txt", b"one")])
    with gate_to(server) as gate, surroundings(gate, tmp_path, tries=2):
        upload(tmp_path, f"s3://within-{kind}/corpus")
        gate.asked.clear()
        gate.faults = [Fault(kind, "GET /within", 10_000)]
        with pytest.raises(UserError, match="cannot be reached"):
            contents(build("webdataset", path=f"s3://within-{kind}/corpus/a.tar"))
        assert gate.count("GET /within") == count


def test_waits_grow_and_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    tried = []

    def action() -> None:
        tried.append(1)
        raise OSError(16, "Please reduce your request rate.")

    with pytest.raises(OSError, match="reduce"):
        remote.persistently(action)
    assert len(tried) == remote.TRIES == len(waits) + 1
    # The waits double, and each is shortened by a random part of at most half.
    for number, wait in enumerate(waits):
        assert 2**number / 2 <= wait <= 2**number


def test_a_file_that_is_replaced_while_it_is_read_is_a_sentence(gate: Gate, tmp_path: Path) -> None:
    import s3fs

    system = s3fs.S3FileSystem(use_listings_cache=False)
    system.mkdir("replaced")
    system.pipe_file("replaced/a.bin", bytes(20 * 2**20))

    # The object is replaced when ten bytes are read: the rest of the new one is no part of it.
    with Files("s3://replaced/a.bin").open_raw("a.bin") as file:
        file.read(10)
        system.pipe_file("replaced/a.bin", bytes([1]) * 20 * 2**20)
        with pytest.raises(UserError, match=r"replaced/a\.bin cannot be reached"):
            file.read()


# ------------------------------------------------------------------------------------------- bounds


def test_of_a_large_object_only_what_is_needed_is_read_and_held(gate: Gate, tmp_path: Path) -> None:
    # Three documents, each followed by 30 MiB that no document has use for.
    members = []
    for number in range(3):
        members += [(f"{number}.png", encoded(picture(number))), (f"{number}.txt", b"one")]
        members.append((f"{number}.bin", bytes(30 * 2**20)))
    size = write_tar(tmp_path / "a.tar", members).stat().st_size

    upload(tmp_path, "s3://large")
    gate.asked.clear()

    tracemalloc.start()
    try:
        found = list(build("webdataset", path="s3://large/a.tar").documents())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert [type(item) for item in found] == [Document] * 3
    reads = [asked for asked in gate.asked if asked.line.startswith("GET /large/a.tar")]
    assert all("bytes=" in asked.line for asked in reads)

    # The gate runs in this process and holds an answer as well.
    assert max(asked.bytes for asked in reads) <= 2 * remote.BLOCK_BYTES
    assert sum(asked.bytes for asked in reads) < 0.7 * size
    assert peak < 6 * remote.BLOCK_BYTES


PAGE = 1000


class Many(Handler):
    """A stand-in for a bucket of many keys: pages of names as S3 sends them.

    Moto would take minutes to list as many.
    """

    keys = 0
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(404 if self.path.count("/") > 1 else 200, b"")

    def do_GET(self) -> None:
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        self.asked.append(self.path)

        start = int(query.get("continuation-token", 0))
        count = min(int(query.get("max-keys", PAGE)), PAGE, self.keys - start)

        entries = ""
        for number in range(start, start + count):
            entries += (
                f"<Contents><Key>corpus/{number:06d}.tar</Key><Size>1024</Size>"
                f"<ETag>&quot;{number:032x}&quot;</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                "<StorageClass>STANDARD</StorageClass></Contents>"
            )

        more = start + count < self.keys
        token = ""
        if more:
            token = f"<NextContinuationToken>{start + count}</NextContinuationToken>"
        content = (
            '<?xml version="1.0"?><ListBucketResult><Name>many</Name><Prefix>corpus/</Prefix>'
            f"<KeyCount>{count}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{entries}</ListBucketResult>"
        )
        self.answer(200, content.encode(), [("Content-Type", "application/xml")])


@pytest.mark.parametrize("keys", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_keys_are_listed_once_and_held_as_names(
    keys: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Many, "asked", [])
    monkeypatch.setattr(Many, "keys", keys)

    with served(Many) as port, surroundings(Gate(port), tmp_path):
        files = Files("s3://many/corpus")
        assert len(Many.asked) <= 2

        tracemalloc.start()
        try:
            listed = files.list((".tar",))
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert len(listed) == keys
    assert listed[0].name == "000000.tar"
    assert listed[-1] == (f"{keys - 1:06d}.tar", 1024, f'"{keys - 1:032x}"')
    # A page is asked for once. A key takes what its name takes, and some kilobytes while listing.
    assert len(Many.asked) <= keys // PAGE + 2
    assert held < 1000 * keys + 2**21
    assert peak < 8000 * keys + 2**22


# ---------------------------------------------------------------------------------------- sentences


def refused(*words: str) -> str:
    """Run a command that cannot have its corpus, and return the one line that it says about it.

    The credentials are neither in this line nor in anything else that it prints.
    """
    done = cm3leon(*words, check=False)
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("cm3leon: data.path: s3://")
    assert "Traceback" not in done.stderr
    for secret in (SECRET, KEY_ID):
        assert secret not in done.stdout + done.stderr
    return said


def test_a_missing_bucket_and_a_missing_folder_are_sentences(gate: Gate, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    upload(tmp_path, "s3://there")
    for path in ("s3://nowhere/corpus", "s3://nowhere", "s3://nowhere/*.tar"):
        said = refused("validate", f"data.path={path}")
        assert "does not exist: there is no bucket nowhere" in said
    assert "does not exist; give a file" in refused("validate", "data.path=s3://there/none")
    assert gate.count("nowhere") < 30


def test_a_forbidden_bucket_is_a_sentence(gate: Gate) -> None:
    gate.faults = [Fault("403", "", 10_000)]
    said = refused("validate", "data.path=s3://private/corpus")
    assert "s3://private/corpus is forbidden to these credentials" in said
    assert len(gate.asked) < 5


def test_missing_credentials_are_a_sentence(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    said = refused("validate", "data.path=s3://private/corpus")
    assert "cannot be opened without credentials (Unable to locate credentials)" in said
    assert "AWS_ACCESS_KEY_ID" in said
    assert not gate.asked


@pytest.mark.parametrize("kind", ["403", "expired"])
@pytest.mark.parametrize("name", ["webdataset", "parquet", "jsonl"])
def test_rights_that_end_in_the_middle_end_the_run_and_leave_nothing_out(
    name: str, kind: str, gate: Gate, tmp_path: Path
) -> None:
    bucket = f"ends-{name}-{kind}"
    _, there = on_s3(name, tmp_path / "corpus", bucket)

    # The last part is forbidden: what was read before it must not pass for the whole corpus.
    last = there.parts()[-1]
    gate.faults = [Fault(kind, f"GET /{bucket}/corpus/{last}", 10_000)]
    with pytest.raises(UserError, match=rf"{re.escape(last)}.* is forbidden to these credentials"):
        contents(there)


def test_images_behind_a_lost_connection_are_not_left_out(gate: Gate, tmp_path: Path) -> None:
    _, there = on_s3("jsonl", tmp_path / "corpus", "lost-images")
    gate.faults = [Fault("503", "GET /lost-images/corpus/0.png", 10_000)]
    with pytest.raises(UserError, match=r"0\.png cannot be reached"):
        contents(there)
