"""What several stages depend on besides other stages.

`inputs` of a stage give all that its result depends on, and nothing else: of files, what they hold,
and no setting that changes no result. Whatever they leave out may change while a run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from cm3leon.config import result_settings
from cm3leon.retrievers.base import StrategyConfig
from cm3leon.stages.run_folder import RunFolder

SHARDS = ("*.arrow", "index.json", "plan.json")
"""The files of a result in shards."""
DRAWN_IN_TRAINING = ("max_documents", "random_count")
"""Settings of the retriever that no neighbours depend on,
as training draws among those that were found."""


def recorded(*sections: str) -> Callable[[RunFolder], dict[str, Any]]:
    """Sections of the experiment, whole, as a stage keeps them for those who open the run."""
    return lambda run: run.recorded(*sections)


def depends_on(*sections: str) -> Callable[[RunFolder], dict[str, Any]]:
    """Sections of the experiment, without what changes no result."""
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
    """The size of the sample; the seed says from which parts it is,
    where they are more than it has."""
    shards = run.shards
    drawn = len(run.source.parts()) > shards.sample
    return {"shards": {"sample": shards.sample}, **(run.depends_on("seed") if drawn else {})}


def varied_inputs(run: RunFolder) -> dict[str, Any]:
    """The varied versions of the training images, which the seed draws."""
    if run.experiment.augment.versions:
        return {**run.depends_on("augment", "seed"), "drawn_for": "document"}
    return {"augment": {"versions": 0}}


def encoder_settings(run: RunFolder, held: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """The settings of the retriever that shape its encoder, not the strategy.

    Args:
        held: what stands for a file's path, such as a checksum of what it holds.
    """
    strategy = {field.name for field in fields(StrategyConfig)}
    settings = result_settings(run.experiment.retriever, held)
    return {name: value for name, value in settings.items() if name not in strategy}
