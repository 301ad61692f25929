"""What a corpus holds, what is broken in it, and what tokenising it will cost.

    python -m cm3leon.run validate data.path=DIR
    python -m cm3leon.run validate data.name=parquet data.path='tables/**/*.parquet' experiment=NAME limit=100

Everything is read once, as training would read it; Ctrl-C prints what was seen until then.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from cm3leon.config import Component, PositiveInt, from_mapping, to_mapping
from cm3leon.data.files import Files
from cm3leon.data.images import SUFFIXES, counted_modes
from cm3leon.data.source import Skipped, Source
from cm3leon.experiment import Experiment, load_experiment
from cm3leon.registry import IMAGE_TOKENIZERS, SOURCES, discover
from cm3leon.types import Document, ImageSegment, UserError

FORMATS = {
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "parquet": (".parquet",),
    "folder": tuple(sorted(SUFFIXES)),
    "jsonl": (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"),
}
"""Sources that are told by the endings of the files; the first one that finds any is taken."""
PAPER_CODES = 1024
"""Codes of an image of 256 x 256 pixels (paper section 2.1)."""
BYTES_A_TEXT_TOKEN = 4.0
"""Of English text, about, with a vocabulary of tens of thousands of pieces."""
CLIP_WIDTH = 512
"""Width of the vectors of CLIP ViT-B/32 (paper section 2.2)."""
TIMED_IMAGES = 16


@dataclass(kw_only=True)
class Options:
    """Options of the command."""

    data: Annotated[Component, SOURCES]
    """The source, as the section data of an experiment; without a name it is told by the files under data.path."""
    experiment: str | None = None
    """Experiment whose image tokenizer the cost is stated for, and whose data is read if none is given."""
    limit: PositiveInt = 5
    """Files named for each reason."""


def main(mapping: Mapping[str, Any]) -> None:
    """Reads the corpus and prints the report.

    Raises:
        UserError: for a mistake in the options, a corpus that is missing, or one without a usable document.
    """
    discover()
    options, experiment = _options(mapping)
    source = SOURCES.build(options.data)
    seen = Seen()
    finished = read(source, seen)
    print("\n".join([*seen.report(options.limit), *cost(seen, experiment)]))
    if not finished:
        print("stopped before the end: the figures are of what was read until then")
        raise SystemExit(130)
    if not seen.documents:
        raise UserError(f"data: no usable documents in the corpus ({seen.skipped} items left out)")


def _options(mapping: Mapping[str, Any]) -> tuple[Options, Experiment | None]:
    """The options, with the source's name and the experiment's data filled in, and the experiment."""
    given = dict(mapping)
    experiment = load_experiment(str(given["experiment"])) if given.get("experiment") else None
    data = given.get("data")
    if data is None and experiment:
        given["data"] = to_mapping(experiment.data)
    elif data is None:
        raise UserError("data.path is missing; write data.path=PATH, with data.name=NAME if the files do not tell it")
    else:
        given["data"] = with_source_name(data)
    return from_mapping(Options, given), experiment


def with_source_name(data: Any) -> Any:
    """A section `data` with the name of the source that reads the files under its path, unless it has one."""
    if isinstance(data, Mapping) and "name" not in data and isinstance(data.get("path"), str):
        return {"name": source_name(data["path"]), **data}
    return data


def source_name(path: str) -> str:
    """The source that reads the files under a path. Raises UserError if no file has a known ending."""
    files = Files(path)
    for name, endings in FORMATS.items():
        if any(file.name.lower().endswith(endings) for file in files.list(endings)):
            return name
    known = ", ".join(ending for endings in FORMATS.values() for ending in endings)
    raise UserError(f"data.path: {path} holds no files that end in {known}; say what it is with data.name=NAME")


# ------------------------------------------------------------------------------------------------ reading


@dataclass
class Broken:
    """Items that are left out for one reason: how many, and the files of some."""

    count: int = 0
    files: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Seen:
    """What was read. Memory does not grow with the corpus: lengths and sizes are counted by value."""

    kinds: Counter[str] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    text_bytes: int = 0
    sides: Counter[int] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    broken: dict[str, Broken] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def documents(self) -> int:
        """Usable documents."""
        return self.kinds.total()

    @property
    def images(self) -> int:
        """Images of usable documents."""
        return self.sides.total()

    @property
    def skipped(self) -> int:
        """Items that are left out."""
        return sum(broken.count for broken in self.broken.values())

    def add(self, item: Document | Skipped) -> None:
        """Takes an item into account."""
        if isinstance(item, Skipped):
            broken = self.broken.setdefault(_without_particulars(item.reason), Broken())
            broken.count += 1
            if len(broken.files) < 100:
                broken.files.append((item.file, item.reason))
            return
        images = [segment for segment in item.segments if isinstance(segment, ImageSegment)]
        self.kinds[_kind(item, len(images))] += 1
        self.sides.update(min(image.pixels_HWC.shape[:2]) for image in images)
        if item.text:
            self.characters[len(item.text)] += 1
            self.text_bytes += len(item.text.encode())

    def report(self, limit: int) -> list[str]:
        """The report's lines, with up to `limit` files for each reason."""
        share = self.skipped / max(1, self.skipped + self.documents)
        lines = [f"documents  {self.documents:,} usable, {self.skipped:,} items left out ({share:.1%})"]
        lines += [f"           {count:,} {kind}" for kind, count in self.kinds.most_common()]
        if self.characters:
            lines.append(f"text       characters a document: {_spread(self.characters)}")
        if self.sides:
            modes = ", ".join(f"{mode} {count:,}" for mode, count in self.modes.most_common())
            lines.append(f"images     {self.images:,} ({modes}); shorter side in pixels: {_spread(self.sides)}")
        for reason, broken in sorted(self.broken.items(), key=lambda entry: -entry[1].count):
            lines.append(f"left out   {broken.count:,}: {reason}")
            lines += [f"             {file}: {told}" for file, told in broken.files[:limit]]
            if broken.count > limit:
                lines.append(f"             and {broken.count - min(limit, len(broken.files)):,} more")
        return lines


