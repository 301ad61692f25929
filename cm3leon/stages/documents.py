"""The stage that reads the corpus, or a sample of it, into memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import numpy as np
from tqdm import tqdm

from cm3leon.data.corpus import Corpus, Split, split_of
from cm3leon.data.images import square
from cm3leon.data.source import Skipped
from cm3leon.stages.artifacts import Run
from cm3leon.stages.tokens import DocumentSample, split_in
from cm3leon.types import Document, UserError

SKIPPED = "skipped.jsonl"


def make_documents(run: Run, folder: Path) -> None:
    """Reads the corpus, brings its images to the tokenizer's size, fixes the splits, lists what was left out."""
    size = run.image_tokenizer_shape.image_size
    documents: list[Document] = []
    images: list[np.ndarray] = []
    skipped: list[Skipped] = []
    sample = DocumentSample(run) if run.experiment.shards else None
    items = run.source.documents() if sample is None else sample
    for item in tqdm(items, desc="documents", unit="document", mininterval=2.0, dynamic_ncols=True):
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        if item.image is None or not item.text:
            skipped.append(
                Skipped(item.id, "this experiment needs a caption and an image in every document")
            )
            continue
        documents.append(item)
        images.append(square(item.image, size))
    (folder / SKIPPED).write_text(
        "".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in skipped)
    )
    if skipped:
        print(
            f"      {len(skipped)} of {len(skipped) + len(documents)} items skipped, listed in {folder / SKIPPED}"
        )
    if (
        not documents and run.borrowed is None
    ):  # with borrowed tokenizers it may be text, to be mixed into another run
        reason = f", for example {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise UserError(
            f"data: no usable documents in the corpus ({len(skipped)} items skipped{reason})"
        )
    ids = [document.id for document in documents]
    Corpus(
        ids=ids,
        captions=[document.text for document in documents],
        images_BHWC=np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8),
        labels=[document.label for document in documents],
        splits=_splits(run, ids, sample),
    ).save(folder)


def _splits(run: Run, ids: list[str], sample: DocumentSample | None) -> list[Split]:
    """The split of each document; for a sample, that which it has in the whole corpus."""
    config = run.experiment.split
    if sample is None:
        return split_of(ids, validation=config.validation, held_out=config.held_out)
    splits = [split_in(run, id_) for id_ in ids]
    for split in get_args(Split):
        if split not in splits and run.borrowed is None:
            if not sample.whole:
                raise UserError(
                    f"shards.sample: none of the {len(ids)} sampled documents is in the {split} split; raise it"
                )
            raise UserError(
                f"split: none of the {len(ids)} usable documents, which are the whole corpus, is in the {split} "
                "split; give a corpus of more documents, or other shares in split.validation and split.held_out"
            )
    return splits
