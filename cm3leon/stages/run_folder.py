"""A run: its experiment, and what its finished stages have left in the run folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cm3leon.config import recorded_settings, result_settings, to_mapping
from cm3leon.data.augment import varied
from cm3leon.data.corpus import Corpus, Split
from cm3leon.data.shards import INDEX, PLAN, open_shard
from cm3leon.data.source import Source
from cm3leon.data.token_shards import Tokenizers, TokenShard, TokenShards
from cm3leon.digests import path_digest
from cm3leon.experiment import Experiment, ShardsConfig
from cm3leon.io import digest_of, digest_of_parts, read_json, read_log, sha256
from cm3leon.models.base import Model
from cm3leon.objectives.base import Objective
from cm3leon.records import MARKER, check_stage, read_array, read_stage
from cm3leon.registry import IMAGE_TOKENIZERS, MODELS, OBJECTIVES, RETRIEVERS, SOURCES
from cm3leon.retrievers.bank import Bank
from cm3leon.retrievers.base import Retriever
from cm3leon.retrievers.vectors import VectorShards
from cm3leon.tokenizers.document import DocumentTokenizer, token_count
from cm3leon.tokenizers.image.base import ImageTokenizer
from cm3leon.tokenizers.layout import Grid, LayoutTable
from cm3leon.tokenizers.text import LAYOUT, TextTokenizer, layout_table
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.training.checkpoint import load_weights
from cm3leon.training.distributed import Ranks
from cm3leon.types import TokenDocument, UserError

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
TEXT_TOKENIZER, IMAGE_TOKENIZER, ENCODER = (
    f"text_tokenizer/{TOKENIZER}",
    f"image_tokenizer/{WEIGHTS}",
    f"retriever/{WEIGHTS}",
)
"""Files of a run that another one may take over."""
GEOMETRY = "geometry.json"
"""What a run keeps of a published image tokenizer beside its weights."""
SHARD_LISTS = (PLAN, INDEX)
"""Files of a stage in shards; the shards carry checksums of their own."""


@dataclass(frozen=True, eq=False)
class RunFolder:
    """Reads results of finished stages, each once. `folder / <stage name>` holds a stage's files."""

    experiment: Experiment
    folder: Path
    device: torch.device
    joined: Ranks | None = None
    """The processes that train together; None = this one alone."""
    verify: bool = True
    """Whether a file is compared with its recorded checksum before it is read, once in a process."""
    finished: bool = False
    """Whether the run was opened to be asked: stages that are not finished are refused then."""
    asked_model: Model | None = None
    """The decoder that is asked in place of the one that the run trained; None = that one."""

    @cached_property
    def ranks(self) -> Ranks:
        """The processes that train together, be it this one alone."""
        return self.joined or Ranks(self.device)

    def stage(self, name: str, *files: str) -> Path:
        """The folder of a stage, whose files (all, if none is named) are compared with its record first.

        Raises:
            UserError: for a file that is missing or has changed, or a stage that is not finished.
        """
        return opened_stage(self.folder / name, *files, verify=self.verify, finished=self.finished)

    def bank_stage(self, name: str, *files: str) -> Path:
        """The same for a stage of the run whose documents are the memory bank."""
        if self.bank_folder == self.folder:
            return self.stage(name, *files)
        return opened_stage(self.bank_folder / name, *files, verify=self.verify)

    @cached_property
    def source(self) -> Source:
        """The corpus that the documents come from."""
        return SOURCES.build(self.experiment.data)

    @cached_property
    def corpus(self) -> Corpus:
        """The documents of the sample, with their split."""
        return Corpus.load(self.stage("documents"))

    @cached_property
    def varied_images(self) -> np.ndarray:
        """The training images of the sample, then their varied versions one after the other:
        ((1 + versions) * B, H, W, C)."""
        rows = self.corpus.rows("train")
        images_BHWC, ids = self.corpus.images_BHWC[rows], [self.corpus.ids[row] for row in rows]
        versions = varied(images_BHWC, ids, self.experiment.augment, self.experiment.seed)
        return np.concatenate([images_BHWC, *versions])

    @property
    def shards(self) -> ShardsConfig:
        """The section `shards` of the experiment."""
        return self.experiment.shards

    @property
    def reused(self) -> Path | None:
        """Run folder whose tokenizers and encoder are used instead of trained ones."""
        return self.shards.tokenizers

    def reused_file(self, name: str) -> Path:
        """A file of that run. Raises UserError where it is missing."""
        assert self.reused is not None
        file = self.reused / name
        if not file.is_file():
            raise UserError(
                f"shards.tokenizers: {self.reused} is no run with trained tokenizers, {file} is missing"
            )
        opened_stage(file.parent, file.name, verify=self.verify)
        return file

    @property
    def reuses_encoder(self) -> bool:
        """Whether that run has an encoder; one that stopped at its tokenizers has none."""
        return self.reused is not None and (self.reused / ENCODER).is_file()

    def reused_digest(self, name: str) -> str | None:
        """Changes with a file that is taken over, None where nothing is."""
        if self.reused is None or (name == ENCODER and not self.reuses_encoder):
            return None
        return sha256(self.reused_file(name))

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """The trained text tokenizer."""
        return TextTokenizer.load(
            self.stage("text_tokenizer", TOKENIZER), self.experiment.text_tokenizer
        )

    @cached_property
    def image_tokenizer(self) -> ImageTokenizer:
        """The trained image tokenizer."""
        tokenizer = self.new_image_tokenizer()
        load_weights(self.stage("image_tokenizer", WEIGHTS) / WEIGHTS, tokenizer)
        return tokenizer.to(self.device).ready()

    def new_image_tokenizer(self) -> ImageTokenizer:
        """The image tokenizer before training; of a finished run, before its weights are read."""
        if self.finished and (self.folder / "image_tokenizer" / GEOMETRY).is_file():
            # Published files that the run was made from may be gone.
            kept = read_json(self.stage("image_tokenizer", GEOMETRY) / GEOMETRY)
            return IMAGE_TOKENIZERS.build(self.experiment.image_tokenizer, kept=kept)
        return IMAGE_TOKENIZERS.build(self.experiment.image_tokenizer)

    @cached_property
    def image_tokenizer_shape(self) -> ImageTokenizer:
        """The image tokenizer without memory for its weights: sizes are all that it can be asked for."""
        with torch.device("meta"):
            return self.new_image_tokenizer()

    @cached_property
    def codes_MN(self) -> np.ndarray:
        """Image codes of the M documents of the sample."""
        return read_array(self.stage("image_tokenizer", "codes.npy") / "codes.npy")

    @cached_property
    def vocab(self) -> Vocab:
        """The common vocabulary."""
        table = self._layout_table()
        return Vocab(
            self.experiment.text_tokenizer.vocab_size,
            self.image_tokenizer_shape.codebook_size,
            self.experiment.sentinels,
            len(table.specials),
            table.layout,
        )

    @property
    def layout_file(self) -> Path | None:
        """The layout that stands beside the text tokenizer: a finished run's own, or the one that is taken over.

        None is the paper's, which every tokenizer that is trained here has.
        """
        folder = self.folder
        if not self.finished:
            if self.reused is None:
                return None
            # The run that tokenizers were taken from may be gone.
            if (self.reused / TEXT_TOKENIZER).is_file():
                folder = self.reused
        file = folder / "text_tokenizer" / LAYOUT
        return file if file.is_file() else None

    def layout_inputs(self) -> dict[str, str]:
        """What changes with the layout, for the inputs of a stage; nothing where it is the paper's."""
        return {"layout": sha256(self.layout_file)} if self.layout_file else {}

    def _layout_table(self) -> LayoutTable:
        file = self.layout_file
        if file is None:
            return LayoutTable()
        opened_stage(file.parent, file.name, verify=self.verify, finished=False)
        return layout_table(file.parent)

    @cached_property
    def grid(self) -> Grid:
        """Rows and columns of an image's codes."""
        side = self.image_tokenizer_shape.grid
        return side, side

    @cached_property
    def tokenizer(self) -> DocumentTokenizer:
        """Both tokenizers."""
        return DocumentTokenizer(self.vocab, self.text_tokenizer, self.image_tokenizer)

    @cached_property
    def tokenizer_digests(self) -> Tokenizers:
        """What token shards say of the tokenizers that make them."""
        text = self.stage("text_tokenizer", TOKENIZER)
        digest = sha256(text / TOKENIZER)
        if (text / LAYOUT).is_file():
            digest = digest_of_parts([digest, sha256(text / LAYOUT)])
        return Tokenizers(
            text=digest,
            image=sha256(self.stage("image_tokenizer", WEIGHTS) / WEIGHTS),
            text_size=self.vocab.text_size,
            image_size=self.vocab.image_size,
            sentinels=self.vocab.sentinels,
        )

    @cached_property
    def token_documents(self) -> list[TokenDocument]:
        """The documents of the sample as ids."""
        corpus, codes_MN = self.corpus, self.codes_MN
        return [
            self.tokenizer.token_document(id_, caption, codes_N)
            for id_, caption, codes_N in zip(corpus.ids, corpus.captions, codes_MN, strict=True)
        ]

    def rows_to_ask(self, split: Split) -> list[int]:
        """Rows of the sample's documents of a split that a block holds.

        Raises:
            UserError: if there are none.
        """
        rows = [
            int(row)
            for row in self.corpus.rows(split)
            if token_count(self.token_documents[row], self.vocab.layout) <= self.seq_len - 2
        ]
        if not len(self.corpus.rows(split)):
            raise UserError(
                f"data: no document that was read is in the {split} split; raise shards.sample or split.{split}"
            )
        if not rows:
            raise UserError(
                f"data: no {split} document that was read fits a block of model.seq_len={self.seq_len}; "
                "raise it, or give more or shorter documents"
            )
        return rows

    @property
    def has_retriever(self) -> bool:
        """Whether there is an encoder; a run whose weights were made elsewhere has none."""
        return (self.folder / ENCODER).is_file()

    @cached_property
    def retriever(self) -> Retriever:
        """The trained retriever."""
        section = self.experiment.retriever
        # The run has the weights: published ones are neither read nor fetched again.
        bare = RETRIEVERS.get(section.name).without_weights(section.config)
        retriever = RETRIEVERS.build(replace(section, config=bare))
        load_weights(self.stage("retriever", WEIGHTS) / WEIGHTS, retriever.encoder)
        retriever.encoder.to(self.device).eval()
        return retriever

    @cached_property
    def encoder_header(self) -> dict[str, Any]:
        """What vector shards say of the encoder that makes them."""
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
        """The memory bank: the training documents, or those of `shards.bank`, and what was added to them."""
        return self.open_bank()

    @property
    def retrieves_pairs_only(self) -> bool:
        """Whether the strategy always refuses documents without a text or an image, which no index holds then."""
        return self.experiment.retriever.config.both_modalities

    def open_bank(self, *, with_added: bool = True) -> Bank:
        """The memory bank, with or without the documents that were added to it.

        Raises:
            UserError: for a bank without a finished index, or another run's without the single modalities that this
                run retrieves.
        """
        if not (self.bank_folder / "index" / MARKER).is_file():
            raise UserError(
                f"{self.bank_folder} has no memory bank: its stage index is not finished; run its experiment again, "
                "with until=index at least"
            )
        bank = Bank(
            self.bank_stage("vectors", *SHARD_LISTS),
            self.bank_stage("index"),
            self.encoder_header,
            with_added=with_added,
            verify=self.verify,
        )
        if bank.pairs_only and not self.retrieves_pairs_only:
            raise UserError(
                f"shards.bank: the index of {self.bank_folder} holds only documents with text and image; "
                "set retriever.both_modalities=true, or make that run's index again with false"
            )
        return bank

    @cached_property
    def bank_tokens(self) -> TokenShards:
        """The documents of the memory bank, as ids, without those that were added."""
        return TokenShards(
            self.bank_stage("tokens", *SHARD_LISTS), self.tokenizer_digests, self.vocab.layout
        )

    def bank_document(self, row: int) -> TokenDocument:
        """A document of the memory bank, as ids."""
        made = len(self.bank_tokens)
        return (
            self.bank_tokens.document(row) if row < made else self.added_tokens.document(row - made)
        )

    @property
    def added_tokens_file(self) -> Path:
        """Where the ids of documents are that were added to the memory bank."""
        return self.bank_folder / "index" / "added_tokens.arrow"

    @cached_property
    def added_tokens(self) -> TokenShard:
        """The documents that were added to the memory bank, as ids."""
        return TokenShard(open_shard(self.added_tokens_file))

    @cached_property
    def objective(self) -> Objective:
        """The training objective."""
        return OBJECTIVES.build(self.experiment.objective, vocab=self.vocab)

    @property
    def seq_len(self) -> int:
        """Tokens of a block."""
        return self.experiment.model.config.seq_len

    @cached_property
    def model(self) -> Model:
        """The trained decoder, or the one that is asked in its place."""
        if self.asked_model is not None:
            return self.asked_model
        model = self.new_model()
        load_weights(self.stage("pretraining", WEIGHTS) / WEIGHTS, model)
        return model.to(self.device).eval()

    def new_model(self) -> Model:
        """The decoder as it is initialised, which the seed alone decides."""
        torch.set_rng_state(self.state_of_new_model())
        return self.empty_model()

    def state_of_new_model(self) -> torch.Tensor:
        """Of torch's generator, from which the first weights of the decoder are drawn."""
        torch.manual_seed(self.experiment.seed)
        self.new_image_tokenizer()  # its weights are the first numbers of this stream; the decoder's are to be others
        return torch.get_rng_state()

    def empty_model(self) -> Model:
        """The decoder, whatever its weights: for the meta device."""
        return MODELS.build(self.experiment.model, vocab_size=self.vocab.size)

    def parts_of_answers(self, *, with_bank: bool) -> dict[str, str]:
        """Digests of everything trained or made that the run's answers depend on, by what it is.

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
        stages = ("tokens", "vectors", "index")
        files = [read_stage(self.bank_folder / stage)["fingerprint"] for stage in stages]
        added = self.added_tokens_file
        files.append(sha256(added) if added.is_file() else "")
        return {**parts, "memory bank": digest_of("".join(files))}

    def log(self, stage: str) -> list[dict[str, float]]:
        """The training records of a stage; empty if it did not train."""
        return read_log(self.folder / stage / "log.jsonl")

    def settings_of(self, *names: str) -> dict[str, Any]:
        """Sections of the experiment as plain data."""
        return {name: to_mapping(getattr(self.experiment, name)) for name in names}

    def recorded(self, *names: str) -> dict[str, Any]:
        """Sections of the experiment as plain data, their paths absolute, for records."""
        return {name: recorded_settings(getattr(self.experiment, name)) for name in names}

    def depends_on(self, *names: str) -> dict[str, Any]:
        """Sections of the experiment as far as results depend on them: of files, what they hold."""
        return {
            name: result_settings(getattr(self.experiment, name), path_digest) for name in names
        }


def recorded_digest(stage: Path, name: str) -> str:
    """The digest of a file of a finished stage, as it is recorded."""
    files = read_stage(stage)["files"]
    if name not in files:
        raise UserError(f"{stage / MARKER} does not name {name}; run the experiment again")
    return files[name]


def opened_stage(folder: Path, *files: str, verify: bool = True, finished: bool = True) -> Path:
    """The folder of a stage whose files are about to be read, see `RunFolder.stage`."""
    if verify:
        check_stage(folder, files, finished=finished)
    elif finished and not (folder / MARKER).is_file():
        raise UserError(f"{folder} is not finished: its {MARKER} is missing")
    return folder
