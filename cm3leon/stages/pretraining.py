"""Pretraining: the model is trained on retrieval-augmented samples with the CM3 objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cm3leon.io import sha256, write_json
from cm3leon.loggers.base import Loggers
from cm3leon.models.base import Model
from cm3leon.models.lora import ADAPTER, add_lora
from cm3leon.models.pretrained import load_model
from cm3leon.objectives.block_stream import BlockStream
from cm3leon.stages.files import IMAGE_TOKENIZER, TEXT_TOKENIZER, WEIGHTS, opened_stage
from cm3leon.stages.inputs import DRAWN_IN_TRAINING, recorded
from cm3leon.stages.origin import ORIGIN, keep_origin
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.stage import Stage
from cm3leon.stages.training_data import mixed_fingerprints, start_digest, training_samples
from cm3leon.stages.validation import ValidationImages, validation_loss
from cm3leon.tokenizers.text import LAYOUT
from cm3leon.training.checkpoint import load_weights_at
from cm3leon.training.config import DecoderTrainingConfig, training_settings
from cm3leon.training.costs import model_flops, peak_flops
from cm3leon.training.distributed import Ranks
from cm3leon.training.faults import diverged
from cm3leon.training.parallel import distributed, whole_state, whole_state_and_adapter
from cm3leon.training.precision import chosen_precision
from cm3leon.training.prefetch import BatchSplit
from cm3leon.training.steps import checkpoints
from cm3leon.training.trainer import train
from cm3leon.types import Batch, UserError
from cm3leon.weights import load_weights, save_weights


def make_pretraining(run: RunFolder, folder: Path) -> None:
    """Train the model; validate and draw images for the loggers every `callback_every` steps.

    Raises:
        UserError: if there is no document to validate with.
        FloatingPointError: if it diverged.
    """
    if not len(run.corpus.rows("validation")):
        raise UserError(
            "data: no document that was read has a caption and an image and is in the validation "
            "split; raise shards.sample if the corpus has more documents, or stop at "
            "until=neighbours and mix this run into another with shards.mix"
        )

    # The data.
    config, seed, ranks = run.experiment.training, run.experiment.seed, run.ranks
    samples = training_samples(run)
    stream = BlockStream(
        samples,
        run.objective,
        run.experiment.packing,
        seq_len=run.seq_len,
        batch_size=config.blocks(run.seq_len),
        seed=seed,
        device=torch.device("cpu"),
        rank=ranks.rank,
        ranks=ranks.count,
    )

    # The model with its first weights, on this rank.
    width = getattr(run.experiment.model.config, "width", None)
    precision = chosen_precision(config.precision, folder, ranks, width=width)
    config = replace(config, precision=precision)
    if config.start:
        check_tokenizers(run, config.start)
    model = distributed(
        lambda: first_weights(run),
        run.empty_model,
        config,
        ranks,
        random_state=run.state_of_new_model(),
        weights=_weights_to_start_from(config, ranks),
    )
    if ranks.first:
        print(f"      attention: {model.attention_on(run.device)}", flush=True)
        print(f"      precision: {precision}", flush=True)

    images = ValidationImages(run, precision)
    drawn = 0
    """About how many samples the batches of all ranks have held so far."""

    def micro_loss(module: nn.Module, part: MicroBatch) -> tuple[Tensor, Any]:
        nonlocal drawn
        drawn = part.positions[-1] + 1
        batch = part.batch.to(run.device)
        value, figures = run.objective.loss_of(module, batch, z_loss=config.z_loss)
        return value, {**figures, **part.counts}

    def callback(step: int, loggers: Loggers | None) -> dict[str, float]:
        model.eval()
        images.write(model, loggers, step)
        return {"epoch": drawn / samples.epoch, **validation_loss(run, model, precision)}

    def parts(batch: Batch) -> list[MicroBatch]:
        return [_part(run, model, each, stream.drawn) for each in batch.split(at_once)]

    at_once = config.blocks_at_once(run.seq_len, config.blocks(run.seq_len) // ranks.count)
    resume_from = None
    if config.start and config.start_with == "everything":
        resume_from = config.start / "pretraining"
    train(
        model,
        micro_loss,
        stream,
        config,
        folder=folder,
        device=run.device,
        seed=seed,
        title="pretraining",
        callback=callback,
        split=BatchSplit(
            parts=parts,
            weight=lambda part: float(part.batch.weight_BT.sum()),
            ids=lambda parts: stream.ids(parts[0].positions),
        ),
        ranks=ranks,
        resume_from=resume_from,
        peak_flops=peak_flops(run.device, ranks.count),
        tracking=run.tracking,
    )

    # The result, unless the last weights are useless.
    state, adapter = whole_state_and_adapter(model)
    figures = validation_loss(run, model, precision)
    if not math.isfinite(figures.get("loss", math.nan)):
        why = "the loss of the validation documents with its last weights is NaN or infinite"
        good = checkpoints(folder)[:-1]
        raise diverged("pretraining", why, good[-1] if good else None)

    if ranks.first:
        save_weights(folder / WEIGHTS, state)
        if adapter:
            save_weights(folder / ADAPTER, adapter)
        write_json(
            folder / "config.json", {**run.settings_of("model"), "vocab_size": run.vocab.size}
        )
        write_json(folder / "validation.json", figures)
        if config.start:
            keep_origin(config.start / "pretraining", folder)
    ranks.barrier()


@dataclass(frozen=True)
class MicroBatch:
    """The blocks that a rank computes at a time."""

    batch: Batch
    counts: dict[str, float]
    """Its tokens without padding, and model FLOPs."""
    positions: list[int]
    """Positions in the stream of the samples in the whole batch, in ascending order."""


def _part(run: RunFolder, model: Model, batch: Batch, positions: list[int]) -> MicroBatch:
    """Count a batch's tokens and FLOPs on the CPU, and pin it for a copy to the GPU."""
    counts = {"tokens": float((batch.sample_BT >= 0).sum())}
    counts["flops"] = model_flops(model, batch.sample_BT)
    pinned = run.device.type == "cuda"
    return MicroBatch(batch.pinned() if pinned else batch, counts, positions)


