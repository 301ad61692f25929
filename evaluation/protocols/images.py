"""Images for captions, compared with captioned images: FID, precision and recall, CLIP score."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa

from cm3leon.config import Component, PositiveInt, Probability, Seed, result_settings
from cm3leon.data.shards import DamagedShard, open_shard, write_shard
from cm3leon.data.source import Skipped
from cm3leon.digests import path_digest
from cm3leon.evaluation.images import (
    Extractor,
    FeatureStatistics,
    Inception,
    cell_features,
    features,
    precision_recall,
)
from cm3leon.evaluation.metrics import Measured
from cm3leon.evaluation.protocols.base import Answer, Item, Protocol, check_missing, clip_score
from cm3leon.io import digest_of, digest_of_parts
from cm3leon.registry import PROTOCOLS, SOURCES
from cm3leon.types import Document, TextSegment, UserError

BATCH = 256
AT_ONCE, AT_ONCE_ON_GPU = 32, 256
"""Images that Inception looks at together."""
VERSION = 1
"""Raise it when the same images get other features."""
REFERENCES = "references"
"""Folder for the features of reference images."""
FID, CELLS = "FID", "Fréchet distance of cells"


@PROTOCOLS.register("captioned_images")
class CaptionedImages(Protocol):
    """Text to image for the captions of a corpus, measured against its images like zero-shot
    MS-COCO FID.

    The documents are those whose ids come first by their SHA-256, one for each image; their own
    images are the reference, cropped to the central square and resized (bicubic, antialiased).
    """

    answers_in = "image"
    has_truth = False
    lowest_is_best = (FID, CELLS)

    @dataclass(kw_only=True)
    class Config:
        """The captions, and the features that images are compared by."""

        data: Annotated[Component, SOURCES]
        """The corpus, which no run was trained on."""
        count: PositiveInt = 30_000
        """Number of captions."""
        size: PositiveInt = 256
        """Side of the reference images, in pixels."""
        inception_file: Path | None = None
        """pytorch-fid's weights (pt_inception-2015-12-05-6726825d.pth); null: mean colours of 6 x 6
        cells, for small plain images, whose distance is not an FID and is named accordingly."""
        missing: Probability = 0.01
        """Share of the corpus's items that may be unusable."""
        seed: Seed = 0
        """Seed of the order of the documents."""

    config: Config
    _known: tuple[str, Reference] | None = None
    """The last reference, with a digest of what it was made from."""

    def items(self) -> list[Item]:
        config = self.config
        documents: dict[str, Document] = {}
        skipped = 0
        for found in self._source().documents(size=config.size):
            if isinstance(found, Skipped):
                skipped += 1
            elif found.text and found.image is not None:
                documents[found.id] = replace(found, segments=(TextSegment(found.text),))

        check_missing(skipped, len(documents), config.missing)

        # With fewer images, the covariance of the features could not have full rank.
        least = self._features + 2
        if config.count < least:
            raise UserError(
                f"protocol.count is {config.count}; it must be at least {least}, as the covariance "
                f"of {self._features} features needs as many images"
            )
        if len(documents) < config.count:
            raise UserError(
                f"protocol.count is {config.count}, but the corpus has only {len(documents)} "
                "images with captions; lower it, or give a larger corpus"
            )

        # Digests of ids choose the same documents in whatever order the corpus is read.
        chosen = sorted(documents, key=self._order)[: config.count]
        return [Item(id_, "text_to_image", documents[id_]) for id_ in sorted(chosen)]

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        generated_BD = np.concatenate(list(self._features_of(answers)))
        reference_BD = self._reference(items).features_BD
        generated, reference = FeatureStatistics(), FeatureStatistics()
        generated.add(generated_BD)
        reference.add(reference_BD)
        precision, recall = precision_recall(reference_BD, generated_BD, device=self.device)

        # These figures are of the whole set, and have no interval.
        name = FID if self.config.inception_file else CELLS
        found = {name: generated.frechet(reference), "precision": precision, "recall": recall}
        figures: dict[str, Measured] = {}
        for key, value in found.items():
            figures[key] = Measured(value, value, value, len(items))
        return {**figures, **clip_score(answers)}

    @cached_property
    def scored_by(self) -> str:  # type: ignore[override]  # read only, and known by its file alone
        extractor = "cells 6"
        if self.config.inception_file:
            extractor = f"Inception {path_digest(self.config.inception_file)}"
        return f"{extractor}, version {VERSION}"

    def features(self, images_BHWC: np.ndarray) -> np.ndarray:
        if self.device.type == "cuda":
            return features(self._extractor, images_BHWC, AT_ONCE_ON_GPU)
        return features(self._extractor, images_BHWC, AT_ONCE)

    def fingerprint(self) -> str:
        return self._source().fingerprint()

    def notes(self, items: Sequence[Item]) -> dict[str, str]:
        pixels = self._reference(items).pixels
        prompts = digest_of("\n".join(item.id for item in items))
        size, inception = self.config.size, self.config.inception_file
        compared_by = "mean colours of 6 x 6 cells"
        if inception:
            compared_by = f"Inception {inception}"
        return {
            "reference": f"sha256 of the pixels {pixels}",
            "prompts": f"sha256 of the ids {prompts}",
            "resized": f"the central square, bicubic with antialiasing, {size} x {size}",
            "features": compared_by,
        }

    # ---------------------------------------------------------------------------------------- parts

    @property
    def _features(self) -> int:
        """The number of an image's features."""
        return 2048 if self.config.inception_file else 108

    def _source(self) -> Any:
        return SOURCES.build(self.config.data)

    def _order(self, id_: str) -> str:
        """What a document is sorted by: a digest of its id, which the seed changes."""
        return digest_of(f"{self.config.seed} {id_}")

    @cached_property
    def _extractor(self) -> Extractor:
        if self.config.inception_file:
            return Inception.load(self.config.inception_file, self.device)
        return cell_features

    def _features_of(self, answers: Sequence[Answer]) -> Iterator[np.ndarray]:
        """Features of the answers in batches, computed for those that have none."""
        for first in range(0, len(answers), BATCH):
            few = answers[first : first + BATCH]
            known = [answer.features_D for answer in few if answer.features_D is not None]
            if len(known) == len(few):
                yield np.stack(known)
                continue

            # One answer without features is enough to look at all images of its batch.
            images = [answer.image_HWC for answer in few if answer.image_HWC is not None]
            yield self.features(np.stack(images))

    def _reference(self, items: Sequence[Item]) -> Reference:
        """The reference of these items, made once for all models; a damaged file is made again."""
        # Everything that the reference depends on; its digest names the file.
        ids = [item.id for item in items]
        made_from = {
            "corpus": self.fingerprint(),
            "data": result_settings(self.config.data),
            "ids": digest_of("\n".join(ids)),
            "size": self.config.size,
            "features": self.scored_by,
        }
        key = digest_of(json.dumps(made_from, sort_keys=True))

        # The model before this one may have needed it in this process, or another process kept it.
        if self._known is not None and self._known[0] == key:
            return self._known[1]
        file = None
        if self.folder is not None:
            file = self.folder / REFERENCES / f"{key[:16]}.arrow"
        reference = file and read_reference(file, made_from)

        if not reference:
            reference = self._made_reference(ids)
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_reference(file, reference, made_from)
        self._known = key, reference
        return reference

    def _made_reference(self, ids: Sequence[str]) -> Reference:
        """Read the reference images again in batches, since a corpus of them need not fit the
        memory."""
        found: list[np.ndarray] = []

        # One pass over the corpus gives both the features and the digest of the pixels.
        def pixels() -> Iterator[bytes]:
            for images_BHWC in self._reference_images(set(ids)):
                found.append(self.features(images_BHWC))
                yield np.ascontiguousarray(images_BHWC).tobytes()

        digest = digest_of_parts(pixels())
        return Reference(np.concatenate(found), digest)

    def _reference_images(self, wanted: set[str]) -> Iterator[np.ndarray]:
        """The images of the wanted documents in batches; each id is taken once."""
        batch: list[np.ndarray] = []
        for found in self._source().documents(size=self.config.size):
            if isinstance(found, Skipped) or found.id not in wanted or found.image is None:
                continue
            wanted.remove(found.id)
            batch.append(found.image)
            if len(batch) == BATCH:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference images' features."""

    features_BD: np.ndarray
    pixels: str
    """SHA-256 of the images."""


def write_reference(file: Path, reference: Reference, made_from: Mapping[str, Any]) -> None:
    """Keep a reference, with checksums and what it was made from."""
    features_BD = reference.features_BD
    column = pa.FixedSizeListArray.from_arrays(pa.array(features_BD.ravel()), features_BD.shape[1])
    write_shard(file, {"features": column}, {"made_from": made_from, "pixels": reference.pixels})


def read_reference(file: Path, made_from: Mapping[str, Any]) -> Reference | None:
    """The reference in a file; None if the file is missing or damaged, or the reference was made
    from something else."""
    if not file.is_file():
        return None
    try:
        shard = open_shard(file)
    except DamagedShard as error:
        print(f"      {error}; it is made again", flush=True)
        return None
    if shard.header.get("made_from") != made_from:
        return None
    return Reference(shard.numbers("features"), str(shard.header["pixels"]))