def _kind(document: Document, images: int) -> str:
    if not images:
        return "of text alone"
    if len(document.segments) == 1:
        return "of an image alone"
    return "of a caption and its image" if len(document.segments) == 2 and images == 1 else "pages of text and images"


def _without_particulars(reason: str) -> str:
    """The reason without names and numbers, so that like ones are counted together."""
    return re.sub(r"'[^']*'|\d[\dx]*", "...", reason)


def _spread(counts: Counter[int]) -> str:
    shares = {"least": 0.0, "median": 0.5, "95 %": 0.95, "most": 1.0}
    return ", ".join(f"{name} {quantile(counts, share):,}" for name, share in shares.items())


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The least value that at least this share of all values does not exceed."""
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    return values[int(np.searchsorted(ends, share * ends[-1]))]


def read(source: Source, seen: Seen) -> bool:
    """Reads all parts of a corpus, showing how many are left; False if Ctrl-C ended it."""
    start = time.perf_counter()
    try:
        with counted_modes() as seen.modes:
            parts = tqdm(source.parts(), desc="validate", unit="part", mininterval=1.0, dynamic_ncols=True)
            for part in parts:
                for item in source.read(part):
                    seen.add(item)
                    parts.set_postfix(documents=seen.documents, left_out=seen.skipped, refresh=False)
                    parts.update(0)
        return True
    except KeyboardInterrupt:
        return False
    finally:
        seen.seconds = time.perf_counter() - start


# ------------------------------------------------------------------------------------------------ cost


def cost(seen: Seen, experiment: Experiment | None) -> Sequence[str]:
    """What tokenising the documents will take, as the report's last lines."""
    codes, whose, rate = PAPER_CODES, "the paper's", None
    if experiment:
        tokenizer = IMAGE_TOKENIZERS.build(experiment.image_tokenizer).eval()
        codes, rate = tokenizer.grid**2, _images_per_second(tokenizer)
        whose = "the experiment's"
    text = seen.text_bytes / BYTES_A_TEXT_TOKEN
    tokens = seen.images * codes + text
    lines = [
        f"tokens     about {tokens:,.0f} by {whose} tokenizers: {codes:,} an image, one for "
        f"{BYTES_A_TEXT_TOKEN:g} bytes of text",
        f"disk       tokens {_bytes(2 * tokens)} (2 bytes each), vectors {_bytes(4 * CLIP_WIDTH * seen.documents)} "
        f"(text and image, {CLIP_WIDTH} x 2 bytes each)",
        f"time       reading and decoding took {seen.seconds:.1f} s in one process, "
        f"{seen.documents / max(seen.seconds, 1e-9):,.0f} documents/s",
    ]
    if rate is None:
        lines.append("           encoding images is not timed; give experiment=NAME to time its image tokenizer here")
    else:
        took = _duration(seen.images / rate)
        lines.append(f"           encoding images: {rate:,.0f} images/s on this machine's CPU, {took} in all")
    return lines


def _images_per_second(tokenizer: Any) -> float:
    """Speed of encoding, which does not depend on the weights."""
    size = tokenizer.image_size
    images_BHWC = np.zeros((TIMED_IMAGES, size, size, 3), np.uint8)
    tokenizer.encode(images_BHWC[:1])
    start = time.perf_counter()
    tokenizer.encode(images_BHWC)
    return TIMED_IMAGES / (time.perf_counter() - start)


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:,.1f} hours"
