"""The retriever stage: the encoder, the memory bank, and the neighbours of the training documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cm3leon.data.shuffle import RowStream
from cm3leon.io import write_json
from cm3leon.registry import RETRIEVERS
from cm3leon.retrievers.neighbours import find_neighbours
from cm3leon.retrievers.strategy import NONE
from cm3leon.stages.artifacts import ENCODER, WEIGHTS, Run
from cm3leon.training.checkpoint import load_weights, save_weights
from cm3leon.training.trainer import train

STRATEGY = "strategy.json"
"""What the strategy did to the candidates, in the folder of the stage that found the neighbours."""


def make_retriever(run: Run, folder: Path) -> None:
    """Fits or trains the encoder (unless it is frozen), fills the memory bank, finds the neighbours.

    For a sharded corpus other stages do the last two.
    """
    corpus, seed = run.corpus, run.experiment.seed
    torch.manual_seed(seed)
    retriever = RETRIEVERS.build(run.experiment.retriever)
    encoder = retriever.encoder.to(run.device)
    rows = corpus.rows("train")
    captions, images_BHWC = [corpus.captions[row] for row in rows], corpus.images_BHWC[rows]
    config = run.experiment.retriever_training
    if run.borrows_encoder:
        load_weights(run.borrowed_file(ENCODER), encoder)
    elif not retriever.trained:
        encoder.fit(captions)
    elif config is not None:
        varied_BHWC = run.varied_images

        def pairs(items: np.ndarray) -> tuple[list[str], torch.Tensor]:
            return [captions[item % len(rows)] for item in items], torch.from_numpy(
                varied_BHWC[items]
            )

        train(
            encoder,
            lambda module, batch: module.loss(*batch),
            RowStream(len(varied_BHWC), pairs, batch_size=config.batch_size, seed=seed),
            config,
            folder=folder,
            device=run.device,
            seed=seed,
            title="retriever",
        )
    encoder.eval()
    save_weights(folder / WEIGHTS, encoder)
    if run.experiment.shards is not None:
        return
    ids = [corpus.ids[row] for row in rows]
    bank = retriever.bank(ids, captions, images_BHWC)
    bank.save(folder)
    neighbours, verdicts = find_neighbours(
        retriever, bank, ids=ids, texts=captions, images_BHWC=images_BHWC, seed=seed
    )
    neighbours.save(folder / "neighbours.npy")
    labels_B = np.array([corpus.labels[row] for row in rows])
    figures = strategy_figures(verdicts, neighbour_counts(neighbours.rows_VBK))
    write_json(
        folder / STRATEGY, {**figures, "same_label": _same_label(neighbours.rows_VBK, labels_B)}
    )


def neighbour_counts(rows: np.ndarray) -> Counter[int]:
    """How many documents (in a variant) have 0, 1, 2 ... neighbours, of rows (..., K)."""
    return Counter(dict(enumerate(np.bincount((rows != NONE).sum(axis=-1).ravel()).tolist())))


def strategy_figures(verdicts: Mapping[str, int], counts: Mapping[int, int]) -> dict[str, Any]:
    """What the strategy did: the share of the candidates that each rule rejected, and how many neighbours it left.

    Args:
        verdicts: how many candidates were `seen` and how many rejected by each rule.
        counts: how many documents have so many neighbours, see `neighbour_counts`.
    """
    seen, documents = verdicts.get("seen", 0), max(1, sum(counts.values()))
    rejected = {rule: count / seen for rule, count in sorted(verdicts.items()) if rule != "seen"}
    return {
        "candidates_looked_at": seen,
        "share_rejected": rejected,
        "neighbours_per_document": sum(number * count for number, count in counts.items())
        / documents,
        "documents_without_neighbours": counts.get(0, 0) / documents,
    }


def _same_label(rows_VBK: np.ndarray, labels_B: np.ndarray) -> float | None:
    """Share of neighbours of the class of their query document, None where classes are unknown."""
    if any(label is None for label in labels_B):
        return None
    found_VBK = rows_VBK != NONE
    return (
        float((labels_B[rows_VBK] == labels_B[None, :, None])[found_VBK].mean())
        if found_VBK.any()
        else None
    )
