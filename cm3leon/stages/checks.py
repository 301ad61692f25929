"""Checks of what the settings alone decide, before the first stage starts.

A mistake that a stage would find after an hour is found here by shapes and names: sizes that do not
fit together, other runs that are missing or do not fit, and files that an evaluation needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from cm3leon.experiment import Experiment
from cm3leon.loggers.base import check_installed
from cm3leon.records import MARKER, read_stage
from cm3leon.stages.evaluation import check_named_runs, check_protocol
from cm3leon.stages.files import IMAGE_TOKENIZER, TEXT_TOKENIZER, WEIGHTS
from cm3leon.stages.neighbours import bank_fingerprint
from cm3leon.stages.pretraining import another_tokenizer
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.training_data import mixed_fingerprints, start_digest
from cm3leon.tokenizers.image.perceptual import linear_weights_file
from cm3leon.types import UserError, refuse, sentences_of
from cm3leon.weights import check_fit

AROUND = 4
"""Tokens of the shortest image with caption besides its codes: two `<eos>`, a piece of text and a
`<break>`."""


def check_settings(
    experiment: Experiment, folder: Path, *, trains: bool, asks: bool, found: Sequence[str] = ()
) -> None:
    """Check what the settings alone decide, for a run that may not have started.

    Args:
        folder: the run folder, which need not exist.
        trains: whether the run reaches its pretraining.
        asks: whether it reaches the evaluation, whose prompts hold an image each.
        found: mistakes that are known already, to be reported together.

    Raises:
        UserError: naming all mistakes.
    """
    run = RunFolder(experiment, folder, torch.device("cpu"))
    mistakes = list(found)
    for check in _checks(run, trains=trains, asks=asks):
        try:
            check()
        except UserError as error:
            mistakes += sentences_of(error)
    refuse(mistakes)


def _checks(run: RunFolder, *, trains: bool, asks: bool) -> Iterator[Callable[[], object]]:
    """The checks that apply, each of which raises UserError for a mistake."""
    experiment = run.experiment

    # What every run needs.
    for number, logger in enumerate(experiment.loggers):
        yield partial(check_installed, logger.name, f"loggers.{number}")
    trained_with = getattr(experiment.image_tokenizer.config, "perceptual_file", None)
    if trained_with or experiment.reconstruction.perceptual_file:
        yield linear_weights_file
    if run.reused is not None:
        yield lambda: run.reused_file(TEXT_TOKENIZER)
        yield lambda: run.reused_file(IMAGE_TOKENIZER)
    yield lambda: bank_fingerprint(run)
    if not trains:
        return

    # What pretraining and evaluation need.
    yield lambda: _check_split("validation", experiment.split.validation, "pretraining")
    if asks:
        yield lambda: _check_split("held_out", experiment.split.held_out, "evaluation")
        yield lambda: _check_block(run)
        for name, evaluation in experiment.evaluations.items():
            yield partial(check_protocol, f"evaluations.{name}.protocol", evaluation.protocol)
            yield partial(check_named_runs, run, name)
    yield lambda: mixed_fingerprints(run)
    yield lambda: experiment.training.blocks(run.seq_len)
    yield lambda: run.objective
    if experiment.training.start is not None:
        yield lambda: start_digest(run)
        if (experiment.training.start / "pretraining" / WEIGHTS).is_file():
            yield lambda: _check_shapes(run, experiment.training.start)
            yield lambda: _check_tokenizers(run, experiment.training.start)


def _check_split(name: str, share: float, stage: str) -> None:
    """Raise UserError if a stage would have no documents, as its split has no share."""
    if share == 0:
        raise UserError(
            f"split.{name} is 0, and the stage {stage} needs documents of that split; give it a "
            f"share, for example split.{name}=0.05, or stop before that stage with until"
        )


def _check_block(run: RunFolder) -> None:
    """Raise UserError if no image with a caption fits a block."""
    layout, (rows, columns) = run.vocab.layout, run.grid
    if len(run.grids) > 1 and run.experiment.augment.versions:
        raise UserError(
            f"augment.versions is {run.experiment.augment.versions}; images that keep their "
            "shapes, as the layout of these tokenizers has them, are not varied: leave it out"
        )
    if layout.sizes and run.grid not in layout.sizes:
        raise UserError(
            f"image_tokenizer: images of {rows} x {columns} codes have no tokens of their size in "
            f"{run.layout_file}; choose another image_size"
        )

    least = layout.image_length(run.grid) + layout.around_image(run.grid) + AROUND
    if least > run.seq_len:
        raise UserError(
            f"model.seq_len is {run.seq_len}; an image of {rows * columns:,} codes with a caption "
            f"takes {least:,} tokens or more; raise model.seq_len, or take an image_tokenizer with "
            "fewer codes"
        )


def _check_tokenizers(run: RunFolder, start: Path | None) -> None:
    """Raise UserError if the run to start from has tokenizers of other settings than this run's.

    Tokenizers of the same settings may still differ, which is checked when they are made.
    """
    assert start is not None
    for name in ("text", "image"):
        stage = f"{name}_tokenizer"
        record = start / stage
        if run.reused is not None or not (record / MARKER).is_file():
            continue
        theirs = read_stage(record).get("settings", {}).get(stage)
        if theirs is not None and theirs != run.recorded(stage)[stage]:
            raise UserError(another_tokenizer(start, name))


def _check_shapes(run: RunFolder, start: Path | None) -> None:
    """Raise UserError if the weights of the run to start from are
    of another model or vocabulary."""
    assert start is not None
    file = start / "pretraining" / WEIGHTS
    with torch.device("meta"):
        wanted = run.empty_model().state_dict()
    with safe_open(file, framework="pt") as weights:
        given = {}
        for name in weights.keys():  # noqa: SIM118  (not a mapping)
            given[name] = torch.empty(weights.get_slice(name).get_shape(), device="meta")
    try:
        check_fit(file, given, wanted)
    except UserError as error:
        raise UserError(
            f"training.start: the model is another one than this run's: {error}"
        ) from error
