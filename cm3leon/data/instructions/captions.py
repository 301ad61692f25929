"""Images described in words: Karpathy's JSON (Flickr30k, COCO), Image Paragraph and Localized
Narratives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, Literal

from cm3leon.config import Location
from cm3leon.data.file_source import BadRecord, parse_object
from cm3leon.data.files import Files
from cm3leon.data.instructions.base import (
    Example,
    InstructionConfig,
    InstructionSource,
    check_image_name,
    listed,
    read_json,
)
from cm3leon.registry import SOURCES
from cm3leon.types import UserError


@SOURCES.register("karpathy")
class KarpathySource(InstructionSource):
    """Karpathy's JSON of images with five sentences each, divided into splits. Every sentence makes
    an example."""

    task = "caption"

    @dataclass(kw_only=True)
    class Config(InstructionConfig):
        """Where the file and the images are, and the split to read."""

        split: Literal["train", "val", "test", "restval"] = "train"
        """Karpathy's split. restval is the part of COCO's validation images that is usually added
        to the training images."""

    config: Config

    def entries(self) -> list[Any]:
        what = "Karpathy's JSON, such as dataset_flickr30k.json"
        images = listed(
            read_json(self.files, "data.path"), "images", f"data.path: {self.config.path}", what
        )
        of_split = []
        there = set()
        for image in images:
            if isinstance(image, Mapping):
                there.add(str(image.get("split")))
                if image.get("split") == self.config.split:
                    of_split.append(image)
        if images and not of_split:
            raise UserError(
                f"data.split is {self.config.split}, which {self.config.path} does not have; it "
                f"has: {', '.join(sorted(there))}"
            )

        # An image without sentences still has an entry, which is then skipped with a reason.
        entries: list[Any] = []
        for image in of_split:
            for number, sentence in enumerate(image.get("sentences") or [None]):
                entries.append((image, number, sentence))
        return entries

    def example(self, entry: Any, rng: Random) -> Example:
        image, number, sentence = entry
        folder, name = image.get("filepath"), image.get("filename")
        if not isinstance(name, str):
            raise BadRecord("the image has no filename")
        raw = sentence.get("raw") if isinstance(sentence, Mapping) else None
        file = f"{folder}/{name}" if folder else name
        values = {"caption": self.words(raw, "the sentence"), "image": self.image(file)}

        # In an evaluation, a caption is compared with all sentences of the image.
        every = [one.get("raw") for one in image["sentences"] if isinstance(one, Mapping)]
        truth = tuple(text.strip() for text in every if isinstance(text, str) and text.strip())
        return Example(f"{name}-{number}", values, truth, group=file)


@SOURCES.register("image_paragraph")
class ImageParagraphSource(InstructionSource):
    """Stanford's Image Paragraph: a list of image ids with paragraphs; the images are named
    `{image_id}.jpg`."""

    task = "paragraph"
    more_files = ("ids",)

    @dataclass(kw_only=True)
    class Config(InstructionConfig):
        """Where the file and the images are, and which images to read."""

        ids: Annotated[str, Location()] | None = None
        """JSON list of the image ids of a split, such as train_split.json; null = all images."""

    config: Config

    def entries(self) -> list[Any]:
        content = read_json(self.files, "data.path")
        if not isinstance(content, list):
            raise UserError(
                f"data.path: {self.config.path} is not a JSON list; give paragraphs_v1.json"
            )
        if self.config.ids is None:
            return content
        ids = read_json(Files(self.config.ids, "data.ids"), "data.ids")
        if not isinstance(ids, list):
            raise UserError(
                f"data.ids: {self.config.ids} is not a JSON list of image ids; give a file such as "
                "train_split.json"
            )

        chosen = set(map(str, ids))
        return [
            entry
            for entry in content
            if isinstance(entry, Mapping) and str(entry.get("image_id")) in chosen
        ]

    def example(self, entry: Any, rng: Random) -> Example:
        if not isinstance(entry, Mapping) or entry.get("image_id") is None:
            raise BadRecord("no image_id")
        text = self.words(entry.get("paragraph"), "the paragraph")
        id_ = entry["image_id"]
        return Example(
            f"paragraph-{id_}", {"caption": text, "image": self.image(f"{id_}.jpg")}, (text,)
        )


@SOURCES.register("localized_narratives")
class LocalizedNarrativesSource(InstructionSource):
    """Localized Narratives: JSON lines of image ids with what an annotator said. The mouse traces
    are not read."""

    task = "narrative"
    suffixes = (".jsonl",)

    @dataclass(kw_only=True)
    class Config(InstructionConfig):
        """Where the file and the images are, and how images are named."""

        image_name: str = "{image_id}.jpg"
        """Name of an image, with the slot {image_id}; COCO's are {image_id:0>12}.jpg."""

        def check(self) -> None:
            check_image_name(self.image_name, "1")

    config: Config

    def entries(self) -> list[Any]:
        lines: list[Any] = []
        for file in self._list():
            with self.files.open(file.name) as opened:
                lines += [line for line in opened if line.strip()]
        return lines

    def example(self, entry: Any, rng: Random) -> Example:
        content = parse_object(entry, "the line")
        image_id = content.get("image_id")
        if not isinstance(image_id, str):
            raise BadRecord("no image_id")
        text = self.words(content.get("caption"), "the caption")
        file = self.config.image_name.format(image_id=image_id)
        who = content.get("annotator_id", "")
        return Example(
            f"narrative-{image_id}-{who}", {"caption": text, "image": self.image(file)}, (text,)
        )
