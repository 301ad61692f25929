"""The sample of a corpus: documents of one caption and one image in memory, and their split."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cm3leon.io import digest_of, read_json_lines
from cm3leon.records import read_array
from cm3leon.types import Document, ImageSegment, TextSegment

Split = Literal["train", "validation", "held_out"]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Parallel lists with one entry per document: ids, captions, images (B, H, W, C) in uint8,
    labels and splits."""

    ids: list[str]
    captions: list[str]
    images_BHWC: np.ndarray
    labels: list[int | None]
    splits: list[Split]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, split: Split) -> np.ndarray:
        """The indices of a split's documents, in order."""
        return np.flatnonzero(np.asarray(self.splits) == split)

    def document(self, row: int) -> Document:
        """One document: its caption, then its image."""
        segments = (TextSegment(self.captions[row]), ImageSegment(self.images_BHWC[row]))
        return Document(self.ids[row], segments, self.labels[row])

    def save(self, folder: Path) -> None:
        """Write `images.npy` and `documents.jsonl` into a folder."""
        np.save(folder / "images.npy", self.images_BHWC)
        with (folder / "documents.jsonl").open("w") as file:
            for id_, caption, label, split in zip(
                self.ids, self.captions, self.labels, self.splits, strict=True
            ):
                record = {"id": id_, "caption": caption, "label": label, "split": split}
                file.write(json.dumps(record) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Read what `save` wrote.

        Raises:
            UserError: for a file that is missing or damaged.
        """
        shape = {"id": str, "caption": str, "label?": int, "split": str}
        records = read_json_lines(folder / "documents.jsonl", shape)
        return cls(
            ids=[record["id"] for record in records],
            captions=[record["caption"] for record in records],
            images_BHWC=read_array(folder / "images.npy"),
            labels=[record.get("label") for record in records],
            splits=[record["split"] for record in records],
        )


def split_of_key(key: str, *, validation: float, held_out: float) -> Split:
    """The split of a document by the SHA-256 of its `split_key`, whatever else the corpus holds."""
    place = int(digest_of(key)[:16], 16) / 2**64
    if place < held_out:
        return "held_out"
    return "validation" if place < held_out + validation else "train"
