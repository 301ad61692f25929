"""What is looked at while the decoder trains: losses of validation documents,
and images drawn for their captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cm3leon.data.shards import open_shard
from cm3leon.data.shuffle import shuffled
from cm3leon.data.token_shards import TokenShard
from cm3leon.decoders.generate import generate
from cm3leon.loggers.base import Loggers
from cm3leon.models.base import Model
from cm3leon.objectives.base import Corrupted
from cm3leon.objectives.packing import collate, fit, pack
from cm3leon.registry import DECODERS, TASKS
from cm3leon.stages.prompts import fitting_prompt, retrieved_rows
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.tokens import VALIDATION
from cm3leon.tokenizers.document import lay_out, sample_length
from cm3leon.training.device import autocast
from cm3leon.training.meter import Meter
from cm3leon.training.parallel import gathered
from cm3leon.types import Batch, Sample, TokenDocument, TrainingPrecision

SHOWN = 16
"""Images drawn for the loggers at a time."""


@torch.inference_mode()
def validation_loss(
    run: RunFolder, model: nn.Module, precision: TrainingPrecision
) -> dict[str, float]:
    """Losses of the validation documents without retrieval, under the same corruption every time,
    in nats a token.

    `loss`, `loss_text` and `loss_image`; where corpora are mixed, `loss/NAME` and so on for each of
    them too. The ranks share the documents; those that have fewer compute some twice,
    as all have to compute equally often.
    """
    sources = validation_documents(run)
    batches = [
        (name, batch) for name, documents in sources.items() for batch in _batches(run, documents)
    ]
    ranks, meter = run.ranks, Meter(run.ranks)
    for first in range(0, len(batches), ranks.count):
        number = first + ranks.rank
        source, batch = batches[number % len(batches)]
        batch = batch.to(run.device)
        with autocast(run.device, precision):
            value, figures = run.objective.loss_of(model, batch)
        weight = batch.weight_BT.sum()
        pairs = {"loss": (value * weight, weight)}
        pairs |= {name: figure for name, figure in figures.items() if isinstance(figure, tuple)}
        nothing = {name: (value * 0, value * 0) for name in pairs}
        meter.add(pairs if number < len(batches) else nothing)
        if len(sources) == 1:
            continue
        for name in sources:
            counts = number < len(batches) and name == source
            meter.add(
                {f"{key}/{name}": pair for key, pair in (pairs if counts else nothing).items()}
            )
    return meter.read()


def validation_documents(run: RunFolder) -> dict[str, list[tuple[int, TokenDocument]]]:
    """Validation documents that fit into a block, each with its number: those of this run,
    and of runs mixed into it.

    They are of any segments.
    """
    folders = [run.folder, *map(Path, run.shards.mix)]
    names = [folder.name for folder in folders]
    found = {}
    for folder, name in zip(folders, names, strict=True):
        shard = TokenShard(open_shard(folder / "tokens" / VALIDATION))
        numbered = [(row, shard.document(row)) for row in range(len(shard))]
        fitting = [
            (row, document)
            for row, document in numbered
            if sample_length(Sample(document), run.vocab.layout) <= run.seq_len
        ]
        if fitting:
            found[name if names.count(name) == 1 else str(folder)] = fitting
    return found


def _batches(run: RunFolder, documents: Sequence[tuple[int, TokenDocument]]) -> Iterator[Batch]:
    """The documents packed whole; the number of each is the seed of its corruption."""
    blocks: list[list[Corrupted]] = [[]]
    for row, document in documents:
        rng = np.random.default_rng([run.experiment.seed, 2, row])
        laid_out = lay_out(fit(Sample(document), run.seq_len, run.vocab.layout), run.vocab)
        sample = run.objective.corrupt(laid_out, rng, run.seq_len)
        if sum(len(other.ids_T) for other in blocks[-1]) + len(sample.ids_T) > run.seq_len:
            blocks.append([])
        blocks[-1].append(sample)
    config = run.experiment.training
    share = max(1, config.blocks(run.seq_len) // run.ranks.count)
    size = config.blocks_at_once(run.seq_len, share)
    for start in range(0, len(blocks), size):
        packed = [
            pack(samples, run.seq_len, run.vocab.pad) for samples in blocks[start : start + size]
        ]
        yield collate(packed, torch.device("cpu"))


class Drawing:
    """Images for the captions of some validation documents, drawn now and then:
    without and with retrieved documents.

    The ranks share the prompts.

    Args:
        precision: that of the training.
    """

    def __init__(self, run: RunFolder, precision: TrainingPrecision) -> None:
        self._run = run
        self._precision = precision
        self._task = TASKS.build("text_to_image", vocab=run.vocab, grid=run.grid)
        validation = run.rows_to_ask("validation")
        self._rows = [
            validation[shuffled(0, place, len(validation))]
            for place in range(min(SHOWN, len(validation)))
        ]

    @cached_property
    def _retrieved(self) -> list[list[int]]:
        """Rows of the bank for each document, found once, by the first rank."""
        run, found = self._run, None
        if run.ranks.first:
            captions = [run.corpus.captions[row] for row in self._rows]
            count = run.experiment.retriever.config.max_documents
            of_rows = zip(
                self._rows, retrieved_rows(run, captions, None, "text", count), strict=True
            )
            found = [
                fitting_prompt(run, self._task, run.token_documents[row], others)[1]
                for row, others in of_rows
            ]
        return run.ranks.gather(found)[0]

    def write(self, model: Model, loggers: Loggers | None, step: int) -> None:
        """Draws, and gives the images to the loggers, which the first rank has.
        All ranks have to call it.

        `generated` has an image for each caption; in `generated_with_documents` those of the
        retrieved documents stand before it.
        """
        run, retrieved = self._run, self._retrieved
        captions = [run.corpus.captions[row] for row in self._rows]
        none: list[list[int]] = [[] for _ in self._rows]
        with gathered(model):
            codes = self._draw(model, [none, retrieved] if any(retrieved) else [none])
        if loggers is None:
            return

        # All images, drawn and retrieved, are decoded at once.
        drawn = len(codes)
        beside = [self._documents_with_images(found) for found in retrieved]
        codes += [run.tokenizer.codes(document) for found in beside for document in found]
        images_BHWC = run.image_tokenizer.decode(np.stack(codes))
        count = len(self._rows)
        loggers.images(step, "generated", images_BHWC[:count])
        loggers.table(step, "prompts", ["prompt"], [[caption] for caption in captions])
        if not any(retrieved):
            return
        pictures_BHWC = _in_rows(
            images_BHWC[drawn:],
            list(map(len, beside)),
            max(map(len, retrieved)),
            images_BHWC[count:drawn],
        )
        loggers.images(step, "generated_with_documents", pictures_BHWC)
        rows = [
            [" / ".join(self._captions(found)), caption]
            for found, caption in zip(retrieved, captions, strict=True)
        ]
        loggers.table(step, "prompts_with_documents", ["documents", "prompt"], rows)

    def _draw(self, model: Model, columns: Sequence[Sequence[Sequence[int]]]) -> list[np.ndarray]:
        """Codes of an image for each document, on the first rank: for all of them by a column of
        retrieved rows, then by the next. They are drawn together:
        a step of many rows takes hardly longer than one of few."""
        run, ranks = self._run, self._run.ranks
        asked = [(place, found[place]) for found in columns for place in range(len(self._rows))]
        mine = asked[ranks.rank :: ranks.count]
        documents = [run.token_documents[self._rows[place]] for place, _ in mine]
        prompts = [
            self._task.prompt(document, [run.bank_document(row) for row in found])
            for document, (_, found) in zip(documents, mine, strict=True)
        ]
        with autocast(run.device, self._precision):
            answers = generate(
                model,
                prompts,
                DECODERS.build(run.experiment.decoder),
                vocab=run.vocab,
                seeds=[place for place, _ in mine],
            )
        codes = [
            run.tokenizer.codes(self._task.complete(*pair))
            for pair in zip(documents, answers, strict=True)
        ]
        shares = ranks.gather(codes)
        return [shares[n % ranks.count][n // ranks.count] for n in range(len(asked))]

    def _documents_with_images(self, rows: Sequence[int]) -> list[TokenDocument]:
        documents = [self._run.bank_document(row) for row in rows]
        return [document for document in documents if document.segment("image")]

    def _captions(self, rows: Sequence[int]) -> list[str]:
        return [self._run.tokenizer.caption(self._run.bank_document(row)) for row in rows]


def _in_rows(
    beside_NHWC: np.ndarray, counts: Sequence[int], most: int, images_BHWC: np.ndarray
) -> np.ndarray:
    """Images with those of their retrieved documents before them, two white pixels apart,
    ending at the same place.

    Args:
        beside_NHWC: images of documents, `counts` of them for each image.
        most: documents that any image may have before it.
    """
    B, H, W, C = images_BHWC.shape
    pictures_BHWC = np.full((B, H, most * (W + 2) + W, C), 255, np.uint8)
    parts = np.split(beside_NHWC, np.cumsum(counts)[:-1])
    for picture_HWC, part_NHWC, image_HWC in zip(pictures_BHWC, parts, images_BHWC, strict=True):
        for place, shown_HWC in enumerate([*part_NHWC, image_HWC], start=most - len(part_NHWC)):
            picture_HWC[:, place * (W + 2) : place * (W + 2) + W] = shown_HWC
    return pictures_BHWC
