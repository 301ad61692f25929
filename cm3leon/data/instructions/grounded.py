"""Images with boxes around objects: COCO and Objects365 (in the same format), and OpenImages.

Boxes are written as corners on a grid of 256 x 256, laid over the square that is cut from the
middle of an image:

    +-----------------------+
    |     |   +---+   |     |       "dog at (85, 64) -> (170, 192)"
    |     |   |dog|   |     |
    |     |   +---+   |     |       left and right of the square nothing is seen, so an
    +-----------------------+       object there is not mentioned
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any

from cm3leon.config import Location, PositiveInt
from cm3leon.data.file_source import BadRecord, id_key
from cm3leon.data.files import Files
from cm3leon.data.images import UnusableImage, image_size
from cm3leon.data.instructions.base import (
    Example,
    InstructionConfig,
    InstructionSource,
    listed,
    read_json,
)
from cm3leon.registry import SOURCES
from cm3leon.types import UserError

GRID = 256
"""Rows and columns of the grid on which locations are counted."""

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) as shares of the image's width and height."""


def location(box: Box) -> str:
    """Write the corners of a box on the grid: "(x1, y1) -> (x2, y2)"."""
    left, top, right, bottom = (min(max(round(edge * GRID), 0), GRID) for edge in box)
    return f"({left}, {top}) -> ({right}, {bottom})"


def objects_text(objects: Sequence[tuple[str, Box]]) -> str:
    """Write objects with their boxes: "dog at (0, 12) -> (90, 200), cat at ..."."""
    return ", ".join(f"{name} at {location(box)}" for name, box in objects)


def centred(box: Box, width: float, height: float) -> Box | None:
    """Move a box into the square that is cut from the image's middle, cropping it there; None if
    nothing of it is left."""
    side = min(width, height)
    left, top = (width - side) / 2 / side, (height - side) / 2 / side
    scaled = (box[0] * width / side - left, box[1] * height / side - top,
              box[2] * width / side - left, box[3] * height / side - top)  # fmt: skip
    cut = (max(scaled[0], 0.0), max(scaled[1], 0.0), min(scaled[2], 1.0), min(scaled[3], 1.0))
    return cut if cut[0] < cut[2] and cut[1] < cut[3] else None


@dataclass(kw_only=True)
class BoxesConfig(InstructionConfig):
    """Which boxes are used."""

    most: PositiveInt = 8
    """How many objects of an image are named, the largest ones."""


class _Boxes(InstructionSource):
    """Base of the sources of images with boxes."""

    task = "grounded"
    config: BoxesConfig

    def _values(
        self, name: str, objects: Sequence[tuple[str, Box]], caption: str | None
    ) -> dict[str, Any]:
        """The values of a record's slots. Raises BadRecord for an image without an object."""
        if not objects:
            raise BadRecord("no object is inside the square in the image's middle")

        # The largest objects are named, in the order of the file.
        def size_of(each: tuple[str, Box]) -> float:
            left, top, right, bottom = each[1]
            return (right - left) * (bottom - top)

        largest = sorted(objects, key=lambda each: -size_of(each))
        chosen = [each for each in objects if each in largest[: self.config.most]]
        what = caption or " and ".join(dict.fromkeys(name for name, _ in chosen))
        return {"caption": what, "objects": objects_text(chosen), "image": self.image(name)}


