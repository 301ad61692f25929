"""Images for captions against the images that people captioned: FID, precision and recall, CLIP score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from cm3leon.config import Component, PositiveInt, Probability, Seed
from cm3leon.data.source import Skipped
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
FID, CELLS = "FID", "Fréchet distance of cells"


@PROTOCOLS.register("captioned_images")
class CaptionedImages(Protocol):
    """Text to image for the captions of a corpus, measured against its images, as zero-shot MS-COCO FID is.

    The documents are those whose ids come first by their SHA-256, one for each image; their own images are the
    reference, cut to the central square and resized (bicubic, antialiased).
    """

    answers_in = "image"
    has_truth = False
    lowest_is_best = (FID, CELLS)

    @dataclass(kw_only=True)
    class Config:
        """Which captions, and by what features images are compared."""

        data: Annotated[Component, SOURCES]
        """The corpus, one that nothing was trained on."""
        count: PositiveInt = 30_000
        """Captions."""
        size: PositiveInt = 256
        """Pixels of a side of the reference images."""
        inception_file: Path | None = None
        """pytorch-fid's weights (pt_inception-2015-12-05-6726825d.pth); null = mean colours of 6 x 6 cells, for small
        plain images, whose distance is no FID and named so."""
        missing: Probability = 0.01
        """Share of the corpus's items that may be unusable."""
        seed: Seed = 0
        """Of the order of the documents."""

    config: Config

    def items(self) -> list[Item]:
        config = self.config
        documents: dict[str, Document] = {}
        skipped = 0
        for found in self._source().documents():
            if isinstance(found, Skipped):
                skipped += 1
            elif found.text and found.image is not None:
                documents[found.id] = replace(found, segments=(TextSegment(found.text),))
        check_missing(skipped, len(documents), config.missing)
        chosen = sorted(documents, key=self._order)[: config.count]
        least = self._features + 2
        if len(chosen) < max(config.count, least):
            wanted = f"{config.count} captions are asked for"
            if config.count < least:
                wanted = f"the covariance of {self._features} features needs {least} images or more"
            raise UserError(f"protocol.count: {wanted}, {len(chosen)} are there")
        return [Item(id_, "text_to_image", documents[id_]) for id_ in sorted(chosen)]

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        extractor = self._extractor()
        images = [answer.image_HWC for answer in answers if answer.image_HWC is not None]
        generated_BD = np.concatenate(
            [
                features(extractor, np.stack(images[first : first + BATCH]))
                for first in range(0, len(images), BATCH)
            ]
        )
        reference_BD = np.concatenate(
            [features(extractor, batch) for batch in self._reference(items)]
        )
        distances = FeatureStatistics(), FeatureStatistics()
        for statistics, features_BD in zip(distances, (generated_BD, reference_BD), strict=True):
            statistics.add(features_BD)
        precision, recall = precision_recall(reference_BD, generated_BD)
        name = FID if self.config.inception_file else CELLS
        found = {name: distances[0].frechet(distances[1]), "precision": precision, "recall": recall}
        figures = {key: Measured(value, value, value, len(items)) for key, value in found.items()}
        return {**figures, **clip_score(answers)}

    def fingerprint(self) -> str:
        return self._source().fingerprint()

    def notes(self, items: Sequence[Item]) -> dict[str, str]:
        pixels = digest_of_parts(
            np.ascontiguousarray(batch_BHWC).tobytes() for batch_BHWC in self._reference(items)
        )
        prompts = digest_of("\n".join(item.id for item in items))
        size, inception = self.config.size, self.config.inception_file
        return {
            "reference": f"sha256 of the pixels {pixels}",
            "prompts": f"sha256 of the ids {prompts}",
            "resized": f"the central square, bicubic with antialiasing, {size} x {size}",
            "features": f"Inception {inception}" if inception else "mean colours of 6 x 6 cells",
        }

    # -------------------------------------------------------------------------------------------- parts

    @property
    def _features(self) -> int:
        return 2048 if self.config.inception_file else 108

    def _source(self) -> Any:
        return SOURCES.build(self.config.data)

    def _order(self, id_: str) -> str:
        return digest_of(f"{self.config.seed} {id_}")

    def _extractor(self) -> Extractor:
        return (
            Inception.load(self.config.inception_file)
            if self.config.inception_file
            else cell_features
        )

    def _reference(self, items: Sequence[Item]) -> Iterator[np.ndarray]:
        """The reference images in batches, read once more: a corpus of them need not fit into memory."""
        wanted = {item.id for item in items}
        batch: list[np.ndarray] = []
        for found in self._source().documents(size=self.config.size):
            if isinstance(found, Document) and found.id in wanted and found.image is not None:
                wanted.remove(found.id)
                batch.append(found.image)
            if len(batch) == BATCH:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)
