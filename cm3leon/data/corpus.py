"""Documents of one caption and one image, held in memory, with their split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cm3leon.io import digest_of, read_json_lines
from cm3leon.records import read_array
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


def split_of(
    ids: list[str], *, validation: float, held_out: float, keys: Sequence[str] | None = None
) -> list[Split]:
    """A split for each document, fixed by the keys alone: they are ordered by their hash.

    Args:
        keys: `Document.split_key` of each; documents of one key fall into one split. None = the ids.

    Every split gets at least one document. Raises UserError for fewer than three documents, repeated
    ids, or keys that leave a split without a document.
    """
    keys = ids if keys is None else keys
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
    members: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        members.setdefault(key, []).append(place)
    if len(members) < 3:
        raise UserError(
            f"data: the {len(ids)} documents are about {len(members)} pictures, at least 3 are needed "
            "(train, validation, held-out)"
        )

    splits: list[Split] = ["train"] * len(ids)
    order = sorted(members, key=digest_of)
    shares: tuple[tuple[Split, int], ...] = (
        ("held_out", n_held_out),
        ("validation", n_validation),
    )
    for split, wanted in shares:
        taken = 0
        # One picture stays for each of the splits that come after this one.
        while taken < wanted and len(order) > (2 if split == "held_out" else 1):
            places = members[order.pop(0)]
            taken += len(places)
            for place in places:
                splits[place] = split
    return splits
