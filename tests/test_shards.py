"""Shards: written whole or not at all, with checksums, and mapped into memory instead of read.

Token shards are checked document by document as they are read: damage is found, never trained on.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3leon.data import shards as module
from cm3leon.data.corpus import split_of_key
from cm3leon.data.shards import (
    DamagedShard,
    ShardFolder,
    finish,
    make_missing,
    open_shard,
    read_plan,
    shard_path,
    write_plan,
    write_shard,
)
from cm3leon.data.token_shards import (
    Tokenizers,
    TokenShard,
    TokenShards,
    finish_tokens,
    write_token_shard,
)
from cm3leon.types import TokenDocument, TokenSegment, UserError

ROOT = Path(__file__).resolve().parent.parent
SMALL = Tokenizers(text="t", image="i", text_size=300, image_size=64, sentinels=8)
LARGE = replace(SMALL, text_size=70_000)

segments = st.lists(
    st.tuples(st.sampled_from(["text", "image"]), st.lists(st.integers(0, 371), max_size=6)).map(
        lambda pair: TokenSegment(pair[0], np.array(pair[1], np.int64))  # type: ignore[arg-type]
    ),
    max_size=4,
).map(tuple)
documents = st.lists(st.builds(TokenDocument, st.text(max_size=5), segments), max_size=6)


def same(a: TokenDocument, b: TokenDocument) -> bool:
    """Whether two documents have the same id, label, and ids in segments of the same kinds."""
    if (a.id, a.label, len(a.segments)) != (b.id, b.label, len(b.segments)):
        return False
    for x, y in zip(a.segments, b.segments, strict=True):
        if x.modality != y.modality or not np.array_equal(x.ids_T, y.ids_T):
            return False
    return True


def some(count: int, seed: int = 0) -> list[TokenDocument]:
    """Documents of a random caption and a random image, as ids."""
    rng = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        caption = TokenSegment("text", rng.integers(4, 300, rng.integers(1, 9)))
        image = TokenSegment("image", rng.integers(300, 364, 16))
        documents.append(TokenDocument(f"{seed}/{number}", (caption, image)))
    return documents


def write(folder: Path, *shards: list[TokenDocument], tokenizers: Tokenizers = SMALL) -> Path:
    """Make a finished folder of token shards, one for each list of documents."""
    write_plan(folder, {"tokenizers": asdict(tokenizers)})
    for number, shard in enumerate(shards):
        write_token_shard(shard_path(folder, number, len(shards)), shard, tokenizers)
    finish_tokens(folder, len(shards))
    return folder


# ------------------------------------------------------------------------------------- token shards


@given(st.lists(documents, min_size=1, max_size=3), st.sampled_from([SMALL, LARGE]))
@settings(max_examples=60, deadline=None)
def test_any_documents_come_back(shards: list[list[TokenDocument]], tokenizers: Tokenizers) -> None:
    written = [document for shard in shards for document in shard]
    with tempfile.TemporaryDirectory() as place:
        folder = write(Path(place) / "tokens", *shards, tokenizers=tokenizers)
        read = TokenShards(folder, tokenizers)
        assert len(read) == len(written)
        assert read.rows.tolist() == [len(shard) for shard in shards]
        assert all(same(a, b) for a, b in zip(read, written, strict=True))

        assert read.tokens == sum(len(s.ids_T) for document in written for s in document.segments)

        # Packed, the segments of a document are parted by a token each.
        lengths = []
        for document in written:
            parting = max(0, len(document.segments) - 1)
            lengths.append(sum(len(s.ids_T) for s in document.segments) + parting)
        assert read.longest == max(lengths, default=0)

        # Counts may be asked for in any order, here twice for each document.
        numbers = np.random.default_rng(0).permutation(2 * len(written)) // 2
        assert read.token_counts(numbers).tolist() == [lengths[number] for number in numbers]

        for outside in (-1, len(written)):
            with pytest.raises(IndexError):
                read.document(outside)
            with pytest.raises(IndexError):
                read.token_counts(np.append(numbers, outside))


def labelled(folder: Path) -> tuple[Path, list[TokenDocument], list[np.ndarray]]:
    """A folder of two shards; its documents have labels and three varied versions of their images.

    The first document has no label; the last one has neither a label nor an image to vary.
    """
    documents = some(5)
    for number in range(1, 5):
        documents[number] = replace(documents[number], label=number % 3)
    documents.append(TokenDocument("words", documents[0].segments[:1]))

    rng = np.random.default_rng(1)
    varied = [rng.integers(300, 364, (3, 16)) for _ in documents[:-1]]
    varied.append(np.zeros((3, 0), np.int64))

    write_plan(folder, {"tokenizers": asdict(SMALL), "versions": 3})
    for number, rows in enumerate((slice(0, 4), slice(4, 6))):
        path = shard_path(folder, number, 2)
        write_token_shard(path, documents[rows], SMALL, varied=varied[rows])
    finish_tokens(folder, 2)
    return folder, documents, varied


def test_labels_and_varied_versions_come_back(tmp_path: Path) -> None:
    folder, documents, varied = labelled(tmp_path / "tokens")
    read = TokenShards(folder)
    assert read.versions == 3
    assert [document.label for document in read] == [None, 1, 2, 0, 1, None]
    assert read.labels(np.array([3, 0, 1, 5])).tolist() == [0, -1, 1, -1]
    assert all(same(a, b) for a, b in zip(read, documents, strict=True))

    for number, (document, ids_VN) in enumerate(zip(documents, varied, strict=True)):
        for version in range(1, 4):
            text, *images = read.document(number, version).segments
            assert np.array_equal(text.ids_T, document.segments[0].ids_T)
            assert all(np.array_equal(image.ids_T, ids_VN[version - 1]) for image in images)


def test_each_version_is_drawn_equally_often(tmp_path: Path) -> None:
    folder, documents, varied = labelled(tmp_path / "tokens")
    read, rng = TokenShards(folder), np.random.default_rng(0)
    versions = [documents[1].segments[1].ids_T, *varied[1]]
    drawn = [read.drawn(1, rng).segments[1].ids_T for _ in range(400)]
    counts = []
    for version in versions:
        counts.append(sum(np.array_equal(ids_T, version) for ids_T in drawn))

    # Of 400 draws from four versions, 100 each are expected: 60 is 4.6 standard deviations less.
    assert sum(counts) == 400
    assert min(counts) > 60


def test_documents_without_versions_draw_nothing(tmp_path: Path) -> None:
    read, rng = TokenShards(write(tmp_path / "tokens", some(3))), np.random.default_rng(0)
    state = rng.bit_generator.state
    assert same(read.drawn(2, rng), some(3)[2])
    assert rng.bit_generator.state == state
    assert read.labels(np.array([0, 2])).tolist() == [-1, -1]


@pytest.mark.parametrize(("tokenizers", "size"), [(SMALL, 2), (LARGE, 4)])
def test_ids_take_16_bits_where_they_fit(tokenizers: Tokenizers, size: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "tokens", some(10), tokenizers=tokenizers)
    assert open_shard(shard_path(folder, 0, 1)).lists("ids")[0].itemsize == size
    largest = tokenizers.text_size + tokenizers.image_size + tokenizers.sentinels
    assert (largest <= 2**16) == (size == 2)


def test_the_papers_vocabulary_fits_16_bits() -> None:
    assert replace(SMALL, text_size=56_320, image_size=8_192, sentinels=1024).dtype == np.uint16


def test_an_id_beyond_the_vocabulary_is_not_cut_to_16_bits(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write(tmp_path, [TokenDocument("a", (TokenSegment("text", np.array([70_000])),))])
    assert not list(tmp_path.glob("*.arrow"))


def test_an_empty_shard_has_no_documents(tmp_path: Path) -> None:
    folder = write(tmp_path, [], some(2))
    assert len(TokenShard(open_shard(shard_path(folder, 0, 2)))) == 0
    assert TokenShards(folder).token_counts(np.zeros(0, np.int64)).tolist() == []


def test_counting_tokens_reads_no_ids(tmp_path: Path) -> None:
    folder = write(tmp_path, some(3))
    path = shard_path(folder, 0, 1)
    counts = TokenShards(folder).token_counts(np.arange(3))

    # Damage to an id is nothing that counting could see: the ids are not looked at.
    batch, content = layout(path)
    at = position(batch["ids"].values.buffers()[1], content)
    with flipped(path, 8 * at):
        read = TokenShards(folder)
        assert read.token_counts(np.arange(3)).tolist() == counts.tolist()
        with pytest.raises(DamagedShard, match="document 0 is damaged"):
            read.document(0)


def test_other_tokenizers_are_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = write(tmp_path / "tokens", some(3))
    with pytest.raises(UserError) as refusal:
        TokenShards(folder, replace(SMALL, image="other"))
    assert str(refusal.value) == (
        f"{folder} was made by other tokenizers: image is i there and other here; "
        "use that run's tokenizers, or make the shards again"
    )


def test_an_unfinished_folder_is_one_sentence(tmp_path: Path) -> None:
    write_plan(tmp_path, {"tokenizers": asdict(SMALL)})
    write_token_shard(shard_path(tmp_path, 0, 2), some(3), SMALL)
    with pytest.raises(
        UserError, match=r"is not a finished folder of shards: index\.json is missing"
    ):
        TokenShards(tmp_path)

    with pytest.raises(
        DamagedShard, match=r"shard-00001-of-00002\.arrow is missing; make the shard again"
    ):
        finish_tokens(tmp_path, 2)


def test_a_reader_travels_to_another_process(tmp_path: Path) -> None:
    read = TokenShards(write(tmp_path / "tokens", some(5), some(5, seed=1)))
    read.document(0)
    again = pickle.loads(pickle.dumps(read))
    assert all(same(a, b) for a, b in zip(again, read, strict=True))


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "most_open", lambda: 3)
    shards = [some(2, seed) for seed in range(8)]
    read = TokenShards(write(tmp_path / "tokens", *shards))
    for row in np.random.default_rng(0).integers(0, 16, 200).tolist():
        assert same(read.document(row), shards[row // 2][row % 2])
        assert len(read._shards._open) <= 3


def test_shards_that_stay_mapped_are_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in any order open 8 shards 8 times if 8 may stay mapped, and each time if only 3 may."""
    folder = write(tmp_path / "tokens", *(some(2, seed) for seed in range(8)))
    opened = []

    def open_and_count(path: Path, **options: Any) -> Any:
        opened.append(path)
        return open_shard(path, **options)

    monkeypatch.setattr(module, "open_shard", open_and_count)

    # One row of each shard after the other, ten times.
    rows = np.tile(np.arange(0, 16, 2), 10)
    for most, expected in ((8, 8), (3, 80)):
        monkeypatch.setattr(module, "most_open", lambda most=most: most)
        opened.clear()
        read = TokenShards(folder)
        for row in rows.tolist():
            read.document(row)

        assert len(opened) == expected
        assert read._shards.all_stay_mapped == (most == 8)


