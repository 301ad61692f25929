"""Decoded images that are kept on disk: what comes back, what has no room, and what is damaged."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cm3leon.data import kept_images
from cm3leon.data.kept_images import keeping, kept_documents, kept_file
from cm3leon.data.shards import DamagedShard
from cm3leon.types import Document, ImageSegment, TextSegment

SIDE = 8


def documents(count: int) -> list[Document]:
    """Documents of texts and images: every third has none, every fourth of the others two."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        images = 2 if number % 4 == 0 else 1
        if number % 3 == 0:
            images = 0
        pixels = rng.integers(0, 256, (images, SIDE, SIDE, 3), np.uint8)
        segments = (TextSegment(f"thing {number} ", joined=False), TextSegment("ä"))
        made.append(Document(f"id {number}", (*segments, *map(ImageSegment, pixels))))
    return made


def keep(path: Path, given: list[Document], limit: int = 10**6) -> None:
    with keeping(path, size=SIDE, limit=limit) as write:
        for start in range(0, len(given), 5):
            write(given[start : start + 5])


def test_texts_and_first_images_come_back_in_order(tmp_path: Path) -> None:
    path, given = kept_file(tmp_path / "decoded", 3, 7), documents(12)
    keep(path, given)
    assert path.name == "part-00003-of-00007.arrows"

    found = list(kept_documents(path) or ())
    assert [each.id for each in found] == [each.id for each in given]
    assert [each.text for each in found] == [each.text for each in given]
    for ours, original in zip(found, given, strict=True):
        if original.image is None:
            assert ours.image is None
        else:
            assert np.array_equal(ours.image, original.image)


def test_a_part_without_documents_is_kept_too(tmp_path: Path) -> None:
    path = tmp_path / "empty.arrows"
    keep(path, [])
    assert list(kept_documents(path) or [None]) == []
    assert kept_documents(tmp_path / "missing.arrows") is None


@pytest.mark.parametrize("limit", [0, 1500])
def test_what_has_no_room_leaves_no_file(limit: int, tmp_path: Path) -> None:
    keep(tmp_path / "part.arrows", documents(40), limit)
    assert list(tmp_path.iterdir()) == []


def test_what_stops_halfway_leaves_no_file(tmp_path: Path) -> None:
    def stop() -> None:
        with keeping(tmp_path / "part.arrows", size=SIDE, limit=10**6) as write:
            write(documents(5))
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        stop()
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_and_a_cut_are_noticed(tmp_path: Path) -> None:
    path, given = tmp_path / "part.arrows", documents(12)
    keep(path, given)
    content = path.read_bytes()

    # One bit of a pixel of the first image.
    image = next(each.image for each in given if each.image is not None)
    at = content.index(image.tobytes()) + 17
    flipped = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
    for damaged in (flipped, content[: len(content) // 2], b"no arrow"):
        path.write_bytes(damaged)
        with pytest.raises(DamagedShard, match=r"part.arrows is damaged; delete it"):
            list(kept_documents(path) or ())


def test_a_file_cut_between_two_batches_is_noticed(tmp_path: Path) -> None:
    """Whole batches are left, which read like a shorter part."""
    path, given = tmp_path / "part.arrows", documents(12)
    keep(path, given)
    content = path.read_bytes()
    keep(tmp_path / "short.arrows", given[:5])
    ending = len((tmp_path / "short.arrows").read_bytes())

    # The stream of the first five documents, without its last, empty batch and the mark after it.
    for end in range(ending - 400, ending):
        path.write_bytes(content[:end])
        with pytest.raises(DamagedShard):
            list(kept_documents(path) or ())


def test_a_file_that_is_open_may_be_deleted(tmp_path: Path) -> None:
    path = tmp_path / "part.arrows"
    keep(path, documents(12))
    found = kept_documents(path)
    assert found is not None
    path.unlink()
    assert len(list(found)) == 12


def test_a_disk_that_is_full_at_the_very_end_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = kept_images._batch

    def full_at_the_end(given: Sequence[Document], schema: Any) -> Any:
        if not given:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(given, schema)

    monkeypatch.setattr(kept_images, "_batch", full_at_the_end)
    keep(tmp_path / "part.arrows", documents(12))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", range(3000, 6000, 250))
def test_a_file_is_never_longer_than_its_limit(limit: int, tmp_path: Path) -> None:
    path = tmp_path / "part.arrows"
    keep(path, documents(12), limit)
    assert not path.is_file() or path.stat().st_size <= limit
