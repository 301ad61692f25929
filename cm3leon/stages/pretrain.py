"""Pretraining: the decoder on retrieval-augmented samples under the CM3 objective."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cm3leon.data.shuffle import shuffled
from cm3leon.decoders.engine import generate
from cm3leon.models.attention import choose
from cm3leon.models.transformer import Transformer
from cm3leon.objectives.base import Corrupted
from cm3leon.objectives.packing import BlockStream, collate, fit, pack
from cm3leon.registry import DECODERS, TASKS
from cm3leon.stages.artifacts import WEIGHTS, Run
from cm3leon.stages.pipeline import write_json
from cm3leon.stages.training_data import training_samples
from cm3leon.tokenizers.document import lay_out
from cm3leon.training.checkpoint import load_weights, save_weights
from cm3leon.training.costs import model_flops, peak_flops
from cm3leon.training.device import autocast
from cm3leon.training.meter import Meter
from cm3leon.training.parallel import distributed, whole_state
from cm3leon.training.trainer import Shares, train
from cm3leon.types import Batch, Sample, UserError

SHOWN = 16
"""Images drawn for TensorBoard during training."""


def make_pretraining(run: Run, folder: Path) -> None:
    """Trains the decoder; draws validation figures and images for TensorBoard now and then.

    Raises:
        UserError: if no document is there to validate with.
    """
    if not len(run.corpus.rows("validation")):
        raise UserError(
            "shards.sample: no document sampled has a caption and an image to validate with; raise it, or stop at "
            "until=neighbours and mix this run into another with shards.mix"
        )
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
    model = distributed(lambda: first_weights(run), run.empty_model, config, ranks)
    if ranks.first and isinstance(model, Transformer):
        print(f"      attention: {choose(model.config.attention, run.device)[0]}", flush=True)

    def loss(module: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        value, figures = _loss(run, module, batch.to(run.device), z_loss=config.z_loss)
        if isinstance(model, Transformer):
            figures = {**figures, "flops": model_flops(model.config, model.vocab_size, batch.sample_BT)}
        return value, figures

    def callback(step: int, writer: Any) -> dict[str, float]:
        model.eval()
        if not ranks.joined:  # drawing reads the model token by token, which a sharded one does not offer
            images_BHWC, captions = draw_images(run, model)
            writer.add_images("generated", images_BHWC, step, dataformats="NHWC")
            writer.add_text("prompts", "\n\n".join(captions), step)
        return {"epoch": stream.drawn / samples.epoch, **validation_loss(run, model)}

    train(
        model,
        loss,
        stream,
        config,
        folder=folder,
        device=run.device,
        seed=seed,
        title="pretraining",
        callback=callback,
        shares=Shares(
            parts=lambda batch: batch.split(config.micro_batch or len(batch.ids_BT)),
            weight=lambda part: float(part.weight_BT.sum()),
            ids=stream.ids,
        ),
        ranks=ranks,
        goes_on_from=config.start / "pretraining" if config.start and config.start_with == "everything" else None,
        peak_flops=peak_flops(run.device, ranks.count),
    )
    state, figures = whole_state(model), validation_loss(run, model)
    if ranks.first:
        save_weights(folder / WEIGHTS, state)
        write_json(folder / "config.json", {**run.section("model"), "vocab_size": run.vocab.size})
        write_json(folder / "validation.json", figures)
    ranks.barrier()


def first_weights(run: Run) -> nn.Module:
    """The decoder before its training: with random weights, or those of the run that it starts from.

    Raises:
        UserError: for a run to start from that has no weights, or those of another model.
    """
    model, start = run.new_model(), run.experiment.training.start
    if start and run.experiment.training.start_with == "weights":
        load_weights(start / "pretraining" / WEIGHTS, model)
    return model


@torch.inference_mode()
def validation_loss(run: Run, model: nn.Module) -> dict[str, float]:
    """Losses of the validation documents without retrieval, under the same corruption every time, in nats a token.

    The ranks share the documents; those that have fewer compute some twice, as all have to compute equally often.
    """
    batches, ranks = list(_validation_batches(run)), run.ranks
    meter = Meter(ranks)
    for first in range(0, len(batches), ranks.count):
        number = first + ranks.rank
        batch = batches[number % len(batches)].to(run.device)
        with autocast(run.device, run.experiment.training.precision):
            value, figures = _loss(run, model, batch)
        if number < len(batches):
            weight = batch.weight_BT.sum()
            meter.add({"loss": (value * weight, weight), **figures})
        else:
            meter.add({name: (value * 0, value * 0) for name in ("loss", *figures)})
    return {name: value for name, value in meter.read().items() if not name.endswith("_per_second")}


def _validation_batches(run: Run) -> Iterator[Batch]:
    blocks: list[list[Corrupted]] = [[]]
    for row in run.corpus.rows("validation"):
        rng = np.random.default_rng([run.experiment.seed, 2, int(row)])
        laid_out = lay_out(fit(Sample(run.token_documents[row]), run.seq_len), run.vocab)
        sample = run.objective.corrupt(laid_out, rng, run.seq_len)
        if sum(len(other.ids_T) for other in blocks[-1]) + len(sample.ids_T) > run.seq_len:
            blocks.append([])
        blocks[-1].append(sample)
    config = run.experiment.training
    size = config.micro_batch or max(1, config.blocks(run.seq_len) // run.ranks.count)
    for start in range(0, len(blocks), size):
        packed = [pack(samples, run.seq_len, run.vocab.pad) for samples in blocks[start : start + size]]
        yield collate(packed, torch.device("cpu"))


def draw_images(run: Run, model: nn.Module) -> tuple[np.ndarray, list[str]]:
    """Images (B, H, W, C) for the captions of some validation documents, without retrieval."""
    task = TASKS.build("text_to_image", vocab=run.vocab, image_codes=run.image_tokenizer.grid**2)
    validation = run.corpus.rows("validation")
    rows = [validation[shuffled(0, place, len(validation))] for place in range(min(SHOWN, len(validation)))]
    documents = [run.token_documents[row] for row in rows]
    answers = generate(
        model,
        [task.prompt(document) for document in documents],
        DECODERS.build(run.experiment.decoder),
        vocab=run.vocab,
        seeds=range(len(rows)),
    )
    codes = [run.tokenizer.codes(task.complete(d, answer)) for d, answer in zip(documents, answers, strict=True)]
    return run.image_tokenizer.decode(np.stack(codes)), [run.corpus.captions[row] for row in rows]


def _loss(run: Run, model: nn.Module, batch: Batch, *, z_loss: float = 0.0) -> tuple[Tensor, Any]:
    """The objective's loss and figures; computed inside the model's forward pass, see `Transformer.forward`."""
    return model(
        batch.ids_BT,
        position_BT=batch.position_BT,
        sample_BT=batch.sample_BT,
        readout=lambda hidden_BTD, head: run.objective.loss(hidden_BTD, head, batch, z_loss=z_loss),
    )