def test_any_arrow_reader_opens_a_shard(tmp_path: Path) -> None:
    folder = write(tmp_path / "tokens", some(4))
    table = pa.ipc.open_file(shard_path(folder, 0, 1)).read_all()
    assert table.column_names == ["id", "ids", "lengths", "image", "crc"]
    assert table["id"].to_pylist() == [f"0/{number}" for number in range(4)]


@given(st.lists(st.text(max_size=8), unique=True, min_size=1), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_split_depends_on_the_id_alone(
    ids: list[str], validation: float, held_out: float
) -> None:
    for id_ in ids:
        split = split_of_key(id_, validation=validation, held_out=held_out)
        assert split == split_of_key(id_, validation=validation, held_out=held_out)
        assert split != "validation" or validation > 0
        assert split != "held_out" or held_out > 0


def test_splits_have_their_shares() -> None:
    ids = [f"document {number}" for number in range(20_000)]
    splits = [split_of_key(id_, validation=0.1, held_out=0.2) for id_ in ids]
    for split, share in (("train", 0.7), ("validation", 0.1), ("held_out", 0.2)):
        # Four standard deviations of a share that is counted in this many draws.
        tolerance = 4 * (share * (1 - share) / len(ids)) ** 0.5
        assert abs(splits.count(split) / len(ids) - share) < tolerance  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- damage


def damage_found(act: Callable[[], None], path: Path) -> bool:
    """Whether `act` raises DamagedShard and names the file; what else it raises is passed on."""
    try:
        act()
    except DamagedShard as error:
        if path.name not in str(error):
            raise
        return True
    return False


def buffers_of(batch: pa.RecordBatch) -> list[pa.Buffer]:
    """All buffers of a batch's columns; a column without nulls has no bitmap of them."""
    buffers = []
    for column in batch.columns:
        buffers += [buffer for buffer in column.buffers() if buffer is not None]
    return buffers


def layout(path: Path) -> tuple[pa.RecordBatch, pa.Buffer]:
    """The batch of a shard, and the bytes of the file, which the batch's buffers are views of."""
    content = pa.py_buffer(path.read_bytes())
    return pa.ipc.open_file(content).get_batch(0), content


def position(buffer: pa.Buffer, content: pa.Buffer) -> int:
    """The offset of a buffer in the file, in bytes."""
    return int(buffer.address - content.address)


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """Change one bit of the file until the block ends."""
    with path.open("r+b", buffering=0) as file:

        def flip() -> None:
            file.seek(bit // 8)
            byte = file.read(1)[0]
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))

        flip()
        yield
        flip()


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """What was not written is never read: the checksums of shard and documents prevent it."""
    written = [replace(document, label=number) for number, document in enumerate(some(40))]
    varied = [np.full((2, 16), 300 + number) for number in range(40)]
    folder = tmp_path / "tokens"
    write_plan(folder, {"tokenizers": asdict(SMALL), "versions": 2})
    path = shard_path(folder, 0, 1)
    write_token_shard(path, written, SMALL, varied=varied)
    finish_tokens(folder, 1)

    def read_shard() -> None:
        assert all(map(same, map(TokenShard(open_shard(path)).document, range(40)), written))

    def read_documents() -> None:
        assert all(map(same, TokenShards(path.parent), written))

    batch, content = layout(path)
    is_value, is_read = np.zeros((2, content.size), bool)

    # Where the lists of `image` begin is not read: `lengths`, which is, says the same.
    image_at = batch["image"].buffers()[1]
    for buffer in buffers_of(batch):
        begin = position(buffer, content)
        is_value[begin : begin + buffer.size] = True
        is_read[begin : begin + buffer.size] = buffer.address != image_at.address

    bits = np.random.default_rng(0).choice(content.size * 8, 800, replace=False)
    found = np.zeros((2, len(bits)), bool)
    for number, bit in enumerate(bits.tolist()):
        with flipped(path, bit):
            found[:, number] = damage_found(read_shard, path), damage_found(read_documents, path)

    # The shard's checksum finds every bit of a value, a document's those that it is read from;
    # and nothing that a document's checksum finds escapes the shard's.
    assert is_read[bits // 8].sum() > 300
    assert found[0, is_value[bits // 8]].all()
    assert found[1, is_read[bits // 8]].all()
    assert not (found[1] & ~found[0]).any()


def test_every_flipped_bit_of_the_layout_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """The batch's head says where the buffers lie; checksums of documents find its bits alone."""
    written = some(3)
    path = tmp_path / "a.arrow"
    write_token_shard(path, written, SMALL)

    def read() -> None:
        shard = TokenShard(open_shard(path, verify=False))
        assert all(map(same, map(shard.document, range(3)), written))

    # The head lies behind the magic bytes, the schema's length and the schema, and ends where the
    # first buffer begins.
    batch, content = layout(path)
    begin = 8 + 8 + int(np.frombuffer(content, np.int32, 1, 12)[0])
    end = min(position(buffer, content) for buffer in buffers_of(batch))
    assert 200 < end - begin < 1000

    found = 0
    for bit in range(8 * begin, 8 * end):
        with flipped(path, bit):
            found += damage_found(read, path)
    assert found > 1000


@pytest.mark.parametrize("size", [0, 10, 500, -1, -9])
def test_a_cut_shard_is_named(size: int, tmp_path: Path) -> None:
    path = shard_path(write(tmp_path / "tokens", some(40)), 0, 1)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedShard, match=f"{path.name} cannot be read as a shard"):
        open_shard(path)


def test_what_is_no_shard_is_named(tmp_path: Path) -> None:
    for number, content in enumerate((b"PAR1", b"\0" * 5000, os.urandom(5000))):
        path = tmp_path / f"{number}.arrow"
        path.write_bytes(content)
        with pytest.raises(DamagedShard, match="cannot be read as a shard"):
            open_shard(path)

    # A file of Arrow that was not written as a shard.
    plain = tmp_path / "plain.arrow"
    with (
        pa.OSFile(str(plain), "wb") as file,
        pa.ipc.new_file(file, pa.schema([("a", pa.int64())])) as writer,
    ):
        writer.write_batch(pa.record_batch({"a": [1, 2]}))
    with pytest.raises(DamagedShard, match="cannot be read as a shard"):
        open_shard(plain)

    # The same without a batch.
    with pa.OSFile(str(plain), "wb") as file, pa.ipc.new_file(file, pa.schema([("a", pa.int64())])):
        pass
    with pytest.raises(
        DamagedShard, match=r"plain\.arrow cannot be read as a shard \(Batch number 0 out of range"
    ):
        open_shard(plain)


def test_a_header_that_somebody_changed_is_named(tmp_path: Path) -> None:
    """A changed header is checked even where its checksums were computed anew."""
    path = tmp_path / "a.arrow"
    batch = pa.record_batch({"a": pa.array([1, 2])})
    for header, columns, sentence in (
        ('{"tokenizers": "other"}', [["a", "int64"]], None),
        ("no json", [["a", "int64"]], "cannot be read as a shard"),
        ("{}", [["a", "uint64"]], "is damaged: its checksum does not match"),
    ):
        # The frame's checksum is over header, columns and rows; the other over frame and values.
        frame = hashlib.sha256(json.dumps([header, columns, 2]).encode()).hexdigest()
        values = hashlib.sha256(frame.encode() + bytes(batch["a"].buffers()[1])).hexdigest()
        metadata = {
            "cm3leon.header": header,
            "cm3leon.frame_sha256": frame,
            "cm3leon.sha256": values,
        }

        schema = batch.schema.with_metadata(metadata)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(batch.replace_schema_metadata(metadata))

        if sentence is None:
            assert open_shard(path).header == json.loads(header)
        else:
            with pytest.raises(DamagedShard, match=rf"a\.arrow {sentence}"):
                open_shard(path)


def test_what_the_system_refuses_is_not_called_damage(tmp_path: Path) -> None:
    """The file is whole, though it cannot be opened: no message may ask for it to be deleted."""
    path = tmp_path / "a.arrow"
    write_shard(path, columns(), {})

    # With a limit of 3, only standard input, output and errors may be open.
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            open_shard(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert len(open_shard(path)) == 30


def test_a_shard_deleted_between_epochs_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "tokens", some(5), some(5, seed=1), some(5, seed=2))
    shard_path(folder, 1, 3).unlink()
    read = TokenShards(folder)
    assert read.document(0).id == "0/0"
    assert read.document(14).id == "2/4"
    with pytest.raises(
        DamagedShard, match=r"shard-00001-of-00003\.arrow is missing; make the shard again"
    ):
        read.document(7)


def test_a_shard_of_another_folder_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "tokens", some(5), some(5, seed=1))
    write(tmp_path / "longer", some(5), some(6, seed=2))
    write(tmp_path / "other", some(5), some(5, seed=2), tokenizers=replace(SMALL, text="other"))
    for name, sentence in (
        ("longer", r"has 6 rows, index\.json says 5"),
        ("other", "was made by other tokenizers than"),
    ):
        shard_path(tmp_path / name, 1, 2).replace(shard_path(folder, 1, 2))
        with pytest.raises(DamagedShard, match=rf"shard-00001-of-00002\.arrow {sentence}"):
            TokenShards(folder).document(7)


# ------------------------------------------------------------------------------------ the container


def columns(seed: int = 0, rows: int = 30) -> dict[str, pa.Array]:
    """Columns of every kind that shards are made of, with random values."""
    rng = np.random.default_rng(seed)
    return {
        "number": pa.array(rng.integers(0, 9, rows)),
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(rng.random(rows * 3).astype(np.float16)), 3
        ),
        "list": pa.array([list(range(n % 4)) for n in range(rows)], pa.large_list(pa.int64())),
        "name": pa.array([f"ü{n}" for n in range(rows)]),
    }


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_columns_of_every_kind(rows: int, tmp_path: Path) -> None:
    written = columns(rows=rows)
    write_shard(tmp_path / "a.arrow", written, {"made by": "test"})
    shard = open_shard(tmp_path / "a.arrow")
    assert (len(shard), shard.header) == (rows, {"made by": "test"})

    assert np.array_equal(shard.numbers("number"), written["number"].to_numpy())
    assert np.array_equal(
        shard.numbers("vector"), np.array(written["vector"].to_pylist()).reshape(rows, 3)
    )

    values, ends = shard.lists("list")
    lists = [values[begin:end].tolist() for begin, end in itertools.pairwise(ends)]
    assert lists == written["list"].to_pylist()
    assert shard.strings("name") == written["name"].to_pylist()


whole_columns = {
    "numbers": pa.array(np.arange(40)),
    "halves": pa.array(np.arange(40).astype(np.float16)),
    "bits": pa.array([number % 3 == 0 for number in range(40)]),
    "with nulls": pa.array([None if number % 7 == 0 else number for number in range(40)]),
    "vectors": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(120)), 3),
    "lists": pa.array([list(range(number % 4)) for number in range(40)], pa.large_list(pa.int32())),
    "small lists": pa.array(
        [list(range(number % 4)) for number in range(40)], pa.list_(pa.uint8())
    ),
    "strings": pa.array([f"ü{number}" * (number % 3) for number in range(40)], pa.large_string()),
}


