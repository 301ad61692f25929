"""A run: its experiment, and the results of its finished stages."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cm3leon.config import to_mapping
from cm3leon.data.shards import open_shard
from cm3leon.data.token_shards import TokenShard, TokenShards
from cm3leon.io import digest_of, read_log, sha256
from cm3leon.models.base import Model
from cm3leon.objectives.base import Objective
from cm3leon.records import MARKER, read_stage
from cm3leon.registry import MODELS, OBJECTIVES, RETRIEVERS
from cm3leon.retrievers.bank import Bank
from cm3leon.retrievers.base import Retriever
from cm3leon.retrievers.vectors import VectorShards
from cm3leon.secrets import without_secrets
from cm3leon.stages.files import (
    ENCODER,
    SHARD_LISTS,
    TOKENIZER,
    WEIGHTS,
    opened_stage,
    recorded_digest,
)
from cm3leon.stages.tokenized_run import TokenizedRun
from cm3leon.tokenizers.text import LAYOUT
from cm3leon.training.log import Tracking
from cm3leon.types import TokenDocument, UserError
from cm3leon.weights import load_weights


@dataclass(frozen=True, eq=False)
class RunFolder(TokenizedRun):
    """Reads the results of finished stages, each once;
    `folder / NAME` holds the files of a stage."""

    asked_model: Model | None = None
    """The model that is asked instead of the one that the run trained; None: the run's own."""
    own_documents: tuple[TokenDocument, ...] = ()
    """The last documents of the memory bank, which are in memory alone."""
    corpus_fingerprint: str | None = None
    """The source's fingerprint, if whoever opened the run has computed it; None:
    computed when needed."""

    @property
    def tracking(self) -> Tracking:
        """Where its trainings are logged, and the settings that are logged there."""
        return Tracking(self.experiment.loggers, without_secrets(to_mapping(self.experiment)))

    def bank_stage(self, name: str, *files: str) -> Path:
        """Like `stage`, of the run whose documents are the memory bank."""
        if self.bank_folder == self.folder:
            return self.stage(name, *files)
        return opened_stage(self.bank_folder / name, *files, verify=self.verify)

    @property
    def has_retriever(self) -> bool:
        """Whether there is an encoder; an imported run has none."""
        return (self.folder / ENCODER).is_file()

    @cached_property
    def retriever(self) -> Retriever:
        """The trained retriever."""
        section = self.experiment.retriever
        # The run holds the weights, so published ones need not be read or fetched again.
        bare = RETRIEVERS.get(section.name).without_weights(section.config)
        retriever = RETRIEVERS.build(replace(section, config=bare))
        load_weights(self.stage("retriever", WEIGHTS) / WEIGHTS, retriever.encoder)
        retriever.encoder.to(self.device).eval()
        return retriever

    @cached_property
    def encoder_header(self) -> dict[str, Any]:
        """What vector shards record of the encoder that makes them."""
        return {
            "encoder": sha256(self.stage("retriever", WEIGHTS) / WEIGHTS),
            "width": self.retriever.encoder.embed_dim,
        }

    @cached_property
    def tokens(self) -> TokenShards:
        """The training documents, as ids."""
        return TokenShards(
            self.stage("tokens", *SHARD_LISTS), self.tokenizer_digests, self.vocab.layout
        )

    @cached_property
    def vectors(self) -> VectorShards:
        """The vectors of the training documents."""
        return VectorShards(
            self.stage("vectors", *SHARD_LISTS), self.encoder_header, verify=self.verify
        )

    @property
    def bank_folder(self) -> Path:
        """The run folder whose training documents are the memory bank."""
        return self.shards.bank or self.folder

    @cached_property
    def bank(self) -> Bank:
        """The memory bank: the training documents, or those of `shards.bank`,
        and added documents."""
        return self.open_bank()

    @property
    def retrieves_pairs_only(self) -> bool:
        """Whether the strategy refuses documents without a text or an image,
        so that no index holds them."""
        return self.experiment.retriever.config.both_modalities

    @property
    def has_bank(self) -> bool:
        """Whether the memory bank is finished."""
        return (self.bank_folder / "index" / MARKER).is_file()

    def open_bank(self, *, with_added: bool = True) -> Bank:
        """The memory bank, with or without added documents.

        Raises:
            UserError: for a bank without a finished index, or another run's bank without the
                documents of one modality that this run retrieves.
        """
        if not self.has_bank:
            raise UserError(
                f"{self.bank_folder} has no memory bank: its stage index is not finished; run its "
                "experiment again, with until=index at least"
            )

        bank = Bank(
            self.bank_stage("vectors", *SHARD_LISTS),
            self.bank_stage("index"),
            self.encoder_header,
            with_added=with_added,
            verify=self.verify,
        )

        # An index of pairs has no documents of one modality, which this run retrieves too.
        if bank.pairs_only and not self.retrieves_pairs_only:
            raise UserError(
                f"shards.bank: the index of {self.bank_folder} holds only documents with text and "
                "image; set retriever.both_modalities=true, or make that run's index again with "
                "false"
            )
        return bank

    @cached_property
    def bank_tokens(self) -> TokenShards:
        """The documents of the memory bank as ids, without added ones."""
        return TokenShards(
            self.bank_stage("tokens", *SHARD_LISTS), self.tokenizer_digests, self.vocab.layout
        )

    def bank_document(self, row: int) -> TokenDocument:
        """A document of the memory bank, as ids."""
        if self.own_documents and row >= (first := len(self.bank) - len(self.own_documents)):
            return self.own_documents[row - first]
        made = len(self.bank_tokens)
        if row < made:
            return self.bank_tokens.document(row)
        return self.added_tokens.document(row - made)

    @property
    def added_tokens_file(self) -> Path:
        """The ids of documents that were added to the memory bank."""
        return self.bank_folder / "index" / "added_tokens.arrow"

    @cached_property
    def added_tokens(self) -> TokenShard:
        """The documents that were added to the memory bank, as ids."""
        return TokenShard(open_shard(self.added_tokens_file))

    @cached_property
    def objective(self) -> Objective:
        """The training objective."""
        return OBJECTIVES.build(self.experiment.objective, vocab=self.vocab)

    @cached_property
    def model(self) -> Model:
        """The trained model, or the one that is asked instead."""
        if self.asked_model is not None:
            return self.asked_model
        model = self.new_model()
        load_weights(self.stage("pretraining", WEIGHTS) / WEIGHTS, model)
        return model.to(self.device).eval()

    def new_model(self) -> Model:
        """The model as the seed initialises it."""
        torch.set_rng_state(self.state_of_new_model())
        return self.empty_model()

    def state_of_new_model(self) -> torch.Tensor:
        """State of torch's generator from which the model's first weights are drawn."""
        torch.manual_seed(self.experiment.seed)
        # The image tokenizer's weights come first, so that the model's are other numbers.
        self.new_image_tokenizer()
        return torch.get_rng_state()

    def empty_model(self) -> Model:
        """The model with arbitrary weights: for the meta device."""
        return MODELS.build(self.experiment.model, vocab_size=self.vocab.size)

    def parts_of_answers(self, *, with_bank: bool) -> dict[str, str]:
        """Digests of everything trained or made that the run's answers depend on, by its name.

        Args:
            with_bank: whether documents are retrieved.
        """
        parts = {
            "model": recorded_digest(self.folder / "pretraining", WEIGHTS),
            "text tokenizer": recorded_digest(self.folder / "text_tokenizer", TOKENIZER),
            "image tokenizer": recorded_digest(self.folder / "image_tokenizer", WEIGHTS),
        }
        if self.has_retriever:
            parts["encoder"] = recorded_digest(self.folder / "retriever", WEIGHTS)
        if (self.folder / "text_tokenizer" / LAYOUT).is_file():
            parts["layout"] = recorded_digest(self.folder / "text_tokenizer", LAYOUT)
        if not with_bank:
            return parts

        # Added documents belong to the bank too, whether they lie in a file or were given here.
        stages = ("tokens", "vectors", "index")
        files = [read_stage(self.bank_folder / stage)["fingerprint"] for stage in stages]
        added = self.added_tokens_file
        files.append(sha256(added) if added.is_file() else "")
        files += [_digest(document) for document in self.own_documents]
        return {**parts, "memory bank": digest_of("".join(files))}

    def log(self, stage: str) -> list[dict[str, float]]:
        """The training records of a stage; [] if it did not train."""
        return read_log(self.folder / stage / "log.jsonl")


def _digest(document: TokenDocument) -> str:
    """Of the ids of all its segments."""
    ids = [segment.ids_T.tolist() for segment in document.segments]
    return digest_of(json.dumps(ids))
