"""Reading a corpus holds squares of the tokenizer's size, however large the photographs are."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from corpora import CORPORA, encoded, write_lines, write_tar

from cm3leon.data.corpus import Corpus
from cm3leon.data.images import square
from cm3leon.data.source import squared
from cm3leon.experiment import ShardsConfig, SplitConfig
from cm3leon.objectives.packing import PackingConfig
from cm3leon.registry import PROTOCOLS, SOURCES, discover
from cm3leon.stages.documents import make_documents
from cm3leon.stages.sharing import batches
from cm3leon.stages.tokens import squared_items
from cm3leon.types import Document, ImageSegment

discover()

SIDE, COUNT = 700, 24
PHOTOGRAPH = SIDE * SIDE * 3
"""Bytes of a photograph's pixels. All 24 of them take 35 MB, four take 6 MB."""


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """The block may hold at most `limit` bytes more than were held before."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def photographs() -> Iterator[bytes]:
    for number in range(COUNT):
        grey_HW = np.add.outer(np.arange(SIDE), np.arange(SIDE)) * (number + 1) % 256
        yield encoded(np.repeat(grey_HW[..., None], 3, 2).astype(np.uint8), "jpeg")


def folder(place: Path) -> dict[str, Any]:
    for number, content in enumerate(photographs()):
        (place / f"{number:02d}.jpg").write_bytes(content)
        (place / f"{number:02d}.txt").write_text(f"photograph {number}")
    return {"name": "folder", "path": str(place)}


def tar(place: Path) -> dict[str, Any]:
    members: list[Any] = []
    for number, content in enumerate(photographs()):
        members += [(f"{number:02d}.jpg", content), (f"{number:02d}.txt", b"words")]
    return {"name": "webdataset", "path": str(write_tar(place / "a.tar", members))}


def page(place: Path) -> dict[str, Any]:
    """One document that holds all the photographs."""
    names = [{"image": f"{number}.jpg"} for number in range(COUNT)]
    for number, content in enumerate(photographs()):
        (place / f"{number}.jpg").write_bytes(content)
    path = write_lines(place / "a.jsonl", [{"segments": [{"text": "words"}, *names]}])
    return {"name": "jsonl", "path": str(path)}


def run_of(settings: dict[str, Any], size: int) -> Any:
    """The part of a run that the stages look at which read a corpus."""
    return SimpleNamespace(
        source=SOURCES.build(settings),
        image_tokenizer_shape=SimpleNamespace(image_size=size, grid=1),
        seq_len=512,
        shards=ShardsConfig(),
        experiment=SimpleNamespace(
            seed=0,
            split=SplitConfig(validation=0.1, held_out=0.1),
            packing=PackingConfig(),
            text_tokenizer=SimpleNamespace(max_word=64),
        ),
        reused=None,
    )


@pytest.mark.parametrize("name", [name for name in CORPORA if name != "text_jsonl"])
def test_items_are_squared_as_they_are_read(name: str, tmp_path: Path) -> None:
    source = SOURCES.build({"name": name, **CORPORA[name](tmp_path)})
    part = source.parts()[-1]
    for start in (0, 1):
        whole = list(source.read(part, start))[:40]
        for item, other in zip(whole, source.read_squared(part, start, size=5), strict=False):
            # What cannot be used passes as it is; the index of a part may begin anywhere.
            if not isinstance(item, Document):
                assert item == other
                continue

            assert isinstance(other, Document)
            assert (item.id, item.text, item.label) == (other.id, other.text, other.label)

            for image_HWC, square_HWC in zip(item.images, other.images, strict=True):
                assert np.array_equal(square(image_HWC, 5), square_HWC)
                assert np.array_equal(square(square_HWC, 5), square_HWC)


def test_squares_keep_their_roles() -> None:
    pixels_HWC = np.zeros((4, 6, 3), np.uint8)
    (segment,) = squared(Document("a", (ImageSegment(pixels_HWC, "condition"),)), 2).segments
    assert isinstance(segment, ImageSegment)
    assert (segment.role, segment.pixels_HWC.shape) == ("condition", (2, 2, 3))


@pytest.mark.parametrize("corpus", [folder, tar, page])
def test_photographs_are_not_held(corpus: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    run = run_of(corpus(tmp_path), 8)
    run.source.parts()
    with at_most(5 * PHOTOGRAPH):
        for part in run.source.parts():
            for batch in batches(squared_items(run, part)):
                assert all(isinstance(item, Document) for item in batch)


def test_the_stage_of_documents_holds_squares(tmp_path: Path) -> None:
    # Beside the photographs there is a file that is no image.
    (tmp_path / "corpus").mkdir()
    (tmp_path / "made").mkdir()
    settings = folder(tmp_path / "corpus")
    (tmp_path / "corpus" / "x.jpg").write_bytes(b"no image")
    (tmp_path / "corpus" / "x.txt").write_text("words")

    with at_most(5 * PHOTOGRAPH):
        make_documents(run_of(settings, 8), tmp_path / "made")

    corpus = Corpus.load(tmp_path / "made")
    assert corpus.captions == [f"photograph {number}" for number in range(COUNT)]

    # The squares are those of the whole photographs, and the broken one is noted.
    whole = SOURCES.build(settings).documents()
    for image_HWC, item in zip(corpus.images_BHWC, whole, strict=False):
        assert isinstance(item, Document)
        assert item.image is not None
        assert np.array_equal(image_HWC, square(item.image, 8))

    (skipped,) = (tmp_path / "made" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["file"] == "x.jpg"


def test_what_a_protocol_asks_about_is_held_as_squares(tmp_path: Path) -> None:
    listed: list[dict[str, Any]] = []
    for n in range(COUNT):
        sentences = [{"raw": f"the {n}"}]
        named = {"filename": f"{n:02d}.jpg", "imgid": n}
        listed.append({**named, "split": "test", "sentences": sentences})

    # A data set in Karpathy's format, whose captions are in a list beside the images.
    images = Path(folder(tmp_path)["path"])
    content = {"images": listed, "dataset": "flickr30k"}
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps(content))

    data = {
        "name": "karpathy",
        "path": str(tmp_path / "dataset_flickr30k.json"),
        "images": str(images),
        "split": "test",
    }

    protocol = PROTOCOLS.build({"name": "answers", "data": data, "measure": "captions"})
    with at_most(4 * PHOTOGRAPH):
        items = protocol.items_squared(16)
    assert [item.document.image.shape for item in items] == [(16, 16, 3)] * COUNT