@given(st.sampled_from(sorted(whole_columns)), st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_a_slice_of_an_array_comes_back(name: str, begin: int, length: int) -> None:
    part = whole_columns[name].slice(begin, length)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "a.arrow"
        write_shard(path, {"x": part}, {})
        shard = open_shard(path)
        assert shard.columns["x"].to_pylist() == part.to_pylist()
        assert shard.columns["x"].offset == 0


def test_a_bitmap_that_says_that_nothing_is_null_is_left_out(tmp_path: Path) -> None:
    none_null = [pa.py_buffer(b"\x0f"), pa.py_buffer(np.arange(4).tobytes())]
    write_shard(tmp_path / "a.arrow", {"x": pa.Array.from_buffers(pa.int64(), 4, none_null)}, {})
    assert open_shard(tmp_path / "a.arrow").numbers("x").tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="the system does not list open files there"
)
def test_an_open_shard_holds_no_open_file(tmp_path: Path) -> None:
    for number in range(20):
        write_shard(shard_path(tmp_path, number, 20), columns(number), {})
    before = len(os.listdir("/proc/self/fd"))
    shards = [open_shard(shard_path(tmp_path, number, 20)) for number in range(20)]
    assert len(os.listdir("/proc/self/fd")) < before + 10  # Arrow opens some of its own
    assert all(len(shard) == 30 for shard in shards)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says how files are mapped")
