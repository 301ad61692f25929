"""What a corpus holds and what is broken in it, found by reading all its parts once."""

from __future__ import annotations

import re
import time
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from cm3leon.data.images import counted_modes
from cm3leon.data.source import Skipped, Source
from cm3leon.terminal import printable
from cm3leon.types import Document, ImageSegment

SECONDS_A_LINE = 1.0
"""Seconds between two updates of the progress bar."""


@dataclass
class Broken:
    """Items that are left out for the same reason: how many, and the files of some."""

    count: int = 0
    files: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Seen:
    """What was read so far.

    Lengths and sizes are counted by value; besides, a document costs 16 bytes, by which repeated
    ones are found.
    """

    limit: int = 5
    """How many files are named for each reason."""
    kinds: Counter[str] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    text_bytes: int = 0
    sides: Counter[int] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    broken: dict[str, Broken] = field(default_factory=dict)
    ids: array[int] = field(default_factory=lambda: array("q"))
    """Hashes of the documents' ids."""
    contents: array[int] = field(default_factory=lambda: array("q"))
    """Hashes of their texts and images."""
    seconds: float = 0.0

    @property
    def documents(self) -> int:
        """Number of usable documents."""
        return self.kinds.total()

    @property
    def images(self) -> int:
        """Number of images in usable documents."""
        return self.sides.total()

    @property
    def skipped(self) -> int:
        """Number of items that are left out."""
        return sum(broken.count for broken in self.broken.values())

    def add(self, item: Document | Skipped) -> None:
        """Count an item."""
        if isinstance(item, Skipped):
            broken = self.broken.setdefault(_without_particulars(item.reason), Broken())
            broken.count += 1
            if len(broken.files) < self.limit:
                broken.files.append((item.file, item.reason))
            return

        images = [segment for segment in item.segments if isinstance(segment, ImageSegment)]
        self.kinds[_kind(item, len(images))] += 1
        self.sides.update(min(image.pixels_HWC.shape[:2]) for image in images)
        self.pixels.update(image.pixels_HWC[..., 0].size for image in images)
        self.ids.append(hash(item.id))
        self.contents.append(_content_hash(item))
        if item.text:
            self.characters[len(item.text)] += 1
            self.text_bytes += len(item.text.encode())

    def report(self) -> list[str]:
        """The lines of the report."""
        share = self.skipped / max(1, self.skipped + self.documents)
        lines = [
            f"documents  {self.documents:,} usable, {self.skipped:,} items left out ({share:.1%})"
        ]
        lines += [f"           {count:,} {kind}" for kind, count in self.kinds.most_common()]

        if self.characters:
            lines.append(f"text       characters a document: {_spread(self.characters)}")
        if self.sides:
            modes = ", ".join(f"{mode} {count:,}" for mode, count in self.modes.most_common())
            kinds = f" ({modes} in their files)" if modes else ""
            lines.append(f"images     {self.images:,}{kinds}")
            lines.append(f"           shorter side in pixels: {_spread(self.sides)}")
            lines.append(f"           pixels: {_spread(self.pixels)}")

        for what, hashes in (("an id", self.ids), ("the text and the images", self.contents)):
            if repeats := _repeats(hashes):
                lines.append(f"repeated   {repeats:,} documents have {what} of an earlier one")

        # The most frequent reasons come first, each with a few of its files.
        for reason, broken in sorted(self.broken.items(), key=lambda entry: -entry[1].count):
            lines.append(f"left out   {broken.count:,}: {printable(reason)}")
            for file, told in broken.files:
                lines.append(f"             {printable(file)}: {printable(told)}")
            if broken.count > len(broken.files):
                lines.append(f"             and {broken.count - len(broken.files):,} more")
        return lines


def _kind(document: Document, images: int) -> str:
    """What a document consists of, in words."""
    if not images:
        return "of text alone"
    if len(document.segments) == 1:
        return "of an image alone"
    if len(document.segments) == 2 and images == 1:
        return "of a caption and its image"
    return "pages of text and images"


def _without_particulars(reason: str) -> str:
    """A reason without names and numbers, so that similar ones are counted together."""
    return _PARTICULARS.sub("...", reason)


_PARTICULARS = re.compile(r"""'(?:\\.|[^'\\])*'|"[^"]*'[^"]*"|0x[0-9a-f]+|\d[\dx]*""")


def _content_hash(document: Document) -> int:
    """A hash of a document's texts and pixels, equal for equal content."""
    contents: list[Any] = []
    for segment in document.segments:
        if isinstance(segment, ImageSegment):
            contents.append((segment.pixels_HWC.shape, segment.pixels_HWC.tobytes()))
        else:
            contents.append(segment)
    return hash(tuple(contents))


def _repeats(hashes: array[int]) -> int:
    """How many of the hashes occurred before."""
    return len(hashes) - len(np.unique(np.frombuffer(hashes, np.int64)))


def _spread(counts: Counter[int]) -> str:
    """The smallest, median, 95th percentile and largest of counted values, in words."""
    shares = {"least": 0.0, "median": 0.5, "95 %": 0.95, "most": 1.0}
    return ", ".join(f"{name} {quantile(counts, share):,}" for name, share in shares.items())


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The smallest value that at least this share of all values does not exceed."""
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    return values[int(np.searchsorted(ends, share * ends[-1]))]


def read(source: Source, seen: Seen) -> bool:
    """Read all parts of a corpus, showing how many are left. Returns False if Ctrl-C ended it."""
    start = shown = time.perf_counter()
    try:
        with (
            counted_modes() as seen.modes,
            tqdm(desc="validate", unit="part", dynamic_ncols=True) as bar,
        ):
            parts = source.parts()
            bar.total = len(parts)
            for part in parts:
                for item in source.read(part):
                    seen.add(item)

                    # A large part takes long, so the line is updated within it.
                    now = time.perf_counter()
                    if now - shown > SECONDS_A_LINE:
                        shown = now
                        rate = f"{(seen.documents + seen.skipped) / (now - start):,.0f}/s"
                        bar.set_postfix(documents=seen.documents, left_out=seen.skipped, rate=rate)
                bar.update()
        return True
    except KeyboardInterrupt:
        return False
    finally:
        seen.seconds = time.perf_counter() - start
