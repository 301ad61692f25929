"""The stage that makes the image tokenizer and encodes the images of the sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cm3leon.config import result_settings
from cm3leon.data.image_stream import ImageStream
from cm3leon.data.shuffle import RowStream, shuffled
from cm3leon.evaluation.reconstruction import averages
from cm3leon.io import write_json
from cm3leon.loggers.base import Loggers
from cm3leon.stages.files import GEOMETRY, IMAGE_TOKENIZER, WEIGHTS
from cm3leon.stages.inputs import recorded, varied_inputs
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.stage import Stage
from cm3leon.stages.tokens import split_in
from cm3leon.tokenizers.image.base import ImageTokenizer
from cm3leon.training.config import training_settings
from cm3leon.training.parallel import replicate
from cm3leon.training.prefetch import Batches
from cm3leon.training.trainer import train
from cm3leon.weights import load_weights, save_weights

LOOKED_AT = 64
"""Validation images that are measured during training."""
SHOWN = 8
"""Validation images that are logged."""


def make_image_tokenizer(run: RunFolder, folder: Path) -> None:
    """Train the image tokenizer, or reuse another one, then encode the images of the sample.

    All ranks train it; the first does the rest.
    """
    torch.manual_seed(run.experiment.seed)
    tokenizer = run.new_image_tokenizer()
    if run.reused:
        load_weights(run.reused_file(IMAGE_TOKENIZER), tokenizer)
    elif not tokenizer.pretrained:
        _train(run, tokenizer, folder)
    if not run.ranks.first:
        return

    # The sample is encoded once, here, for all stages that read its codes.
    tokenizer.to(run.device).ready()
    corpus = run.corpus
    if len(corpus):
        np.save(folder / "codes.npy", tokenizer.encode(corpus.images_BHWC, title="encoding"))
    save_weights(folder / WEIGHTS, tokenizer)
    write_json(folder / "config.json", run.recorded("image_tokenizer"))
    if (geometry := tokenizer.geometry()) is not None:
        write_json(folder / GEOMETRY, geometry)


def _train(run: RunFolder, tokenizer: ImageTokenizer, folder: Path) -> None:
    config, seed = run.experiment.image_tokenizer_training, run.experiment.seed
    module = tokenizer.training_module()
    if run.ranks.first:
        for note in module.notes:
            print(f"      {note}")
    replicate(module, run.ranks)
    train(
        module,
        lambda module, batch_BHWC: module.loss(torch.from_numpy(batch_BHWC).to(run.device)),
        _batches(run, config.batch_size),
        config,
        folder=folder,
        device=run.device,
        seed=seed,
        title="image tokenizer",
        callback=_reconstructions(run, tokenizer),
        clipped=module.networks,
        ranks=run.ranks,
        tracking=run.tracking,
    )


def _batches(run: RunFolder, batch_size: int) -> Batches:
    """Training images: the whole corpus, streamed, or the sample with its varied versions."""
    seed, share = run.experiment.seed, (run.ranks.rank, run.ranks.count)
    if run.shards.tokenizer_images == "corpus":
        return ImageStream(
            run.source,
            keep=lambda document: split_in(run, document) == "train",
            size=run.image_tokenizer_shape.image_size,
            batch_size=batch_size,
            seed=seed,
            share=share,
        )
    images_BHWC = run.varied_images
    return RowStream(
        len(images_BHWC),
        lambda items: images_BHWC[items],
        batch_size=batch_size,
        seed=seed,
        share=share,
    )


def _reconstructions(
    run: RunFolder, tokenizer: ImageTokenizer
) -> Callable[[int, Loggers | None], dict[str, float]]:
    """A callback that measures some validation images,
    and logs some above their reconstructions."""
    validation = run.corpus.rows("validation")
    count = min(LOOKED_AT, len(validation))
    chosen = [validation[shuffled(0, index, len(validation))] for index in range(count)]
    images_BHWC = run.corpus.images_BHWC[chosen]

    def callback(step: int, loggers: Loggers | None) -> dict[str, float]:
        if loggers is None:  # the first rank measures; all have the same weights
            return {}

        tokenizer.eval()
        codes_BN = tokenizer.encode(images_BHWC)
        rebuilt_BHWC = tokenizer.decode(codes_BN)
        pairs_BHWC = np.concatenate([images_BHWC[:SHOWN], rebuilt_BHWC[:SHOWN]], axis=1)
        loggers.images(step, "reconstructions", pairs_BHWC)
        figures = averages(images_BHWC, rebuilt_BHWC, codes_BN, tokenizer.codebook_size)
        return {name: float(value) for name, value in figures.items()}

    return callback


def image_tokenizer_inputs(run: RunFolder) -> dict[str, Any]:
    """What the tokenizer depends on besides the sample: how it is trained,
    or the reused weights."""
    experiment = run.experiment
    inputs: dict[str, Any] = {"weights": run.reused_digest(IMAGE_TOKENIZER)}
    # Settings such as the discriminator's only matter if the tokenizer is trained here.
    if is_trained(run):
        inputs |= run.depends_on("image_tokenizer", "seed")
        inputs["image_tokenizer_training"] = training_settings(experiment.image_tokenizer_training)
        inputs["streamed"] = run.shards.tokenizer_images == "corpus"
    else:
        inputs["image_tokenizer"] = result_settings(experiment.image_tokenizer)
        if run.reused is None:
            inputs["weights"] = run.image_tokenizer_shape.fingerprint()
    return inputs | varied_inputs(run)


def is_trained(run: RunFolder) -> bool:
    """Whether the tokenizer is trained in this run, and is not another run's or a published one."""
    return run.reused is None and not run.image_tokenizer_shape.pretrained


STAGE = Stage(
    "image_tokenizer",
    version=2,
    inputs=image_tokenizer_inputs,
    make=make_image_tokenizer,
    needs=("documents",),
    settings=recorded("image_tokenizer", "image_tokenizer_training", "augment", "seed", "shards"),
    results=("*.safetensors", "*.npy", "config.json", GEOMETRY),
    expensive=True,
    trains=is_trained,
)