@SOURCES.register("coco_boxes")
class CocoBoxesSource(_Boxes):
    """COCO's instances JSON, or that of Objects365 in the same format. Crowds are left out."""

    more_files = ("captions",)

    @dataclass(kw_only=True)
    class Config(BoxesConfig):
        """Where the files and the images are."""

        captions: Annotated[str, Location()] | None = None
        """Captions JSON of the same images, of which the first caption is used; null = the names of
        the objects."""

    config: Config

    def entries(self) -> list[Any]:
        path, what = f"data.path: {self.config.path}", "an instances JSON of COCO or Objects365"
        content = read_json(self.files, "data.path")
        images = listed(content, "images", path, what)

        names: dict[Any, str] = {}
        for category in listed(content, "categories", path, what):
            if isinstance(category, Mapping) and isinstance(category.get("name"), str):
                names[id_key(category.get("id"))] = category["name"].lower()

        # A box around a crowd says nothing about a single object.
        boxes: dict[Any, list[tuple[Any, Any]]] = {}
        for annotation in listed(content, "annotations", path, what):
            if isinstance(annotation, Mapping) and not annotation.get("iscrowd"):
                name = names.get(id_key(annotation.get("category_id")))
                boxes.setdefault(id_key(annotation.get("image_id")), []).append(
                    (name, annotation.get("bbox"))
                )

        # The first caption of an image describes it, if captions are given.
        captions: dict[Any, str] = {}
        if self.config.captions:
            where = f"data.captions: {self.config.captions}"
            given = read_json(Files(self.config.captions, "data.captions"), "data.captions")
            for annotation in listed(given, "annotations", where, "a captions JSON of COCO"):
                if isinstance(annotation, Mapping) and isinstance(annotation.get("caption"), str):
                    captions.setdefault(
                        id_key(annotation.get("image_id")), annotation["caption"].strip()
                    )

        entries: list[Any] = []
        for image in images:
            if isinstance(image, Mapping):
                id_ = id_key(image.get("id"))
                entries.append((image, boxes.get(id_, []), captions.get(id_)))
        return entries

    def example(self, entry: Any, rng: Random) -> Example:
        image, boxes, caption = entry
        width, height = image.get("width"), image.get("height")
        if not all(isinstance(size, (int, float)) and size > 0 for size in (width, height)):
            raise BadRecord("the image has no width and height")

        objects: list[tuple[str, Box]] = []
        for name, box in boxes:
            is_box = isinstance(box, list) and len(box) == 4
            if name and is_box and all(isinstance(x, (int, float)) for x in box):
                # COCO gives boxes in pixels, by their upper left corner and size.
                x, y, w, h = box
                inside = centred(
                    (x / width, y / height, (x + w) / width, (y + h) / height), width, height
                )
                if inside:
                    objects.append((name, inside))

        name = image.get("file_name")
        if not isinstance(name, str):
            raise BadRecord("the image has no file_name")
        return Example(f"boxes-{image.get('id')}", self._values(name, objects, caption))


@SOURCES.register("openimages_boxes")
class OpenImagesBoxesSource(_Boxes):
    """OpenImages' boxes CSV with its class descriptions; boxes around groups are left out.

    Boxes are given as shares of the image. Its size is not in the CSV, so it is read from the
    image's file.
    """

    suffixes = (".csv",)
    more_files = ("classes",)

    @dataclass(kw_only=True)
    class Config(BoxesConfig):
        """Where the files and the images are."""

        classes: Annotated[str, Location()]
        """class-descriptions-boxable.csv, with lines of a class's id and its name."""

    config: Config

    def entries(self) -> list[Any]:
        names: dict[str, str] = {}
        for row in self._rows(Files(self.config.classes, "data.classes")):
            if len(row) >= 2:
                names[row[0]] = row[1]

        rows = self._rows(self.files)
        header: list[str] = next(rows, [])
        needed = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
        missing = [name for name in needed if name not in header]
        if missing:
            raise UserError(
                f"data.path: {self.config.path} has no column {missing[0]}; give OpenImages' boxes "
                "CSV, such as train-annotations-bbox.csv"
            )

        # Boxes are gathered by image; a box around a group says nothing about a single object.
        images: dict[str, list[tuple[str, list[str]]]] = {}
        for row in rows:
            entry = dict(zip(header, row, strict=False))
            if entry.get("IsGroupOf") != "1":
                corners = [entry.get(key, "") for key in ("XMin", "YMin", "XMax", "YMax")]
                images.setdefault(entry["ImageID"], []).append(
                    (names.get(entry.get("LabelName", ""), ""), corners)
                )
        return list(images.items())

    def example(self, entry: Any, rng: Random) -> Example:
        id_, boxes = entry
        width, height = self._size(f"{id_}.jpg")
        objects: list[tuple[str, Box]] = []
        for name, corners in boxes:
            try:
                left, top, right, bottom = map(float, corners)
            except ValueError:
                continue
            if name and 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
                inside = centred((left, top, right, bottom), width, height)
                if inside:
                    objects.append((name.lower(), inside))
        return Example(f"openimages-{id_}", self._values(f"{id_}.jpg", objects, None))

    def _size(self, name: str) -> tuple[int, int]:
        """The width and height of an image, from its file's header."""
        try:
            return image_size(self.image(name)(), self.config.max_pixels, name)
        except UnusableImage as error:
            raise BadRecord(str(error)) from error

    @staticmethod
    def _rows(files: Files) -> Any:
        """Yield the rows of the only CSV file at a path. Raises UserError for more or fewer."""
        listed_files = files.list((".csv",))
        if len(listed_files) != 1:
            raise UserError(f"{files.path} is {len(listed_files)} files; give one CSV file")
        with files.open(listed_files[0].name) as file:
            yield from csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
