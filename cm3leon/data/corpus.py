"""Documents of one caption and one image, held in memory, with their split."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cm3leon.records import read_array, read_json_lines
from cm3leon.types import Document, ImageSegment, TextSegment, UserError

Split = Literal["train", "validation", "held_out"]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Parallel lists, one entry a document: ids, captions, `images_BHWC` (uint8), labels, splits."""

    ids: list[str]
    captions: list[str]
    images_BHWC: np.ndarray
    labels: list[int | None]
    splits: list[Split]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, split: Split) -> np.ndarray:
        """Numbers of the documents of a split, in order."""
        return np.flatnonzero(np.asarray(self.splits) == split)

    def document(self, row: int) -> Document:
        """One document: its caption, then its image."""
        segments = (TextSegment(self.captions[row]), ImageSegment(self.images_BHWC[row]))
        return Document(self.ids[row], segments, self.labels[row])

    def save(self, folder: Path) -> None:
        """Writes `images.npy` and `documents.jsonl`."""
        np.save(folder / "images.npy", self.images_BHWC)
        with (folder / "documents.jsonl").open("w") as file:
            for id_, caption, label, split in zip(
                self.ids, self.captions, self.labels, self.splits, strict=True
            ):
                file.write(
                    json.dumps({"id": id_, "caption": caption, "label": label, "split": split})
                    + "\n"
                )

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Reads what `save` wrote.

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


def split_of(ids: list[str], *, validation: float, held_out: float) -> list[Split]:
    """A split for each id, fixed by the ids alone: documents are ordered by the hash of their id.

    Every split gets at least one document. Raises UserError for fewer than three documents or repeated ids.
    """
    if len(ids) < 3:
        raise UserError(
            f"data: {len(ids)} usable documents, at least 3 are needed (train, validation, held-out)"
        )
    if len(set(ids)) < len(ids):
        raise UserError("data: document ids must be unique, at least one occurs twice")
    n_held_out = max(1, round(held_out * len(ids)))
    n_validation = max(1, round(validation * len(ids)))
    if n_held_out + n_validation >= len(ids):
        raise UserError(
            f"split: {len(ids)} documents leave none to train on; lower split.validation or split.held_out"
        )
    order = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
    splits: list[Split] = ["train"] * len(ids)
    for i in order[:n_held_out]:
        splits[i] = "held_out"
    for i in order[n_held_out : n_held_out + n_validation]:
        splits[i] = "validation"
    return splits
