"""The part of a run that its model is trained on: the corpus, the tokenizers,
and documents as ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cm3leon.config import recorded_settings, result_settings, to_mapping
from cm3leon.data.augment import varied
from cm3leon.data.corpus import Corpus, Split
from cm3leon.data.images import fitted
from cm3leon.data.source import Source
from cm3leon.data.token_shards import Tokenizers
from cm3leon.digests import path_digest
from cm3leon.experiment import Experiment, ShardsConfig
from cm3leon.io import digest_of_parts, read_json, sha256
from cm3leon.records import read_array
from cm3leon.registry import IMAGE_TOKENIZERS, SOURCES
from cm3leon.stages.files import (
    ENCODER,
    GEOMETRY,
    TEXT_TOKENIZER,
    TOKENIZER,
    WEIGHTS,
    opened_stage,
)
from cm3leon.tokenizers.document import DocumentTokenizer, token_count
from cm3leon.tokenizers.image.base import ImageTokenizer
from cm3leon.tokenizers.layout import Grid, LayoutTable
from cm3leon.tokenizers.text import LAYOUT, TextTokenizer, layout_table
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.training.distributed import Ranks
from cm3leon.types import TokenDocument, UserError
from cm3leon.weights import load_weights


@dataclass(frozen=True, eq=False)
class TokenizedRun:
    """Reads the results of a run's stages up to its tokenizers, each once."""

    experiment: Experiment
    folder: Path
    device: torch.device
    joined: Ranks | None = None
    """The processes that train together; None: only this one."""
    verify: bool = True
    """Whether files are compared with their recorded checksums before they are read,
    once a process."""
    finished: bool = False
    """Whether the run was opened to be asked; then stages that are not finished are refused."""

    @cached_property
    def ranks(self) -> Ranks:
        """The processes that train together, even if only this one."""
        return self.joined or Ranks(self.device)

    def stage(self, name: str, *files: str) -> Path:
        """The folder of a stage, after comparing its files (by default all) with its record.

        Raises:
            UserError: for a file that is missing or has changed, or a stage that is not finished.
        """
        return opened_stage(self.folder / name, *files, verify=self.verify, finished=self.finished)

    @cached_property
    def source(self) -> Source:
        """The corpus that the documents come from."""
        return SOURCES.build(self.experiment.data)

    @cached_property
    def corpus(self) -> Corpus:
        """The documents of the sample, with their splits."""
        return Corpus.load(self.stage("documents"))

    @cached_property
    def varied_images(self) -> np.ndarray:
        """The training images of the sample, then their varied versions one after the other:
        ((1 + versions) * B, H, W, C)."""
        rows = self.corpus.rows("train")
        images_BHWC = self.corpus.images_BHWC[rows]
        ids = [self.corpus.ids[row] for row in rows]
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
        """A file of the reused run. Raises UserError if it is missing."""
        assert self.reused is not None
        file = self.reused / name
        if not file.is_file():
            raise UserError(
                f"shards.tokenizers: {self.reused} is not the folder of a run with trained "
                f"tokenizers: {file} is missing"
            )
        opened_stage(file.parent, file.name, verify=self.verify)
        return file

    @property
    def reuses_encoder(self) -> bool:
        """Whether the reused run has an encoder; one that stopped at its tokenizers has none."""
        return self.reused is not None and (self.reused / ENCODER).is_file()

    def reused_digest(self, name: str) -> str | None:
        """SHA-256 of the reused file; None if nothing is reused."""
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
        """The image tokenizer before training; of a finished run, before its weights are read.

        Published files that a run was made from may be gone: the run opens without them, and so
        does one that reuses its tokenizers.
        """
        section = self.experiment.image_tokenizer
        if not IMAGE_TOKENIZERS.get(section.name).pretrained:
            return IMAGE_TOKENIZERS.build(section)

        # A run keeps the sizes of a published tokenizer.
        kept: list[Path] = []
        if self.finished:
            kept = [self.folder]
        elif self.reused:
            kept = [self.reused, self.folder]
        for folder in kept:
            file = folder / "image_tokenizer" / GEOMETRY
            if file.is_file():
                opened_stage(file.parent, file.name, verify=self.verify, finished=self.finished)
                return IMAGE_TOKENIZERS.build(section, kept=read_json(file))
        return IMAGE_TOKENIZERS.build(section)

    @cached_property
    def image_tokenizer_shape(self) -> ImageTokenizer:
        """The image tokenizer without memory for its weights: only its sizes can be used."""
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
        """The layout beside the text tokenizer: a finished run's own, or the reused one.

        None is the paper's layout, which every tokenizer trained here has.
        """
        folder = self.folder
        if not self.finished:
            if self.reused is None:
                return None
            # The run whose tokenizers are reused may be gone.
            if (self.reused / TEXT_TOKENIZER).is_file():
                folder = self.reused
        file = folder / "text_tokenizer" / LAYOUT
        return file if file.is_file() else None

    def layout_inputs(self) -> dict[str, str]:
        """The layout as an input of a stage; {} if it is the paper's."""
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
    def grids(self) -> list[Grid]:
        """Grids that images are resized to: the layout's grids with as many codes as the square
        one, or only that."""
        return self.vocab.layout.sizes_within(self.grid[0] * self.grid[1]) or [self.grid]

    def grid_for(self, height: int, width: int) -> Grid:
        """The grid whose shape is nearest to an image of this many pixels;
        of equally near ones the largest."""

        def distance(grid: Grid) -> tuple[float, int]:
            rows, columns = grid
            return round(abs(math.log(rows * width / (columns * height))), 9), -rows * columns

        return min(self.grids, key=distance)

    def fitted(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """An image, cropped and resized to the grid nearest to its shape."""
        rows, columns = self.grid_for(*pixels_HWC.shape[:2])
        scale = self.image_tokenizer_shape.downsampling
        return fitted(pixels_HWC, rows * scale, columns * scale)

    def encoded(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, Grid]]:
        """Codes (N,) and grid of each image, whose sides are those of a grid;
        images of one size in one batch."""
        scale = self.image_tokenizer.downsampling
        of_grid: dict[Grid, list[int]] = {}
        for index, image in enumerate(images):
            grid = image.shape[0] // scale, image.shape[1] // scale
            of_grid.setdefault(grid, []).append(index)

        found: dict[int, tuple[np.ndarray, Grid]] = {}
        for grid, indices in of_grid.items():
            images_BHWC = np.stack([images[index] for index in indices])
            codes_BN = self.image_tokenizer.encode(images_BHWC, grid=grid)
            for index, codes_N in zip(indices, codes_BN, strict=True):
                found[index] = codes_N, grid
        return [found[index] for index in range(len(images))]

    @cached_property
    def tokenizer(self) -> DocumentTokenizer:
        """Both tokenizers."""
        return DocumentTokenizer(self.vocab, self.text_tokenizer, self.image_tokenizer)

    @cached_property
    def tokenizer_digests(self) -> Tokenizers:
        """What token shards record of the tokenizers that make them."""
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
        corpus = self.corpus
        documents = []
        for id_, caption, codes_N in zip(corpus.ids, corpus.captions, self.codes_MN, strict=True):
            documents.append(self.tokenizer.token_document(id_, caption, codes_N))
        return documents

    def rows_to_ask(self, split: Split) -> list[int]:
        """Rows of the sample's documents of a split that fit a block.

        Raises:
            UserError: if there are none.
        """
        rows = []
        for row in self.corpus.rows(split).tolist():
            # Between two `<eos>`.
            if token_count(self.token_documents[row], self.vocab.layout) <= self.seq_len - 2:
                rows.append(row)

        if not len(self.corpus.rows(split)):
            raise UserError(
                f"data: no document that was read is in the {split} split; raise shards.sample or "
                f"split.{split}"
            )
        if not rows:
            raise UserError(
                f"data: no {split} document that was read fits a block of "
                f"model.seq_len={self.seq_len}; raise it, or give more or shorter documents"
            )
        return rows

    @property
    def seq_len(self) -> int:
        """Tokens of a block."""
        return self.experiment.model.config.seq_len

    def settings_of(self, *names: str) -> dict[str, Any]:
        """Sections of the experiment as plain data."""
        return {name: to_mapping(getattr(self.experiment, name)) for name in names}

    def recorded(self, *names: str) -> dict[str, Any]:
        """Sections of the experiment as plain data with absolute paths, for records."""
        return {name: recorded_settings(getattr(self.experiment, name)) for name in names}

    def depends_on(self, *names: str) -> dict[str, Any]:
        """Sections of the experiment as far as results depend on them; files by their content."""
        return {
            name: result_settings(getattr(self.experiment, name), path_digest) for name in names
        }
