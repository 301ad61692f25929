"""The stage that makes the retriever's encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cm3leon.data.shuffle import RowStream
from cm3leon.digests import path_digest
from cm3leon.registry import RETRIEVERS
from cm3leon.stages.files import ENCODER, WEIGHTS
from cm3leon.stages.inputs import encoder_settings, recorded, varied_inputs
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.stage import Stage
from cm3leon.training.config import training_settings
from cm3leon.training.parallel import replicate
from cm3leon.training.trainer import train
from cm3leon.weights import load_weights, save_weights


def make_retriever(run: RunFolder, folder: Path) -> None:
    """Fit or train the encoder on the sample's training documents, unless it is frozen or reused.

    All ranks train it; the first keeps it.
    """
    corpus, seed = run.corpus, run.experiment.seed
    torch.manual_seed(seed)
    retriever = RETRIEVERS.build(run.experiment.retriever)
    encoder = retriever.encoder.to(run.device)
    rows = corpus.rows("train")
    captions = [corpus.captions[row] for row in rows]
    config = run.experiment.retriever_training
    if run.reuses_encoder:
        load_weights(run.reused_file(ENCODER), encoder)
    elif not retriever.trained:
        encoder.fit(captions)
    elif config is not None:
        varied_BHWC = run.varied_images

        def pairs(items: np.ndarray) -> tuple[list[str], torch.Tensor]:
            # Varied versions of the images follow the originals; their captions are the same.
            texts = [captions[item % len(rows)] for item in items]
            return texts, torch.from_numpy(varied_BHWC[items])

        replicate(encoder, run.ranks)
        train(
            encoder,
            lambda module, batch: module.loss(*batch),
            RowStream(
                len(varied_BHWC),
                pairs,
                batch_size=config.batch_size,
                seed=seed,
                share=(run.ranks.rank, run.ranks.count),
            ),
            config,
            folder=folder,
            device=run.device,
            seed=seed,
            title="retriever",
            ranks=run.ranks,
            tracking=run.tracking,
        )
    if not run.ranks.first:
        return
    encoder.eval()
    save_weights(folder / WEIGHTS, encoder)


def retriever_inputs(run: RunFolder) -> dict[str, Any]:
    """What the encoder depends on besides the sample."""
    experiment = run.experiment
    inputs: dict[str, Any] = {"weights": run.reused_digest(ENCODER), **run.depends_on("seed")}
    inputs["retriever"] = encoder_settings(run, path_digest)
    if is_trained(run):
        assert experiment.retriever_training is not None
        inputs["retriever_training"] = training_settings(experiment.retriever_training)
        inputs |= varied_inputs(run)
    return inputs


def is_trained(run: RunFolder) -> bool:
    """Whether the encoder is trained in this run."""
    retriever = RETRIEVERS.get(run.experiment.retriever.name)
    return (
        retriever.trained
        and run.experiment.retriever_training is not None
        and not run.reuses_encoder
    )


STAGE = Stage(
    "retriever",
    version=3,
    inputs=retriever_inputs,
    make=make_retriever,
    needs=("documents",),
    settings=recorded("retriever", "retriever_training", "augment", "seed", "shards"),
    results=("*.safetensors",),
    expensive=True,
    trains=is_trained,
)
