"""COCO's captions, and labels from COCO's instances."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from cm3leon.config import Location
from cm3leon.data.file_source import (
    BadRecord,
    FilesConfig,
    FileSource,
    Record,
    caption_text,
    fingerprint,
    id_key,
    page_text,
)
from cm3leon.data.files import CUT_STREAM, Files
from cm3leon.data.source import Skipped
from cm3leon.registry import SOURCES
from cm3leon.types import UserError

CHUNK = 1000
"""Images of a part."""


@SOURCES.register("coco")
class CocoSource(FileSource):
    """COCO's captions JSON with the folder of its images, and optionally the instances JSON for
    labels.

    A document has a label if all of its image's objects are of one category and the caption names
    that category and no other:

        objects in the image    caption                          label
        dog, dog                "a dog in the snow"              dog
        dog, cat                "a dog in the snow"              none: a second category is seen
        dog                     "a dog chases a cat"             none: a second category is named

    The JSON files are held in memory (COCO's own take under 1 GB); a part is a thousand images.
    """

    @dataclass(kw_only=True)
    class Config(FilesConfig):
        """Where the files are, and how many documents an image makes."""

        path: Annotated[str, Location()]
        """The captions JSON, such as annotations/captions_train2017.json, local or a URL."""
        images: Annotated[str, Location()]
        """Folder of the images, local or a URL."""
        instances: Annotated[str, Location()] | None = None
        """The instances JSON of the same images; null = no labels."""
        captions: Literal["first", "all"] = "first"
        """first = one document per image, with its first caption; all = one document per caption;
        those of one image lie in the same split."""

    suffixes = (".json",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._images = Files(config.images, "data.images")
        if config.instances:
            self.class_names = tuple(self._categories.values())
            self._names = _any_of(self.class_names)

    def parts(self) -> list[str]:
        entries = self._captions.entries
        if not entries:
            raise UserError(
                f"data.path: {self.config.path} lists no images; give the captions JSON of a "
                "split, such as annotations/captions_train2017.json"
            )
        return [f"{self._captions.name} {number}" for number in range(-(-len(entries) // CHUNK))]

    images_apart = True

    def fingerprint(self) -> str:
        held = super().fingerprint()
        if not self.config.instances:
            return held
        files = Files(self.config.instances, "data.instances")
        return f"{held} {fingerprint(files, files.list(self.suffixes))}"

    def class_in(self, text: str) -> int | None:
        if not self.class_names:
            return None
        found = set(self._names.findall(text.lower()))
        return self.class_names.index(found.pop()) if len(found) == 1 else None

    def records(self, part: str, start: int) -> Iterator[Record | Skipped]:
        chunk = int(part.rpartition(" ")[2])
        for entry in self._captions.entries[chunk * CHUNK : (chunk + 1) * CHUNK]:
            yield from self._of_image(entry)

    def _of_image(self, entry: Any) -> Iterator[Record | Skipped]:
        """The documents of one entry of the JSON's list of images, or why it has none."""
        corpus = self._captions
        is_image = isinstance(entry, Mapping) and isinstance(entry.get("file_name"), str)
        if not is_image or id_key(entry.get("id")) is None:
            yield Skipped(
                corpus.name, f"an image without an id or a file_name: {json.dumps(entry)[:80]!a}"
            )
            return

        load = partial(self._images.image, entry["file_name"], self.config.max_file_bytes)
        annotations = corpus.by_image.get(id_key(entry["id"]), [])
        if not annotations:
            yield Skipped(
                f"{corpus.name}/{entry['id']}", "no caption: no annotation has this image_id"
            )
        if self.config.captions == "first":
            annotations = annotations[:1]

        for annotation in annotations:
            # An annotation may be skipped while the others of its image are used.
            id_ = f"{corpus.name}/{entry['id']}-{annotation.get('id')}"
            try:
                caption = caption_text(
                    page_text(annotation.get("caption"), "the caption"),
                    self.config.max_caption_bytes,
                )
            except BadRecord as error:
                yield Skipped(id_, str(error))
            else:
                yield Record(id_, (caption, load), self._label(entry["id"], caption))

    def _label(self, image_id: Any, caption: str) -> int | None:
        """The class that the caption names, if it is all that the image shows."""
        named = self.class_in(caption)
        if named is None:
            return None
        seen = self._seen.get(id_key(image_id), set())
        return named if seen == {list(self._categories)[named]} else None

    @cached_property
    def _captions(self) -> _Captions:
        listed = self.files.list(self.suffixes)
        if len(listed) != 1:
            raise UserError(
                f"data.path: {self.config.path} is {len(listed)} files; coco reads one captions "
                "JSON, such as annotations/captions_train2017.json"
            )
        content = _read(
            self.files, listed[0].name, "data.path", {"images": list, "annotations": list}
        )

        # Instances and keypoints have annotations, too, but none with a caption.
        by_image: dict[Any, list[Any]] = {}
        for annotation in content["annotations"]:
            if isinstance(annotation, Mapping) and "caption" in annotation:
                by_image.setdefault(id_key(annotation.get("image_id")), []).append(annotation)
        if content["annotations"] and not by_image:
            raise UserError(
                f"data.path: {self.config.path} has annotations without captions; give the "
                "captions JSON, such as annotations/captions_train2017.json"
            )
        return _Captions(PurePosixPath(listed[0].name).stem, content["images"], by_image)

    @cached_property
    def _instances(self) -> dict[str, Any]:
        files = Files(str(self.config.instances), "data.instances")
        if not files.is_file:
            raise UserError(
                f"data.instances: {self.config.instances} is not a file; give the instances JSON, "
                "such as annotations/instances_train2017.json"
            )
        (listed,) = files.list(self.suffixes)
        return _read(
            files, listed.name, "data.instances", {"annotations": list, "categories": list}
        )

    @cached_property
    def _categories(self) -> dict[Any, str]:
        """Names of the categories by their ids, in the order of the ids."""
        categories: dict[Any, str] = {}
        try:
            for entry in self._instances["categories"]:
                categories[id_key(entry["id"])] = entry["name"].lower()
            if None in categories:
                raise KeyError("id")
            return dict(sorted(categories.items()))
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"data.instances: {self.config.instances} has a category without an id or a name; "
                "give a JSON file in COCO's format"
            ) from error

    @cached_property
    def _seen(self) -> dict[Any, set[Any]]:
        """The ids of the categories seen in each image, by the image's id."""
        seen: dict[Any, set[Any]] = {}
        for annotation in self._instances["annotations"]:
            if isinstance(annotation, Mapping):
                category = id_key(annotation.get("category_id"))
                seen.setdefault(id_key(annotation.get("image_id")), set()).add(category)
        return seen


@dataclass(frozen=True, eq=False)
class _Captions:
    """The captions JSON: its name, its images in order, and the annotations by their image's id."""

    name: str
    entries: list[Any]
    by_image: dict[Any, list[Any]]


def _read(files: Files, name: str, where: str, keys: Mapping[str, type]) -> dict[str, Any]:
    """Read a JSON object that has a list under each of those keys.

    Raises:
        UserError: for a file that cannot be read, or holds anything else.
    """
    try:
        with files.open(name) as file:
            content = json.load(file)
    except RecursionError as error:
        raise UserError(f"{where}: {files.path} is not usable JSON: nested too deep") from error
    except (ValueError, *CUT_STREAM) as error:
        raise UserError(f"{where}: {files.path} is not usable JSON: {error}") from error
    for key, kind in keys.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise UserError(
                f"{where}: {files.path} has no list under {key}; give a JSON file in COCO's format"
            )
    return content


def _any_of(names: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern that finds whole names, the longest first: "hot dog" is no dog."""
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})\b")