def _weights_to_start_from(config: DecoderTrainingConfig, ranks: Ranks) -> Path | None:
    """The weights of the run that a training starts from, if it uses nothing else of that run.

    The first rank compares them with their recorded checksum; an error is raised on all ranks.
    """
    if config.start is None or config.start_with == "everything":
        return None
    folder, fault = config.start / "pretraining", ""
    if ranks.first:
        try:
            opened_stage(folder, WEIGHTS)
        except UserError as error:
            fault = str(error)
    if fault := ranks.gather(fault)[0]:
        raise UserError(fault)
    return folder / WEIGHTS


def first_weights(run: RunFolder) -> Model:
    """The model before its training: with random weights, or those of the run that it starts from.

    Raises:
        UserError: for a run to start from that has no weights, or those of another model.
    """
    model, start = run.new_model(), run.experiment.training.start
    if start and run.experiment.training.start_with == "weights":
        load_weights(opened_stage(start / "pretraining", WEIGHTS) / WEIGHTS, model)
    return model


def load_checkpoint(
    model: nn.Module,
    config: DecoderTrainingConfig,
    folder: Path,
    step: int,
    *,
    verify: bool = True,
) -> None:
    """Give a model the weights that the training in a run folder had at a step.

    Checkpoints of adapters (LoRA) hold only these: they are added to the weights of the run that
    the training started from, which gives what the training would have ended with at that step.

    Args:
        verify: compare files with their recorded checksums.

    Raises:
        UserError: for a step without a checkpoint, or adapters whose run to start from is gone.
    """
    averaged = config.average_decay is not None
    if not config.lora_rank:
        load_weights_at(folder / "pretraining", step, model, averaged=averaged, verify=verify)
        return

    # The first weights lie in the folder of the run that the training started from.
    assert config.start is not None
    if not (config.start / "pretraining" / WEIGHTS).is_file():
        raise UserError(
            f"checkpoint: the checkpoints of {folder} are adapters of the run {config.start} "
            "(training.start), which is missing; put that run back, or leave checkpoint out to "
            "take the weights of the training's end"
        )
    adapted = load_model(config.start, verify=verify)
    add_lora(adapted, config.lora_rank, config.lora_alpha)
    load_weights_at(folder / "pretraining", step, adapted, averaged=averaged, verify=verify)
    model.load_state_dict(whole_state(adapted))


def another_tokenizer(start: Path, name: str) -> str:
    """The sentence about a run to start from whose text or image tokenizer is not this run's."""
    return (
        f"training.start: {start} was trained with another {name} tokenizer than this run's; "
        f"take its tokenizers over with shards.tokenizers={start}"
    )


def check_tokenizers(run: RunFolder, start: Path) -> None:
    """Raise UserError if a run to start from has tokenizers that give its ids another meaning."""
    if _layout_digest(start) != _layout_digest(run.folder):
        raise UserError(another_tokenizer(start, "text"))
    for name, file in (("text", TEXT_TOKENIZER), ("image", IMAGE_TOKENIZER)):
        theirs, ours = start / file, run.folder / file
        if not (theirs.is_file() and ours.is_file()):
            continue
        opened_stage(theirs.parent, theirs.name, finished=False)
        if sha256(theirs) != sha256(ours):
            raise UserError(another_tokenizer(start, name))


def _layout_digest(folder: Path) -> str | None:
    file = folder / "text_tokenizer" / LAYOUT
    return sha256(file) if file.is_file() else None


def pretraining_inputs(run: RunFolder) -> dict[str, Any]:
    """What the weights depend on besides the neighbours and the tokenizers."""
    retriever = run.settings_of("retriever")["retriever"]
    return {
        **run.depends_on("sentinels", "objective", "packing", "model", "seed"),
        "training": training_settings(run.experiment.training, run.seq_len),
        "retriever": {name: retriever.get(name) for name in DRAWN_IN_TRAINING},
        "mix": mixed_fingerprints(run),
        "start": start_digest(run),
        **run.layout_inputs(),
    }


STAGE = Stage(
    "pretraining",
    version=4,
    inputs=pretraining_inputs,
    make=make_pretraining,
    needs=("neighbours",),
    files=(TEXT_TOKENIZER, IMAGE_TOKENIZER),
    settings=recorded(
        "sentinels", "objective", "packing", "model", "training", "retriever", "seed", "shards"
    ),
    results=("*.safetensors", "config.json", ORIGIN),
    expensive=True,
    trains=lambda run: True,
)
