"""What is looked at while the model trains: losses of validation documents,
and images drawn for them."""

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
"""Images that are drawn at a time."""


@torch.inference_mode()
def validation_loss(
    run: RunFolder, model: nn.Module, precision: TrainingPrecision
) -> dict[str, float]:
    """Losses of the validation documents without retrieval, always under the same corruption, in
    nats a token.

    `loss`, `loss_text` and `loss_image`; if corpora are mixed, also `loss/NAME` and so on for each.
    The ranks share the documents; all must compute equally often, so some compute a batch twice.
    """
    sources = validation_documents(run)
    batches = []
    for name, documents in sources.items():
        for batch in _batches(run, documents):
            batches.append((name, batch))

    ranks, meter = run.ranks, Meter(run.ranks)
    for first in range(0, len(batches), ranks.count):
        # Ranks for which no batch is left take one from the beginning again.
        number = first + ranks.rank
        source, batch = batches[number % len(batches)]
        batch = batch.to(run.device)
        with autocast(run.device, precision):
            value, figures = run.objective.loss_of(model, batch)

        # Sums with their weights, which the meter averages; a repeated batch counts nothing.
        weight = batch.weight_BT.sum()
        pairs = {"loss": (value * weight, weight)}
        for name, figure in figures.items():
            if isinstance(figure, tuple):
                pairs[name] = figure
        nothing = {name: (value * 0, value * 0) for name in pairs}
        counts = number < len(batches)
        meter.add(pairs if counts else nothing)

        # All ranks must have the figures of all sources.
        if len(sources) == 1:
            continue
        for name in sources:
            of_source = pairs if counts and name == source else nothing
            meter.add({f"{key}/{name}": pair for key, pair in of_source.items()})
    return meter.read()


def validation_documents(run: RunFolder) -> dict[str, list[tuple[int, TokenDocument]]]:
    """Validation documents that fit a block, each with its row: those of this run,
    and of mixed runs.

    They may have any segments.
    """
    folders = [run.folder, *map(Path, run.shards.mix)]
    names = [folder.name for folder in folders]
    found = {}
    for folder, name in zip(folders, names, strict=True):
        shard = TokenShard(open_shard(folder / "tokens" / VALIDATION))
        fitting = []
        for row in range(len(shard)):
            document = shard.document(row)
            if sample_length(Sample(document), run.vocab.layout) <= run.seq_len:
                fitting.append((row, document))
        if fitting:
            found[name if names.count(name) == 1 else str(folder)] = fitting
    return found


