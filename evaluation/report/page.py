"""The parts of a report, and how they become a page: templates are filled with these
dataclasses."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any, ClassVar, Literal, TypeAlias
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cm3leon.evaluation.report import numbers
from cm3leon.evaluation.report.charts import Curves, chart
from cm3leon.io import atomic

Status = Literal["good", "bad", "plain"]

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Link:
    """A cell that links to a file beside the page or in a folder below it.

    `path` is relative to the page's folder.
    """

    text: str
    path: PurePath

    @property
    def address(self) -> str:
        """The path as an address in which no character can become a protocol, a query or an
        anchor."""
        return f"./{quote(self.path.as_posix())}"


Cell = str | int | float | Link | None


@dataclass(frozen=True)
class Fact:
    """One large figure at the top: its `value`, the `label` of what it measures, and a `note` on
    it."""

    label: str
    value: str
    note: str = ""
    status: Status = "plain"


@dataclass(frozen=True, eq=False)
class Picture:
    """A uint8 image with 1, 3 or 4 channels, drawn `height` CSS pixels tall.

    A `pixelated` image that is enlarged twice or more is drawn at the largest whole multiple of its
    size within `height`, so that its pixels stay squares of one size. `label` stands under it and
    is its text for screen readers.
    """

    pixels_HWC: np.ndarray
    label: str = ""
    pixelated: bool = True
    height: int = 96

    @property
    def uri(self) -> str:
        """The image as a data URI, one PNG pixel for each pixel."""
        return png_uri(self.pixels_HWC)

    def size(self, height: int) -> tuple[int, int]:
        """Width and height in CSS pixels at a given height."""
        native_height, native_width = self.pixels_HWC.shape[:2]
        if self.pixelated and height >= 2 * native_height:
            height -= height % native_height
        return max(1, round(native_width * height / native_height)), height

    def has_squares(self, height: int) -> bool:
        """Whether its pixels are visible as squares when drawn `height` tall."""
        return self.pixelated and height % len(self.pixels_HWC) == 0


@dataclass(frozen=True)
class Card:
    """One sample: its images, the title and caption under them, and retrieved documents at half the
    size."""

    images: Sequence[Picture]
    title: str = ""
    caption: str = ""
    retrieved: Sequence[Picture] = ()
    status: Literal["good", "bad"] | None = None

    @property
    def width(self) -> int:
        """CSS pixels that it needs: its images side by side, and retrieved documents with their
        captions."""
        gap, words, narrowest = 12, 104, 128
        width = sum(image.size(image.height)[0] + gap for image in self.images)
        if self.retrieved:
            thumbnails = [image.size(image.height // 2)[0] for image in self.retrieved]
            width += max(thumbnails) + gap + words
        return max(width, narrowest)


@dataclass(frozen=True)
class Gallery:
    """Cards in a grid of at most `columns` columns; None: as many as fit."""

    kind: ClassVar[str] = "gallery"

    cards: Sequence[Card]
    columns: int | None = None
    caption: str = ""


@dataclass(frozen=True)
class Strip:
    """Titled rows of images aligned in columns, such as originals over their reconstructions."""

    kind: ClassVar[str] = "strip"

    rows: Sequence[tuple[str, Sequence[Picture]]]
    caption: str = ""


@dataclass(frozen=True)
class WrittenCell:
    """A cell of a table as the template writes it."""

    text: str
    is_number: bool
    address: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, one for each column; the first cell of a row names it.

    `highlight` holds indices of rows. A table whose columns are all called "" has no header.
    """

    kind: ClassVar[str] = "table"

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    highlight: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls, rows: Sequence[Mapping[str, Cell]], caption: str = "", highlight: Collection[int] = ()
    ) -> Table:
        """A table of rows that name their cells; missing ones become a dash."""
        names: dict[str, None] = {}
        for row in rows:
            names |= dict.fromkeys(row)
        columns = list(names)
        cells = []
        for row in rows:
            cells.append([row.get(name) for name in columns])
        return cls(columns, cells, caption, frozenset(highlight))

    def written(self) -> tuple[list[WrittenCell], list[list[WrittenCell]]]:
        """The column names and the rows as text, with floats of a column aligned."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row of the table has {len(row)} cells, for {len(self.columns)} columns: "
                    f"{row!r}"
                )

        head: list[WrittenCell] = []
        body: list[list[WrittenCell]] = [[] for _ in self.rows]
        for index, name in enumerate(self.columns):
            # A link is written as its text, and leads to its address.
            cells: list[str | float | None] = []
            addresses = []
            for row in self.rows:
                cell, address = row[index], ""
                if isinstance(cell, Link):
                    address = cell.address
                    cell = cell.text
                cells.append(cell)
                addresses.append(address)

            # A cell's decimals, and the side it stands at, depend on its whole column.
            texts = numbers.column(cells)
            is_number = numbers.is_numeric(texts)
            head.append(WrittenCell(name, is_number))
            for line, text, address in zip(body, texts, addresses, strict=True):
                line.append(WrittenCell(text, is_number, address))
        return head, body


@dataclass(frozen=True)
class Text:
    """Prose; a blank line starts a new paragraph."""

    kind: ClassVar[str] = "text"

    text: str


@dataclass(frozen=True)
class Code:
    """Text kept line by line: a command, a configuration."""

    kind: ClassVar[str] = "code"

    text: str


Content: TypeAlias = "Table | Gallery | Strip | Curves | Text | Code | Folded"
"""A block; `templates/blocks.html` has a macro for each kind."""


@dataclass(frozen=True)
class Folded:
    """Blocks that appear when their title is clicked: things to look up rather than read."""

    kind: ClassVar[str] = "folded"

    title: str
    blocks: Sequence[Content]


@dataclass(frozen=True)
class Section:
    """A heading, an introduction, and what there is to see."""

    title: str
    text: str = ""
    blocks: Sequence[Content] = ()


@dataclass(frozen=True)
class Report:
    """A page: title, the figures that matter, sections."""

    title: str
    subtitle: str = ""
    facts: Sequence[Fact] = ()
    sections: Sequence[Section] = ()
    footer: str = ""


def write_report(path: str | Path, report: Report) -> None:
    """Write the page to `path` atomically: a reader sees the old file or the new one."""
    write_page(path, render(report))


def write_page(path: str | Path, page: str) -> None:
    """Write HTML to a file atomically."""
    content = page.encode("utf-8", errors="xmlcharrefreplace")  # captions may hold lone surrogates
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path, shared=True) as partial:
        partial.write_bytes(content)


def render(report: Report) -> str:
    """The page as HTML."""
    return fill("report.html", report=report)


# ---------------------------------------------------------------------------------------- templates


def fill(template: str, **data: Any) -> str:
    """Fill a file of `templates/` with data; every string of the data is escaped."""
    return _environment().get_template(template).render(data)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(chart=chart, counted=numbers.counted, span=numbers.span)
    environment.filters.update(paragraphs=paragraphs, png_uri=png_uri, px=px)
    return environment


def paragraphs(text: str) -> list[str]:
    """The runs of text between blank lines."""
    parts = [part.strip() for part in re.split(r"\n\s*\n", text)]
    return [part for part in parts if part]


def px(length: float) -> str:
    """A length in a drawing, in tenths of a CSS pixel."""
    return f"{length:.1f}"


def png_uri(pixels_HWC: np.ndarray) -> str:
    """An image as a data URI, one PNG pixel for each pixel."""
    from PIL import Image

    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"a picture is uint8 (H, W, 1, 3 or 4), not {pixels_HWC.dtype} {pixels_HWC.shape}"
        )
    # Pillow takes grey images without the axis of channels.
    pixels = pixels_HWC
    if pixels_HWC.shape[2] == 1:
        pixels = pixels_HWC[:, :, 0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
