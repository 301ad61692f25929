"""Images of a corpus as an endless stream: what is drawn, how it is cut, and exact resuming."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3leon.data.image_stream import ImageStream, random_square
from cm3leon.data.source import Skipped, Source
from cm3leon.objectives.block_stream import merge_states
from cm3leon.types import Document, ImageSegment, TextSegment, UserError


def document(number: int, images: int = 1) -> Document:
    """A caption and images of one colour each: red says which document, green which image of it."""
    segments = []
    for k in range(images):
        segments.append(ImageSegment(np.full((5, 7, 3), [number, k, 99], np.uint8)))
    return Document(str(number), (TextSegment("a"), *segments))


class Numbered(Source):
    """Parts of numbered documents; every fifth item is broken, and every seventh has no image."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def parts(self) -> list[str]:
        return [str(number) for number in range(len(self.sizes))]

    def read(self, part: str, start: int = 0) -> Iterator[Document | Skipped]:
        first = sum(self.sizes[: int(part)])
        for number in range(first + start, first + self.sizes[int(part)]):
            if number % 5 == 4:
                yield Skipped(str(number), "broken")
            else:
                yield document(number, number % 7 and 1 + number % 3)

    def fingerprint(self) -> str:
        return ""


def stream(*sizes: int, **settings: Any) -> ImageStream:
    defaults: dict[str, Any] = {
        "keep": lambda document: document.id != "2",
        "size": 4,
        "batch_size": 3,
        "seed": 5,
        "lanes": 2,
    }
    return ImageStream(Numbered(*sizes), **{**defaults, **settings})


def drawn(batch_BHWC: np.ndarray) -> list[int]:
    """Numbers of the documents whose images a batch holds."""
    return batch_BHWC[:, 0, 0, 0].tolist()


def test_every_image_to_train_on_comes_once_in_an_epoch() -> None:
    usable = [n for n in range(40) if n % 5 != 4 and n % 7 and n != 2]
    images = stream(10, 10, 10, 10, lanes=1, batch_size=len(usable))
    for _ in range(4):
        batch_BHWC = images.next()
        assert batch_BHWC.shape == (len(usable), 4, 4, 3)
        assert batch_BHWC.dtype == np.uint8
        assert sorted(drawn(batch_BHWC)) == usable


def test_parts_of_any_length_come_equally_often_in_the_end() -> None:
    counts: Counter[int] = Counter()
    images = stream(10, 3, 0, 17, lanes=3, batch_size=6)
    for _ in range(600):
        counts.update(drawn(images.next()))
    usable = [n for n in range(30) if n % 5 != 4 and n % 7 and n != 2]
    assert sorted(counts) == usable
    assert max(counts.values()) < 1.3 * min(counts.values())


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_ranks_have_the_batches_of_one(
    sizes: list[int], ranks: int, lanes: int, before: int
) -> None:
    """Each rank has its share of a batch, also where it resumes what other ranks left."""
    settings = {"batch_size": 12, "lanes": lanes}
    one = stream(8, *sizes, **settings)
    shares = [stream(8, *sizes, **settings, share=(rank, ranks)) for rank in range(ranks)]
    for _ in range(before):
        expected = one.next()
        assert np.array_equal(np.concatenate([share.next() for share in shares]), expected)

    merged = json.loads(json.dumps(merge_states([share.state_dict() for share in shares])))
    assert merged == one.state_dict()

    # Three ranks, then one, take up the state.
    for count in (3, 1):
        others = [stream(8, *sizes, **settings, share=(rank, count)) for rank in range(count)]
        for other in others:
            other.load_state_dict(merged)
        again = stream(8, *sizes, **settings)
        again.load_state_dict(one.state_dict())
        for _ in range(2):
            found = np.concatenate([other.next() for other in others])
            assert np.array_equal(found, again.next())


