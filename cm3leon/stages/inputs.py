"""What several stages depend on besides other stages.

A stage's `inputs` are all that its result depends on, and nothing else: the content of files, and
no setting that changes no result. What they leave out may change without making the stage anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from cm3leon.config import result_settings
from cm3leon.data.augment import UNCHANGED
from cm3leon.retrievers.base import StrategyConfig
from cm3leon.stages.run_folder import RunFolder

SHARDS = ("*.arrow", "index.json", "plan.json")
"""Patterns of the files of a result in shards."""
DRAWN_IN_TRAINING = ("max_documents", "random_count")
"""Settings of the retriever that neighbours do not depend on: training draws among those found."""


def recorded(*sections: str) -> Callable[[RunFolder], dict[str, Any]]:
    """Whole sections of the experiment, which a stage records for those who open the run."""
    return lambda run: run.recorded(*sections)


def depends_on(*sections: str) -> Callable[[RunFolder], dict[str, Any]]:
    """Sections of the experiment without what changes no result."""
    return lambda run: run.depends_on(*sections)


def corpus_inputs(run: RunFolder) -> dict[str, Any]:
    """The documents and their splits: how the source reads them, and what it holds."""
    return {
        "data": result_settings(run.experiment.data),
        "corpus": run.corpus_fingerprint or run.source.fingerprint(),
        **run.depends_on("split"),
        "image_size": run.image_tokenizer_shape.image_size,
        **_sample_inputs(run),
    }


def _sample_inputs(run: RunFolder) -> dict[str, Any]:
    """The size of the sample, and the seed if it chooses the parts of the corpus."""
    shards = run.shards
    drawn = len(run.source.parts()) > shards.sample
    return {"shards": {"sample": shards.sample}, **(run.depends_on("seed") if drawn else {})}


def varied_inputs(run: RunFolder) -> dict[str, Any]:
    """The varied versions of the training images, which the seed draws."""
    if run.experiment.augment.versions:
        found = run.depends_on("augment", "seed")
        # Settings that came later are named only where they change something, so that what
        # earlier runs made of theirs stays up to date.
        settings = {}
        for name, value in found["augment"].items():
            if name not in UNCHANGED or value != UNCHANGED[name]:
                settings[name] = value
        return {**found, "augment": settings, "drawn_for": "document"}
    return {"augment": {"versions": 0}}


def encoder_settings(run: RunFolder, held: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """The settings of the retriever that shape its encoder, not the strategy.

    Args:
        held: maps a file's path to what stands for it, such as a checksum.
    """
    strategy = {field.name for field in fields(StrategyConfig)}
    settings = result_settings(run.experiment.retriever, held)
    return {name: value for name, value in settings.items() if name not in strategy}