def _batches(run: RunFolder, documents: Sequence[tuple[int, TokenDocument]]) -> Iterator[Batch]:
    """The documents packed whole; each one's row is the seed of its corruption."""
    blocks: list[list[Corrupted]] = [[]]
    for row, document in documents:
        rng = np.random.default_rng([run.experiment.seed, 2, row])
        laid_out = lay_out(fit(Sample(document), run.seq_len, run.vocab.layout), run.vocab)
        sample = run.objective.corrupt(laid_out, rng, run.seq_len)
        filled = sum(len(other.ids_T) for other in blocks[-1])
        if filled + len(sample.ids_T) > run.seq_len:
            blocks.append([])
        blocks[-1].append(sample)

    # As many blocks at a time as in training.
    config = run.experiment.training
    share = max(1, config.blocks(run.seq_len) // run.ranks.count)
    size = config.blocks_at_once(run.seq_len, share)
    for start in range(0, len(blocks), size):
        packed = []
        for samples in blocks[start : start + size]:
            packed.append(pack(samples, run.seq_len, run.vocab.pad))
        yield collate(packed, torch.device("cpu"))


class ValidationImages:
    """Images for the captions of some validation documents, drawn during training without and with
    retrieved documents.

    The ranks share the prompts.

    Args:
        precision: that of the training.
    """

    def __init__(self, run: RunFolder, precision: TrainingPrecision) -> None:
        self._run = run
        self._precision = precision
        self._task = TASKS.build("text_to_image", vocab=run.vocab, grid=run.grid)
        validation = run.rows_to_ask("validation")
        count = min(SHOWN, len(validation))
        self._rows = [validation[shuffled(0, index, len(validation))] for index in range(count)]

    @cached_property
    def _retrieved(self) -> list[list[int]]:
        """Rows of the bank for each document, found once by the first rank."""
        run, found = self._run, None
        if run.ranks.first:
            captions = [run.corpus.captions[row] for row in self._rows]
            count = run.experiment.retriever.config.max_documents
            retrieved = retrieved_rows(run, captions, None, "text", count)
            found = []
            for row, others in zip(self._rows, retrieved, strict=True):
                _, fitting = fitting_prompt(run, self._task, run.token_documents[row], others)
                found.append(fitting)
        return run.ranks.gather(found)[0]

    def write(self, model: Model, loggers: Loggers | None, step: int) -> None:
        """Draw images, and give them to the loggers of the first rank. All ranks must call this.

        `generated` has an image for each caption; in `generated_with_documents` the images of the
        retrieved documents stand before it.
        """
        run, retrieved = self._run, self._retrieved
        captions = [run.corpus.captions[row] for row in self._rows]
        none: list[list[int]] = [[] for _ in self._rows]
        columns = [none]
        if any(retrieved):
            columns.append(retrieved)
        with gathered(model):
            codes = self._draw(model, columns)
        if loggers is None:
            return

        # All images, drawn and retrieved, are decoded at once.
        drawn = len(codes)
        beside = []
        for rows_of_bank in retrieved:
            documents = self._documents_with_images(rows_of_bank)
            beside.append(documents)
            for document in documents:
                codes.append(run.tokenizer.codes(document))
        images_BHWC = run.image_tokenizer.decode(np.stack(codes))
        count = len(self._rows)
        loggers.images(step, "generated", images_BHWC[:count])
        loggers.table(step, "prompts", ["prompt"], [[caption] for caption in captions])
        if not any(retrieved):
            return

        # The codes stand in this order: drawn without documents, drawn with them, retrieved.
        pictures_BHWC = _in_rows(
            images_BHWC[drawn:],
            list(map(len, beside)),
            max(map(len, retrieved)),
            images_BHWC[count:drawn],
        )
        loggers.images(step, "generated_with_documents", pictures_BHWC)
        rows = []
        for found_rows, caption in zip(retrieved, captions, strict=True):
            rows.append([" / ".join(self._captions(found_rows)), caption])
        loggers.table(step, "prompts_with_documents", ["documents", "prompt"], rows)

    def _draw(self, model: Model, columns: Sequence[Sequence[Sequence[int]]]) -> list[np.ndarray]:
        """Codes of an image for each document, for one column of retrieved rows after the other.

        Everything is drawn together, as a step of many rows takes hardly longer than one of few.
        The result is on the first rank.
        """
        run, ranks = self._run, self._run.ranks
        asked = []
        for column in columns:
            asked += list(enumerate(column))

        # Each rank draws every n-th image; an image's seed is the index of its document.
        mine = asked[ranks.rank :: ranks.count]
        documents, prompts, seeds = [], [], []
        for index, rows in mine:
            document = run.token_documents[self._rows[index]]
            retrieved = [run.bank_document(row) for row in rows]
            documents.append(document)
            prompts.append(self._task.prompt(document, retrieved))
            seeds.append(index)
        with autocast(run.device, self._precision):
            answers = generate(
                model,
                prompts,
                DECODERS.build(run.experiment.decoder),
                vocab=run.vocab,
                seeds=seeds,
            )

        codes = []
        for document, answer_T in zip(documents, answers, strict=True):
            codes.append(run.tokenizer.codes(self._task.complete(document, answer_T)))

        # Image n is number n // count of rank n % count.
        shares = ranks.gather(codes)
        return [shares[n % ranks.count][n // ranks.count] for n in range(len(asked))]

    def _documents_with_images(self, rows: Sequence[int]) -> list[TokenDocument]:
        documents = []
        for row in rows:
            document = self._run.bank_document(row)
            if document.segment("image"):
                documents.append(document)
        return documents

    def _captions(self, rows: Sequence[int]) -> list[str]:
        return [self._run.tokenizer.caption(self._run.bank_document(row)) for row in rows]


def _in_rows(
    beside_NHWC: np.ndarray, counts: Sequence[int], most: int, images_BHWC: np.ndarray
) -> np.ndarray:
    """Images with those of their retrieved documents before them, two white pixels apart and
    aligned at the right.

    Args:
        beside_NHWC: images of documents, `counts` of them for each image.
        most: most documents before an image.
    """
    B, H, W, C = images_BHWC.shape
    pictures_BHWC = np.full((B, H, most * (W + 2) + W, C), 255, np.uint8)
    parts = np.split(beside_NHWC, np.cumsum(counts)[:-1])

    # The image itself stands last; fewer documents leave white columns at the left.
    for picture_HWC, part_NHWC, image_HWC in zip(pictures_BHWC, parts, images_BHWC, strict=True):
        for column, shown_HWC in enumerate([*part_NHWC, image_HWC], start=most - len(part_NHWC)):
            left = column * (W + 2)
            picture_HWC[:, left : left + W] = shown_HWC
    return pictures_BHWC