def test_a_rank_reads_its_own_parts_alone() -> None:
    read: list[str] = []
    for rank in range(4):
        images = stream(*[9] * 8, lanes=8, batch_size=16, share=(rank, 4))
        parts: set[str] = set()
        recording(images._source, parts)
        images.next()
        read += parts

    # All eight parts, and none by two ranks.
    assert sorted(read) == [str(part) for part in range(8)]


def recording(source: Source, parts: set[str]) -> None:
    """Let a source add the parts that it reads to a set."""
    reading = source.read

    def read(part: str, start: int = 0) -> Iterator[Document | Skipped]:
        parts.add(part)
        return reading(part, start)

    source.read = read  # type: ignore[method-assign]


def test_what_cannot_go_on_is_a_sentence() -> None:
    with pytest.raises(UserError, match="batch_size is 3; it must be a multiple of the 2 ranks"):
        stream(9, share=(0, 2))
    older = {"drawn": 6, "turn": 9, "next_part": 2, "lanes": [[0, 4], [1, 5]]}
    with pytest.raises(UserError, match="checkpoints are of an earlier version"):
        stream(9).load_state_dict(older)


def test_a_batch_has_images_of_many_parts() -> None:
    batch = drawn(stream(50, 50, 50, 50, lanes=4, batch_size=12).next())
    assert len({number // 50 for number in batch}) == 4


def test_all_images_of_a_page_are_drawn_at_times() -> None:
    pages = stream(12, keep=lambda document: document.id == "11")  # three images
    seen = {int(image_HWC[0, 0, 1]) for _ in range(10) for image_HWC in pages.next()}
    assert seen == {0, 1, 2}


@given(
    st.integers(0, 9),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(1, 7),
    st.integers(1, 4),
)
def test_a_stream_goes_on_exactly(
    before: int, sizes: list[int], batch_size: int, lanes: int
) -> None:
    settings = {"batch_size": batch_size, "lanes": lanes}
    one = stream(8, *sizes, **settings)
    for _ in range(before):
        one.next()
    state = json.loads(json.dumps(one.state_dict()))

    other = stream(8, *sizes, **settings)
    other.next()  # wherever it was
    other.load_state_dict(state)

    for _ in range(5):
        assert np.array_equal(one.next(), other.next())
        assert one.state_dict() == other.state_dict()


def test_seeds_differ() -> None:
    assert not np.array_equal(stream(40, 40, 40, seed=1).next(), stream(40, 40, 40, seed=2).next())


@pytest.mark.parametrize(
    "settings", [{"sizes": (0, 0)}, {"sizes": (9,), "keep": lambda document: False}]
)
def test_a_corpus_without_images_is_a_sentence(settings: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"^data: the corpus has no image to train the image tokenizer on; "
    ):
        stream(*settings.pop("sizes"), **settings).next()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32))
def test_squares_of_any_shape(height: int, width: int, size: int, seed: int) -> None:
    """Of a picture of numbered columns, a run of them is cut out, or its mirror image."""
    pixels_HWC = np.zeros((height, width, 3), np.uint8)
    pixels_HWC[:] = np.arange(width)[:, None] * 5
    assert random_square(pixels_HWC, size, np.random.default_rng(seed)).shape == (size, size, 3)

    # A square of the shorter side is not resized, so its columns keep their numbers.
    side = min(height, width)
    square_HWC = random_square(pixels_HWC, side, np.random.default_rng(seed))
    columns = square_HWC[0, :, 0].astype(int) // 5
    first = min(columns)
    run = list(range(first, first + side))
    assert columns.tolist() in (run, run[::-1])


def test_an_image_of_extreme_aspect_takes_no_more_memory_than_its_square() -> None:
    """Resized before it is cut, this one would take 39 GB."""
    pixels_HWC = np.zeros((1, 200_000, 3), np.uint8)
    assert random_square(pixels_HWC, 256, np.random.default_rng(0)).shape == (256, 256, 3)
