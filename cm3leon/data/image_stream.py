"""The images of a corpus of any size as an endless stream of batches, cropped at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from cm3leon.data.shuffle import shuffled
from cm3leon.data.source import Skipped, Source
from cm3leon.seeds import mixed
from cm3leon.types import Document, UserError

State = dict[str, Any]


class ImageStream:
    """Batches (B, size, size, 3), uint8, whose state another stream over the same corpus goes on from exactly.

    `lanes` parts of the source are read at the same time and take turns, in an order that is new in every epoch, so
    that neighbours in a part do not fill a batch. A document gives one of its images, which is cropped and mirrored at
    random. The next batch is read while the last one is trained on.

    Args:
        keep: whether a document is used.
    """

    def __init__(
        self,
        source: Source,
        *,
        keep: Callable[[Document], bool],
        size: int,
        batch_size: int,
        seed: int,
        lanes: int = 16,
    ) -> None:
        self._source = source
        self._parts = source.parts()
        self._keep = keep
        self._size = size
        self._batch_size = batch_size
        self._seed = seed
        lanes = min(lanes, len(self._parts))
        self._state: State = {
            "drawn": 0,
            "turn": 0,
            "next_part": lanes,
            "lanes": [[lane, 0] for lane in range(lanes)],
        }
        self._thread = ThreadPoolExecutor(1)
        self._batches: Iterator[tuple[np.ndarray, State]] | None = None
        self._coming: Future[tuple[np.ndarray, State]]

    def next(self) -> np.ndarray:
        """The next batch. Raises UserError for a corpus without an image to train on."""
        if self._batches is None:
            self._batches = self._read(self._state)
            self._coming = self._thread.submit(next, self._batches)
        images_BHWC, self._state = self._coming.result()
        self._coming = self._thread.submit(next, self._batches)
        return images_BHWC

    def state_dict(self) -> State:
        """Where the stream is, as JSON."""
        return self._state

    def load_state_dict(self, state: State) -> None:
        """Goes on from there."""
        self._state = state
        self._batches = None

    def _read(self, state: State) -> Iterator[tuple[np.ndarray, State]]:
        drawn, turn, next_part = state["drawn"], state["turn"], state["next_part"]
        lanes = [list(lane) for lane in state["lanes"]]
        items = [self._items(position, item) for position, item in lanes]
        fruitless = 0  # parts that have ended since the last image
        batch: list[np.ndarray] = []
        while True:
            lane = turn % len(lanes)
            item = next(items[lane], None)
            if item is None:
                fruitless += 1
                if fruitless > 2 * len(self._parts) * len(lanes) + len(
                    lanes
                ):  # each lane has come through all
                    raise UserError("data: the corpus has no image to train the image tokenizer on")
                lanes[lane] = [next_part, 0]
                items[lane] = self._items(next_part, 0)
                next_part += 1
                continue
            lanes[lane][1] += 1
            turn += 1
            if isinstance(item, Skipped) or not item.images or not self._keep(item):
                continue
            fruitless = 0
            rng = np.random.default_rng(mixed(self._seed, drawn))
            image_HWC = item.images[int(rng.integers(len(item.images)))]
            batch.append(random_square(image_HWC, self._size, rng))
            drawn += 1
            if len(batch) == self._batch_size:
                after = {
                    "drawn": drawn,
                    "turn": turn,
                    "next_part": next_part,
                    "lanes": [list(lane) for lane in lanes],
                }
                yield np.stack(batch), after
                batch = []

    def _items(self, position: int, start: int) -> Iterator[Document | Skipped]:
        """The items of the part at a position of the endless stream of parts."""
        return iter(
            self._source.read(self._parts[shuffled(self._seed, position, len(self._parts))], start)
        )


def random_square(pixels_HWC: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The largest square of an image at a random place, mirrored half the time, as (size, size, 3), uint8."""
    side = min(
        pixels_HWC.shape[:2]
    )  # cropped first: to resize an image of extreme aspect could take any memory
    top, left = (int(rng.integers(length - side + 1)) for length in pixels_HWC.shape[:2])
    crop_HWC = pixels_HWC[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop_HWC = crop_HWC[:, ::-1]
    image = Image.fromarray(np.ascontiguousarray(crop_HWC))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