def test_rows_here_and_there_are_read_without_what_is_around_them(tmp_path: Path) -> None:
    def flags() -> list[bool]:
        """Whether Linux reads nothing ahead (`rr`), for each map of the shard."""
        maps = Path("/proc/self/smaps").read_text().split(str(path))[1:]
        return [" rr " in one.split("VmFlags:")[1].splitlines()[0] + " " for one in maps]

    write_plan(tmp_path, {})
    path = shard_path(tmp_path, 0, 1)
    write_shard(path, {"x": pa.array(np.arange(5))}, {})
    finish(tmp_path, 1)

    # Rows here and there are read through one map, whole shards through another one.
    folder = ShardFolder(tmp_path, lambda shard: shard.numbers("x"), verify=True, scattered=True)

    here_and_there = folder.shard(0)
    assert flags() == [True]
    whole = folder.whole(0)
    assert sorted(flags()) == [False, True]
    assert here_and_there.tolist() == whole.tolist() == [0, 1, 2, 3, 4]


def test_numbers_are_views_of_the_file_and_cannot_be_written(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.arrow", columns(), {})
    numbers = open_shard(tmp_path / "a.arrow").numbers("number")
    assert not numbers.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        numbers[0] = 1


def test_the_same_content_makes_the_same_file(tmp_path: Path) -> None:
    for name, header in (("a", {"b": 1, "a": 2}), ("b", {"a": 2, "b": 1})):
        write_shard(tmp_path / name, columns(), header)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


WRITER = """
import os, sys, time
from pathlib import Path
import numpy as np, pyarrow as pa
from cm3leon.data import shards

folder, how = Path(sys.argv[1]), sys.argv[2]
if how == "slow":
    replace = os.replace
    def wait(*paths):
        print("written", flush=True)
        time.sleep(60)
        replace(*paths)
    os.replace = wait
if how == "both":  # neither puts a shard in place before the other has written it too
    replace = os.replace
    def wait(partial, path):
        while not path.exists() and len(list(folder.glob(f".{path.name}.*.partial"))) < 2:
            time.sleep(0.001)
        replace(partial, path)
    os.replace = wait
def make(number):
    numbers = np.random.default_rng(number).integers(0, 9, 200_000)
    shards.write_shard(shards.shard_path(folder, number, 4), {"x": pa.array(numbers)}, {})
shards.write_plan(folder, {"made from": "numbers"})
made = [number for number, new in shards.make_missing(folder, 4, make) if new]
print(made, flush=True)
"""


def writer(folder: Path, how: str, **options: Any) -> subprocess.Popen[str]:
    """Start a process that makes a folder of four shards.

    Args:
        how: "fast"; "slow", which waits before it gives a shard its name; or "both", which waits
            until another process has written the shard too.
        options: of `subprocess.Popen`.
    """
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


def visible(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))


