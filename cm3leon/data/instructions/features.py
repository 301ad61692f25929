"""Images to be generated from their features: edges, depth, poses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import PurePosixPath
from random import Random
from typing import Annotated, Any

import numpy as np

from cm3leon.config import Component, Location, result_settings
from cm3leon.data.file_source import id_key
from cm3leon.data.files import Files
from cm3leon.data.images import decode_image, square
from cm3leon.data.instructions.base import (
    Example,
    InstructionConfig,
    InstructionSource,
    listed,
    read_json,
)
from cm3leon.data.instructions.templates import FEATURES
from cm3leon.digests import path_digest
from cm3leon.registry import EXTRACTORS, SOURCES
from cm3leon.types import UserError


@SOURCES.register("features")
class FeaturesSource(InstructionSource):
    """COCO's captions JSON with feature images, which are computed by an extractor or read from a
    folder.

    In a folder the feature image of `a/b.jpg` is `a/b.png` or `a/b.jpg`; images without one are
    left out.
    """

    task = "features"

    @dataclass(kw_only=True)
    class Config(InstructionConfig):
        """Where the captions and images are, and where their features come from."""

        extractor: Annotated[Component, EXTRACTORS] | None = None
        """Computes each feature image when it is read; null = read them from `folder`."""
        folder: Annotated[str, Location()] | None = None
        """Folder of feature images, local or a URL."""
        kind: str | None = None
        """Feature shown by the images in `folder`: canny, segmentation, hed, pose, depth, normals
        or scribble."""

        def check(self) -> None:
            if (self.extractor is None) == (self.folder is None):
                both = "null" if self.folder is None else "given"
                raise UserError(f"extractor and folder are both {both}; give one of them")
            if self.folder is not None and self.kind not in FEATURES:
                raise UserError(
                    f"kind is {self.kind}; for feature images of a folder it must be one of: "
                    f"{', '.join(FEATURES)}"
                )

    config: Config

    def entries(self) -> list[Any]:
        path, what = f"data.path: {self.config.path}", "a captions JSON of COCO"
        content = read_json(self.files, "data.path")
        captions: dict[Any, str] = {}
        for annotation in listed(content, "annotations", path, what):
            if isinstance(annotation, Mapping) and isinstance(annotation.get("caption"), str):
                captions.setdefault(id_key(annotation.get("image_id")), annotation["caption"])
        images = [
            image for image in listed(content, "images", path, what) if isinstance(image, Mapping)
        ]
        return [(image, captions.get(id_key(image.get("id")))) for image in images]

    def example(self, entry: Any, rng: Random) -> Example:
        image, caption = entry
        load = self.image(image.get("file_name"))
        name = image["file_name"]
        extractor, kind = self._extractor, self.config.kind

        # A feature is computed from the same square of the image that is generated from it.
        def feature() -> np.ndarray:
            assert extractor is not None
            pixels_HWC = decode_image(load(), self.config.max_pixels, name)
            return extractor(square(pixels_HWC, min(pixels_HWC.shape[:2])))

        values = {
            "feature": FEATURES[extractor.kind if extractor else str(kind)],
            "feature_image": feature if extractor else self._precomputed(name),
            "caption": self.words(caption, "the caption"),
            "image": load,
        }
        return Example(f"features-{image.get('id')}", values)

    @cached_property
    def _extractor(self) -> Any:
        return EXTRACTORS.build(self.config.extractor) if self.config.extractor else None

    @cached_property
    def _folder(self) -> Files:
        return Files(str(self.config.folder), "data.folder")

    @cached_property
    def _there(self) -> set[str]:
        """Names of the feature images in the folder."""
        return {file.name for file in self._folder.list((".png", ".jpg"))}

    def fingerprint(self) -> str:
        # An extractor's images follow from its model, wherever that lies.
        extractor = result_settings(self.config.extractor, path_digest)
        return f"{json.dumps(extractor)} {super().fingerprint()}"

    def _precomputed(self, name: str) -> partial[bytes]:
        """The function that reads an image's feature image; without one, reading says so."""
        for ending in (".png", ".jpg"):
            file = str(PurePosixPath(name).with_suffix(ending))
            if file in self._there:
                return partial(self._folder.image, file, self.config.max_file_bytes)
        return partial(self._folder.image, name, self.config.max_file_bytes)
