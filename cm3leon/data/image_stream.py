"""The images of a corpus of any size as an endless stream of batches, cropped at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from cm3leon.data.ahead import threads
from cm3leon.data.shuffle import own_slots, shuffled
from cm3leon.data.source import Skipped, Source
from cm3leon.seeds import mixed
from cm3leon.types import Document, UserError

State = dict[str, Any]

FRUITLESS = 32
"""How often a lane may read as many parts as the corpus has without an image, before the corpus is
taken to have none."""


class ImageStream:
    """Batches (B, size, size, 3), uint8; another stream over the same corpus can resume from the
    state of this one exactly.

    Every image of a batch comes from a lane, the same in every batch. Each of the `lanes` reads a
    part of the source of its own, so that a batch is not filled with neighbours of one part. Lane k
    of n reads the parts at the positions k, k + n, k + 2n ... of an order that is new every epoch:

        batch     0 1 2 3 | 4 5 6 7        images of 4 lanes, for 2 ranks of 4 images each
        lanes     0 0 1 1 | 2 2 3 3        a rank decodes those of its own lanes, and no others

    If the number of ranks does not divide that of lanes, several ranks read the same lane. A
    document gives one of its images, which is cropped and mirrored at random. The next batch is
    read in threads while the last one is trained on.

    Args:
        keep: whether a document is used.
        batch_size: images in a batch of all ranks together.
        share: (rank, ranks); each rank reads a consecutive part of the batch.

    Raises:
        UserError: for a batch that cannot be divided evenly among the ranks.
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
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._source = source
        self._parts = source.parts()
        self._keep = keep
        self._size = size
        self._batch_size = batch_size
        self._seed = seed
        self._lane_count = min(lanes, len(self._parts), batch_size)
        self._slots = range(*own_slots(batch_size, share))
        names = dict.fromkeys(self._lane_of(slot) for slot in self._slots)
        self._state: State = {"batches": 0, "lanes": {str(lane): [lane, 0] for lane in names}}
        self._pool = ThreadPoolExecutor(threads(), "decode")
        self._lanes: dict[int, Iterator[tuple[Document, list[int]]]] | None = None
        self._coming: dict[int, Future[tuple[list[np.ndarray], list[int]]]] = {}

    def next(self) -> np.ndarray:
        """Return the next batch. Raises UserError for a corpus without an image to train on."""
        if self._lanes is None:
            # A state may hold the lanes of other ranks, too.
            own = dict.fromkeys(self._lane_of(slot) for slot in self._slots)
            self._lanes = {lane: self._images(*self._state["lanes"][str(lane)]) for lane in own}
            self._read_on(self._state["batches"])

        # The state stands behind the batch that is returned, not behind the one that is read next.
        found = {lane: coming.result() for lane, coming in self._coming.items()}
        number = self._state["batches"] + 1
        places = {str(lane): place for lane, (_, place) in found.items()}
        self._state = {"batches": number, "lanes": places}
        self._read_on(number)
        return np.stack([image for images, _ in found.values() for image in images])

    def state_dict(self) -> State:
        """The state as JSON, of this rank's lanes; the caller adds those of the other ranks."""
        return self._state

    def load_state_dict(self, state: State) -> None:
        """Resume from a state. Raises UserError for a state of an earlier version."""
        if "batches" not in state:
            raise UserError(
                "image_tokenizer: its checkpoints are of an earlier version, which drew the images "
                "in another order; delete the folders step_* of the stage to begin anew"
            )
        for coming in self._coming.values():
            coming.exception()  # waits for the thread, as two must not read one lane
        self._state = state
        self._lanes, self._coming = None, {}

    def _lane_of(self, slot: int) -> int:
        """The lane that an index of the batch reads."""
        return slot * self._lane_count // self._batch_size

    def _read_on(self, batch: int) -> None:
        """Start to read a batch, each lane in a thread."""
        assert self._lanes is not None
        self._coming = {
            lane: self._pool.submit(self._of_batch, batch, lane, images)
            for lane, images in self._lanes.items()
        }

    def _of_batch(
        self, batch: int, lane: int, images: Iterator[tuple[Document, list[int]]]
    ) -> tuple[list[np.ndarray], list[int]]:
        """Take this rank's images of one lane for a batch; also return where the lane stands then."""
        own: list[np.ndarray] = []
        place: list[int] = []
        for slot in range(self._batch_size):
            if self._lane_of(slot) != lane:
                continue
            rng = np.random.default_rng(mixed(self._seed, batch * self._batch_size + slot))

            # A document of another rank is read all the same, to keep the lane's order.
            document, place = next(images)
            if slot in self._slots:
                image_HWC = document.images[int(rng.integers(len(document.images)))]
                own.append(random_square(image_HWC, self._size, rng))
        return own, place

    def _images(self, position: int, item: int) -> Iterator[tuple[Document, list[int]]]:
        """Yield the documents with images of a lane, from an item of a part on, each with the
        position behind it."""
        fruitless = 0  # parts that have ended since the last image
        while fruitless <= FRUITLESS * len(self._parts):
            part = self._parts[shuffled(self._seed, position, len(self._parts))]
            for found in self._source.read(part, item):
                item += 1
                if not isinstance(found, Skipped) and found.images and self._keep(found):
                    fruitless = 0
                    yield found, [position, item]
            fruitless += 1
            position, item = position + self._lane_count, 0
        raise UserError(
            "data: the corpus has no image to train the image tokenizer on; give a corpus with "
            "images, or use the tokenizers of another run with shards.tokenizers=DIR"
        )


def random_square(pixels_HWC: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Crop the largest square at a random position, mirror it half the time, and resize it.

    Cropping comes first, since resizing an image of extreme aspect could take any memory.

    Returns:
        Pixels (size, size, 3), uint8.
    """
    side = min(pixels_HWC.shape[:2])
    top, left = (int(rng.integers(length - side + 1)) for length in pixels_HWC.shape[:2])
    crop_HWC = pixels_HWC[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop_HWC = crop_HWC[:, ::-1]
    image = Image.fromarray(np.ascontiguousarray(crop_HWC))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
