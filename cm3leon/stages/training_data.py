"""Training samples: documents with retrieved ones drawn for them,
from the shards of some corpora."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.data.mixture import Mixture, sampling_rates
from cm3leon.data.token_shards import TokenShards
from cm3leon.io import sha256
from cm3leon.records import read_stage
from cm3leon.retrievers.neighbours import NeighbourShards
from cm3leon.stages.files import SHARD_LISTS, WEIGHTS, opened_stage
from cm3leon.stages.generations import check_generations
from cm3leon.stages.neighbours import bank_of
from cm3leon.stages.run_folder import RunFolder
from cm3leon.training.steps import MANIFEST, checkpoints
from cm3leon.types import Sample, UserError


@dataclass(frozen=True)
class TrainingSamples:
    """The endless stream of training samples, a `Draw`:
    each position is a document of one of the corpora."""

    corpora: Sequence[TrainingCorpus]
    at: Callable[[int], tuple[int, int]]
    """Maps a position to the index of a corpus and the document's row in it."""
    epoch: int
    """Positions of an epoch."""

    def __call__(self, position: int, rng: np.random.Generator) -> Sample:
        source, row = self.at(position)
        return self.corpora[source].sample(row, rng)


def training_samples(run: RunFolder) -> TrainingSamples:
    """The stream of training samples of an experiment: its own corpus,
    and those that are mixed in."""
    mix = run.shards.mix
    corpora = [TrainingCorpus(folder, run) for folder in (run.folder, *map(Path, mix))]
    counts = [len(corpus.tokens) for corpus in corpora]
    mixture = Mixture(counts, sampling_rates(counts, [1.0, *mix.values()]), run.experiment.seed)

    def at(position: int) -> tuple[int, int]:
        source, row, _ = mixture.at(position)
        return source, row

    return TrainingSamples(corpora, at, len(mixture))


def mixed_fingerprints(run: RunFolder) -> list[Any]:
    """Fingerprints of the runs whose samples are mixed in, with their shares."""
    found: list[Any] = []
    for name, share in run.shards.mix.items():
        found.append([share, *_fingerprints(Path(name))])
    return found


def start_digest(run: RunFolder) -> str | None:
    """Digest of the weights that the training starts from; None if they are random.

    Raises:
        UserError: for a folder without a finished pretraining, with other tokenizers than it was
            trained with, or without a checkpoint to continue from.
    """
    config = run.experiment.training
    if config.start is None:
        return None
    folder = config.start / "pretraining"
    try:
        files = read_stage(folder)["files"]
    except (OSError, UserError) as error:
        # What `export to=hf` wrote has its settings where no run has them.
        is_export = (config.start / "config.json").is_file()
        hint = ""
        if is_export:
            hint = f"; make a run of it with: import from=export hf={config.start} out=DIR"
        raise UserError(
            f"training.start: {config.start} is not the folder of a run with a finished "
            f"pretraining{hint}"
        ) from error
    check_generations(config.start, ("pretraining",), where="training.start")
    if config.start_with == "weights":
        return files.get(WEIGHTS)
    newest = checkpoints(folder)[-1:]
    if not newest:
        raise UserError(
            f"training.start: {folder} has no checkpoint to continue from; set "
            "training.start_with=weights"
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
            f"shards.mix: {folder} is not the folder of a run with finished neighbours; make it "
            "with until=neighbours first"
        ) from error


@dataclass(frozen=True)
class TrainingCorpus:
    """The training documents in a run's folder,
    with their neighbours and the documents of the bank."""

    folder: Path
    run: RunFolder

    @cached_property
    def tokens(self) -> TokenShards:
        """The documents. Raises UserError if other tokenizers made them,
        or one is too long for a block."""
        tokens = TokenShards(
            self._stage("tokens"), self.run.tokenizer_digests, self.run.vocab.layout
        )
        room = self.run.seq_len - 2
        if self.run.experiment.packing.query_is_whole and tokens.longest > room:
            raise UserError(
                f"model.seq_len: {tokens.folder} has a document of {tokens.longest} tokens, a "
                f"block holds {room}; raise model.seq_len, or set packing.method=stream"
            )
        return tokens

    @cached_property
    def neighbours(self) -> NeighbourShards:
        """Rows of the bank for each document."""
        return NeighbourShards(self._stage("neighbours"))

    @cached_property
    def bank(self) -> TokenShards:
        """The documents of the memory bank."""
        # The settings say where this run's bank is; it may have been moved since the search.
        own = self.folder == self.run.folder
        bank = self.run.bank_folder if own else bank_of(self._stage("neighbours"))
        tokens = TokenShards(
            opened_stage(bank / "tokens", *SHARD_LISTS, verify=self.run.verify),
            self.run.tokenizer_digests,
            self.run.vocab.layout,
        )
        if self.tokens.shared_maps and tokens.shared_maps != self.tokens.shared_maps:
            raise UserError(
                f"augment.shared: {self.folder} takes documents from {bank}, whose images were "
                "varied by other maps; give both runs the same section augment and the same seed"
            )
        return tokens

    def _stage(self, name: str) -> Path:
        return opened_stage(self.folder / name, *SHARD_LISTS, verify=self.run.verify)

    def neighbours_VK(self, row: int) -> np.ndarray:
        """Rows of the bank for a document, see `NeighbourShards.rows`."""
        return self.neighbours.rows(row)

    def sample(self, row: int, rng: np.random.Generator) -> Sample:
        """A document with retrieved documents drawn for it.

        If images are varied, each document is in a version of its own, or all are in one where the
        maps are shared.
        """
        config = self.run.experiment.retriever.config
        rows = self.neighbours.draw(
            row, most=config.max_documents, random_count=config.random_count, rng=rng
        )
        if self.tokens.shared_maps:
            version = self.tokens.drawn_version(rng)
            retrieved = [self.bank.document(other, version) for other in rows]
            return Sample(self.tokens.document(row, version), tuple(retrieved))
        query = self.tokens.drawn(row, rng)
        return Sample(query, tuple(self.bank.drawn(other, rng) for other in rows))
