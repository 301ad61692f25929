"""The stages of an experiment, in their order."""

from __future__ import annotations

from cm3leon.experiment import Experiment
from cm3leon.stages import (
    documents,
    evaluation,
    image_tokenizer,
    index,
    neighbours,
    pretraining,
    reconstruction,
    retriever,
    text_tokenizer,
    tokens,
    vectors,
)
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.stage import Stage


def stages_of(experiment: Experiment) -> tuple[Stage[RunFolder], ...]:
    """The stages of an experiment; one that uses another run's memory bank makes no vectors and
    index."""
    bank = () if experiment.shards.bank else (vectors.STAGE, index.STAGE)
    return (
        documents.STAGE,
        text_tokenizer.stage_of(experiment),
        image_tokenizer.STAGE,
        reconstruction.STAGE,
        retriever.STAGE,
        tokens.STAGE,
        *bank,
        neighbours.stage_of(experiment),
        pretraining.STAGE,
        evaluation.STAGE,
    )
