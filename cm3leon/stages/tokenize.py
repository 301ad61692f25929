"""The first three stages: documents, text tokenizer, image tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cm3leon.data.corpus import Corpus, split_of
from cm3leon.data.images import square
from cm3leon.data.shuffle import RowStream
from cm3leon.data.source import Skipped
from cm3leon.stages.artifacts import WEIGHTS, Run
from cm3leon.stages.pipeline import write_json
from cm3leon.tokenizers.text import TextTokenizer
from cm3leon.training.checkpoint import save_weights
from cm3leon.training.trainer import train
from cm3leon.types import Document, UserError

SKIPPED = "skipped.jsonl"


def make_documents(run: Run, folder: Path) -> None:
    """Reads the corpus, brings its images to the tokenizer's size, fixes the splits, lists what was left out."""
    size = run.new_image_tokenizer().image_size
    documents: list[Document] = []
    images: list[np.ndarray] = []
    skipped: list[Skipped] = []
    for item in tqdm(run.source.documents(), desc="documents", unit="document", mininterval=2.0, dynamic_ncols=True):
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
    if not documents:
        reason = f", for example {skipped[0].file}: {skipped[0].reason}" if skipped else ""
        raise UserError(f"data: no usable documents in the corpus ({len(skipped)} items skipped{reason})")
    split = run.experiment.split
    ids = [document.id for document in documents]
    Corpus(
        ids=ids,
        captions=[document.text for document in documents],
        images_BHWC=np.stack(images),
        labels=[document.label for document in documents],
        splits=split_of(ids, validation=split.validation, held_out=split.held_out),
    ).save(folder)


def make_text_tokenizer(run: Run, folder: Path) -> None:
    """Learns the merges on the training captions."""
    captions = [run.corpus.captions[row] for row in run.corpus.rows("train")]
    TextTokenizer.train(run.experiment.text_tokenizer, captions).save(folder)


def make_image_tokenizer(run: Run, folder: Path) -> None:
    """Trains the image tokenizer on the training images and their varied versions, then encodes all images."""
    config, corpus = run.experiment.image_tokenizer_training, run.corpus
    torch.manual_seed(run.experiment.seed)
    tokenizer = run.new_image_tokenizer()
    images_BHWC = run.varied_images
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
    codes_MN = tokenizer.encode(corpus.images_BHWC)
    np.save(folder / "codes.npy", codes_MN)
    varied_codes_VBN = tokenizer.encode(images_BHWC).reshape(-1, len(corpus.rows("train")), codes_MN.shape[1])
    np.save(folder / "varied_codes.npy", varied_codes_VBN)
    save_weights(folder / WEIGHTS, tokenizer)
    write_json(folder / "config.json", run.section("image_tokenizer"))
