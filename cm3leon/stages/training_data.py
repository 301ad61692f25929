"""Training samples: documents with the retrieved ones drawn for them, from memory or from shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.data.mixture import Mixture, sampling_rates
from cm3leon.data.shuffle import shuffled
from cm3leon.data.token_shards import TokenShards
from cm3leon.io import sha256
from cm3leon.records import read_stage
from cm3leon.retrievers.neighbours import NeighbourShards
from cm3leon.stages.artifacts import SHARD_LISTS, WEIGHTS, Run, opened_stage
from cm3leon.stages.generations import check_generations
from cm3leon.stages.neighbours import bank_of
from cm3leon.tasks.base import with_segment
from cm3leon.training.steps import MANIFEST, checkpoints
from cm3leon.types import Sample, TokenDocument, UserError


@dataclass(frozen=True)
class TrainingSamples:
    """The endless stream of training samples, a `Draw`: at each position a document of one of the corpora."""

    corpora: Sequence[CorpusInMemory | ShardedCorpus]
    at: Callable[[int], tuple[int, int]]
    """Position -> the number of the corpus, and the document's row in it."""
    epoch: int
    """Positions of an epoch."""

    def __call__(self, position: int, rng: np.random.Generator) -> Sample:
        source, row = self.at(position)
        return self.corpora[source].sample(row, rng)


def training_samples(run: Run) -> TrainingSamples:
    """The stream of training samples of an experiment."""
    return _from_memory(run) if run.experiment.shards is None else _from_shards(run)


def mixed_fingerprints(run: Run) -> list[Any]:
    """Changes with other runs whose samples are mixed in, and with their shares."""
    folders = run.experiment.shards.mix if run.experiment.shards else {}
    return [[share, *_fingerprints(Path(name))] for name, share in folders.items()]


def start_digest(run: Run) -> str | None:
    """Changes with the weights that the training starts from; None where these are random.

    Raises:
        UserError: for a folder without a finished pretraining, or whose tokenizers are others by now, or without a
            checkpoint to go on from.
    """
    config = run.experiment.training
    if config.start is None:
        return None
    folder = config.start / "pretraining"
    try:
        files = read_stage(folder)["files"]
    except (OSError, UserError) as error:
        raise UserError(
            f"training.start: {config.start} is no run with a finished pretraining"
        ) from error
    check_generations(config.start, ("pretraining",), where="training.start")
    if config.start_with == "weights":
        return files.get(WEIGHTS)
    newest = checkpoints(folder)[-1:]
    if not newest:
        raise UserError(
            f"training.start: {folder} has no checkpoint to go on from; set start_with=weights"
        )
    return sha256(newest[0] / MANIFEST)


def _fingerprints(folder: Path) -> list[str]:
    try:
        stages = [
            folder / "tokens",
            folder / "neighbours",
            bank_of(folder / "neighbours") / "tokens",
        ]
        return [read_stage(stage)["fingerprint"] for stage in stages]
    except (OSError, UserError) as error:
        raise UserError(
            f"shards.mix: {folder} is no run with finished neighbours; make it with until=neighbours first"
        ) from error


# ------------------------------------------------------------------------------------------------ from memory


@dataclass(frozen=True)
class CorpusInMemory:
    """The training documents of a corpus in memory, which are the memory bank too: both have the same rows."""

    run: Run

    def neighbours_VK(self, row: int) -> np.ndarray:
        """Rows of the bank for a document, see `Neighbours`."""
        return self.run.neighbours.rows_VBK[:, row]

    def sample(self, row: int, rng: np.random.Generator) -> Sample:
        """A document with retrieved documents drawn for it, a version of each image drawn too."""
        config = self.run.experiment.retriever.config
        rows = self.run.neighbours.draw(
            row, most=config.max_documents, random_count=config.random_count, rng=rng
        )
        return Sample(self._version(row, rng), tuple(self._version(other, rng) for other in rows))

    def _version(self, row: int, rng: np.random.Generator) -> TokenDocument:
        """A document with one of the versions of its image."""
        run = self.run
        codes_N = run.varied_codes_VBN[rng.integers(len(run.varied_codes_VBN)), row]
        original = run.token_documents[run.bank_rows[row]]
        return with_segment(original, "image", run.vocab.image_ids(codes_N))


def _from_memory(run: Run) -> TrainingSamples:
    documents = len(run.corpus.rows("train"))

    def at(position: int) -> tuple[int, int]:
        return 0, shuffled(run.experiment.seed, position, documents)

    return TrainingSamples([CorpusInMemory(run)], at, documents)


# ------------------------------------------------------------------------------------------------ from shards


@dataclass(frozen=True)
class ShardedCorpus:
    """The training documents of a run's folder, with their neighbours and the documents of the bank these are in."""

    folder: Path
    run: Run

    @cached_property
    def tokens(self) -> TokenShards:
        """The documents. Raises UserError if other tokenizers made them, or one is too long for a block."""
        tokens = TokenShards(self._stage("tokens"), self.run.made_by)
        room = self.run.seq_len - 2
        if self.run.experiment.packing.query_is_whole and tokens.longest > room:
            raise UserError(
                f"model.seq_len: {tokens.folder} has a document of {tokens.longest} tokens, a block holds {room}; "
                "raise model.seq_len, or set packing.method=stream"
            )
        return tokens

    @cached_property
    def neighbours(self) -> NeighbourShards:
        """Rows of the bank for each document."""
        return NeighbourShards(self._stage("neighbours"))

    @cached_property
    def bank(self) -> TokenShards:
        """The documents of the memory bank."""
        # This run's own bank is where its settings say now; it may have been moved since.
        own = self.folder == self.run.folder
        bank = self.run.bank_folder if own else bank_of(self._stage("neighbours"))
        return TokenShards(
            opened_stage(bank / "tokens", *SHARD_LISTS, verify=self.run.verify), self.run.made_by
        )

    def _stage(self, name: str) -> Path:
        return opened_stage(self.folder / name, *SHARD_LISTS, verify=self.run.verify)

    def neighbours_VK(self, row: int) -> np.ndarray:
        """Rows of the bank for a document, see `NeighbourShards.rows`."""
        return self.neighbours.rows(row)

    def sample(self, row: int, rng: np.random.Generator) -> Sample:
        """A document with retrieved documents drawn for it."""
        config = self.run.experiment.retriever.config
        rows = self.neighbours.draw(
            row, most=config.max_documents, random_count=config.random_count, rng=rng
        )
        return Sample(self.tokens.document(row), tuple(self.bank.document(other) for other in rows))


def _from_shards(run: Run) -> TrainingSamples:
    mix = run.shards.mix
    corpora = [ShardedCorpus(folder, run) for folder in (run.folder, *map(Path, mix))]
    counts = [len(corpus.tokens) for corpus in corpora]
    mixture = Mixture(counts, sampling_rates(counts, [1.0, *mix.values()]), run.experiment.seed)

    def at(position: int) -> tuple[int, int]:
        source, row, _ = mixture.at(position)
        return source, row

    return TrainingSamples(corpora, at, len(mixture))
