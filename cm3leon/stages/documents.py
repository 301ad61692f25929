"""The stage that reads a sample of the corpus into memory;
of a small corpus the sample is everything."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import numpy as np
from tqdm import tqdm

from cm3leon.data.corpus import Corpus, Split, split_of_key
from cm3leon.data.source import Skipped
from cm3leon.secrets import without_secrets
from cm3leon.stages.inputs import corpus_inputs, recorded
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.stage import Stage
from cm3leon.stages.tokens import DocumentSample
from cm3leon.types import Document, UserError

SKIPPED = "skipped.jsonl"


def make_documents(run: RunFolder, folder: Path) -> None:
    """Read the sample, resize its images for the tokenizer, fix the splits,
    and list what was left out."""
    size = run.image_tokenizer_shape.image_size
    ids: list[str] = []
    keys: list[str] = []
    captions: list[str] = []
    labels: list[int | None] = []
    pixels = bytearray()  # of all images, one after the other; the array below is a view of it
    first_skipped, skipped = "", 0

    sample = DocumentSample(run)
    bar = tqdm(sample, desc="documents", unit="document", mininterval=2.0, dynamic_ncols=True)
    with (folder / SKIPPED).open("w") as file:
        for item in bar:
            found = _usable(item)
            if isinstance(found, Skipped):
                file.write(json.dumps(without_secrets(dataclasses.asdict(found))) + "\n")
                first_skipped = first_skipped or f", for example {found.file}: {found.reason}"
                skipped += 1
                continue

            ids.append(found.id)
            keys.append(found.split_key)
            captions.append(found.text)
            labels.append(found.label)
            pixels += found.images[0].tobytes()

    if skipped:
        total = skipped + len(ids)
        print(f"      {skipped} of {total} items were skipped; {folder / SKIPPED} lists them")

    # With reused tokenizers the corpus may be text only, to be mixed into another run.
    if not ids and run.reused is None:
        raise UserError(
            f"data: no usable documents in the corpus ({skipped} items skipped{first_skipped})"
        )
    Corpus(
        ids=ids,
        captions=captions,
        images_BHWC=np.frombuffer(pixels, np.uint8).reshape(len(ids), size, size, 3),
        labels=labels,
        splits=_splits(run, keys, sample),
    ).save(folder)


def _usable(item: Document | Skipped) -> Document | Skipped:
    """The item; skipped if it has no caption or no image."""
    if isinstance(item, Document) and (item.image is None or not item.text):
        reason = "this experiment needs a caption and an image in every document"
        return Skipped(item.id, reason)
    return item


def _splits(run: RunFolder, keys: list[str], sample: DocumentSample) -> list[Split]:
    """The split of each document of the sample, the same as in the whole corpus."""
    config = run.experiment.split
    splits = [
        split_of_key(key, validation=config.validation, held_out=config.held_out) for key in keys
    ]
    shares = {"validation": config.validation, "held_out": config.held_out}
    for split in get_args(Split):
        # A split with a share of 0 may be empty.
        if split not in splits and shares.get(split, 1.0) and run.reused is None:
            if not sample.whole:
                raise UserError(
                    f"shards.sample: none of the {len(keys)} sampled documents is in the {split} "
                    "split; raise shards.sample"
                )
            raise UserError(
                f"split: none of the {len(keys)} usable documents, which are the whole corpus, is "
                f"in the {split} split; give a corpus of more documents, or other shares in "
                "split.validation and split.held_out"
            )
    return splits


STAGE = Stage(
    "documents",
    version=3,
    inputs=corpus_inputs,
    make=make_documents,
    needs=(),
    settings=recorded("data", "split", "shards"),
    results=("documents.jsonl", "images.npy"),
)
