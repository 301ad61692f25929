"""The stages that make the documents and the image tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from tqdm import tqdm

from cm3leon.data.corpus import Corpus, Split, split_of
from cm3leon.data.images import square
from cm3leon.data.shuffle import RowStream
from cm3leon.data.source import Skipped
from cm3leon.stages.artifacts import IMAGE_TOKENIZER, WEIGHTS, Run
from cm3leon.stages.pipeline import write_json
from cm3leon.stages.tokens import sample_documents, split_in
from cm3leon.training.checkpoint import load_weights, save_weights
from cm3leon.training.trainer import train
from cm3leon.types import Document, UserError

SKIPPED = "skipped.jsonl"


def make_documents(run: Run, folder: Path) -> None:
    """Reads the corpus, brings its images to the tokenizer's size, fixes the splits, lists what was left out."""
    size = run.new_image_tokenizer().image_size
    documents: list[Document] = []
    images: list[np.ndarray] = []
    skipped: list[Skipped] = []
    items = sample_documents(run) if run.experiment.shards else run.source.documents()
    for item in tqdm(items, desc="documents", unit="document", mininterval=2.0, dynamic_ncols=True):
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        if item.image is None or not item.text:
            skipped.append(Skipped(item.id, "this experiment needs a caption and an image in every document"))
            continue
        documents.append(item)
        images.append(square(item.image, size))
    (folder / SKIPPED).write_text("".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in skipped))
    if skipped:
        print(f"      {len(skipped)} of {len(skipped) + len(documents)} items skipped, listed in {folder / SKIPPED}")
    if not documents and run.borrowed is None:  # with borrowed tokenizers it may be text, to be mixed into another run
        reason = f", for example {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"data: no usable documents in the corpus ({len(skipped)} items skipped{reason})")
    ids = [document.id for document in documents]
    Corpus(
        ids=ids,
        captions=[document.text for document in documents],
        images_BHWC=np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8),
        labels=[document.label for document in documents],
        splits=_splits(run, ids),
    ).save(folder)


def _splits(run: Run, ids: list[str]) -> list[Split]:
    """The split of each document; for a sample, that which it has in the whole corpus."""
    config = run.experiment.split
    if run.experiment.shards is None:
        return split_of(ids, validation=config.validation, held_out=config.held_out)
    splits = [split_in(run, id_) for id_ in ids]
    for split in get_args(Split):
        if split not in splits and run.borrowed is None:
            raise UserError(
                f"shards.sample: none of the {len(ids)} sampled documents is in the {split} split; raise it"
            )
    return splits


def make_image_tokenizer(run: Run, folder: Path) -> None:
    """Trains the image tokenizer, or takes over another run's, then encodes all images and their varied versions."""
    corpus, images_BHWC = run.corpus, run.varied_images
    tokenizer = run.new_image_tokenizer() if run.borrowed else _trained_image_tokenizer(run, folder, images_BHWC)
    if run.borrowed:
        load_weights(run.borrowed_file(IMAGE_TOKENIZER), tokenizer)
        tokenizer.to(run.device).eval()
    if len(corpus):
        codes_MN = tokenizer.encode(corpus.images_BHWC)
        np.save(folder / "codes.npy", codes_MN)
        varied_codes_VBN = tokenizer.encode(images_BHWC).reshape(-1, len(corpus.rows("train")), codes_MN.shape[1])
        np.save(folder / "varied_codes.npy", varied_codes_VBN)
    save_weights(folder / WEIGHTS, tokenizer)
    write_json(folder / "config.json", run.section("image_tokenizer"))


def _trained_image_tokenizer(run: Run, folder: Path, images_BHWC: np.ndarray) -> Any:
    config = run.experiment.image_tokenizer_training
    torch.manual_seed(run.experiment.seed)
    tokenizer = run.new_image_tokenizer()
    train(
        tokenizer,
        lambda module, batch_BHWC: module.loss(batch_BHWC),
        RowStream(
            len(images_BHWC),
            lambda items: torch.from_numpy(images_BHWC[items]).to(run.device),
            batch_size=config.batch_size,
            seed=run.experiment.seed,
        ),
        config,
        folder=folder,
        device=run.device,
        seed=run.experiment.seed,
        title="image tokenizer",
    )
    return tokenizer