def test_a_killed_writer_leaves_no_shard_and_the_next_one_makes_what_is_missing(
    tmp_path: Path,
) -> None:
    for number in (0, 2):
        write_shard(shard_path(tmp_path, number, 4), {"x": pa.array([number])}, {})

    process = writer(tmp_path, "slow")
    assert process.stdout is not None
    while process.stdout.readline().strip() != "written":
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()

    assert visible(tmp_path) == [
        "plan.json",
        "shard-00000-of-00004.arrow",
        "shard-00002-of-00004.arrow",
    ]
    assert [file for file in tmp_path.iterdir() if file.name.endswith(".partial")]

    # The next writer makes what is missing, and clears away what the killed one left.
    said, errors = writer(tmp_path, "fast").communicate(timeout=60)
    assert said.strip() == "[1, 3]", errors
    assert len(open_shard(shard_path(tmp_path, 1, 4))) == 200_000
    assert len(open_shard(shard_path(tmp_path, 2, 4))) == 1
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".partial")]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """The limit on the size of files stands for the end of the disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = writer(tmp_path, "fast", preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "OSError" in errors.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("full_at", ["fsync", "replace", "link"])
def test_what_a_full_disk_refuses_leaves_no_file(
    full_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, full_at, full)

    def write_either() -> None:
        if full_at == "link":
            write_plan(tmp_path, {"made from": "numbers"})
        else:
            write_shard(shard_path(tmp_path, 0, 1), columns(), {})

    with pytest.raises(OSError, match="No space left on device") as refusal:
        write_either()
    assert refusal.value.errno == errno.ENOSPC
    assert not isinstance(refusal.value, UserError)
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_folder_make_the_same_as_one(tmp_path: Path) -> None:
    both = [writer(tmp_path / "both", "both") for _ in range(2)]
    try:
        results = [process.communicate(timeout=60) for process in both]
    finally:
        for process in both:
            process.kill()

    assert [said.strip() for said, _ in results] == ["[0, 1, 2, 3]"] * 2, results
    assert writer(tmp_path / "one", "fast").communicate(timeout=60)[0].strip() == "[0, 1, 2, 3]"

    assert visible(tmp_path / "both") == visible(tmp_path / "one")
    for name in visible(tmp_path / "one"):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert len(list((tmp_path / "both").iterdir())) == 5  # the plan and four shards


def test_a_folder_belongs_to_its_first_plan(tmp_path: Path) -> None:
    write_plan(tmp_path, {"tokenizers": {"text": "a"}, "parts": 3})
    write_plan(tmp_path, {"parts": 3, "tokenizers": {"text": "a"}})

    # The order of keys does not make another plan; another value does.
    with pytest.raises(UserError) as refusal:
        write_plan(tmp_path, {"tokenizers": {"text": "b"}, "parts": 3})
    assert str(refusal.value) == (
        f"{tmp_path} was begun with another tokenizers: "
        '{"text": "a"} instead of {"text": "b"}; '
        "choose another folder, or delete this one"
    )
    assert read_plan(tmp_path) == {"tokenizers": {"text": "a"}, "parts": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]

    with pytest.raises(
        UserError, match=r"holds no shards: its plan\.json is missing or unreadable"
    ):
        read_plan(tmp_path / "none")


@given(st.integers(0, 20), st.integers(1, 6), st.sets(st.integers(0, 19)))
@settings(max_examples=30, deadline=None)
def test_workers_make_every_missing_shard_once(count: int, workers: int, there: set[int]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number in there & set(range(count)):
            shard_path(folder, number, count).touch()

        made: list[int] = []
        seen = []
        for k in range(workers):
            for number, new in make_missing(folder, count, made.append, part=(k, workers)):
                seen.append(number)
                assert new == (number not in there)

        assert sorted(seen) == list(range(count))
        assert sorted(made) == sorted(set(range(count)) - there)


def test_partial_files_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path) -> None:
    # The file's name has the number of the process that writes it, here this one's.
    path = shard_path(tmp_path, 0, 1)
    mine = module.partial_name(path)

    # A process that has ended leaves a shard and a plan behind.
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    of_the_dead = mine.with_name(mine.name.replace(f"-{os.getpid()}.", f"-{dead.stdout.strip()}."))
    plan_of_the_dead = of_the_dead.with_name(of_the_dead.name.replace(path.name, "plan.json"))

    # Whether a process of another machine lives is not known: its file stays for a day.
    elsewhere = tmp_path / f".{path.name}.otherhost-1.partial"
    old = tmp_path / f".{path.name}.otherhost-2.partial"
    gone_meanwhile = tmp_path / f".{path.name}.otherhost-3.partial"
    for file in (mine, of_the_dead, elsewhere, old, plan_of_the_dead):
        file.touch()
    os.utime(old, (0, time.time() - 3 * 86_400))

    # A dangling link looks like a file that its writer renames after the folder was listed.
    gone_meanwhile.symlink_to("nowhere")

    list(make_missing(tmp_path, 0, lambda number: None))
    kept = (mine, elsewhere, gone_meanwhile)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in kept)


def test_rows_of_all_shards_are_numbered_through(tmp_path: Path) -> None:
    for number, rows in enumerate((3, 0, 5)):
        numbers = pa.array(np.arange(rows) + 10 * number)
        write_shard(shard_path(tmp_path, number, 3), {"x": numbers}, {})
    finish(tmp_path, 3, lambda shard: {"sum": int(shard.numbers("x").sum())})
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "rows": [3, 0, 5],
        "sum": [3, 0, 110],
    }

    # The second shard is empty: what follows row 2 is in the third one.
    folder = ShardFolder(tmp_path, lambda shard: shard.numbers("x"))
    assert len(folder) == 8
    located = [folder.locate(row) for row in range(8)]
    assert located == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)]
    assert [folder.first(number) for number in range(3)] == [0, 3, 3]
    values = [int(folder.shard(number)[row]) for number, row in located]
    assert values == [0, 1, 2, 20, 21, 22, 23, 24]
