"""What a corpus holds, what is broken in it, and what tokenising it will cost.

    python -m cm3leon.run validate data.path=DIR
    python -m cm3leon.run validate data.name=parquet data.path='tables/**/*.parquet' experiment=NAME limit=100

Everything is read once, as training would read it; Ctrl-C prints what was seen until then.
"""

from __future__ import annotations

import re
import time
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from tqdm import tqdm

from cm3leon.config import Component, PositiveInt, from_mapping, settled, to_mapping
from cm3leon.data.files import Files
from cm3leon.data.folder import TABLES
from cm3leon.data.images import SUFFIXES, counted_modes
from cm3leon.data.source import Skipped, Source
from cm3leon.experiment import Experiment, load_experiment
from cm3leon.registry import IMAGE_TOKENIZERS, RETRIEVERS, SOURCES, discover
from cm3leon.terminal import printable
from cm3leon.tokenizers.vocab import Vocab
from cm3leon.training.device import best_device
from cm3leon.types import Document, ImageSegment, UserError

FORMATS = {
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "parquet": (".parquet",),
    "folder": tuple(sorted(SUFFIXES)),
    "jsonl": (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"),
}
"""Sources that are told by the endings of the files under a path."""
FAR_MORE = 10
"""A kind of files with so many times the bytes of any other is taken, whatever their numbers."""
PAPER_CODES = 1024
"""Codes of an image of 256 x 256 pixels (paper section 2.1)."""
BYTES_A_TEXT_TOKEN = 4.0
"""Of English text, about, with a vocabulary of tens of thousands of pieces."""
SECONDS_A_LINE = 1.0
"""Between two updates of the progress bar."""
CLIP_WIDTH = 512
"""Width of the vectors of CLIP ViT-B/32 (paper section 2.2)."""
TIMED_IMAGES = 16
"""Images of a timed batch; batches are timed for half a second."""


@dataclass(kw_only=True)
class Options:
    """Options of the command."""

    data: Annotated[Component, SOURCES]
    """The source, as the section data of an experiment; without a name it is told by the files under data.path."""
    experiment: str | None = None
    """Experiment whose tokenizers and encoder the cost is stated for, and whose section data is read."""
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
    seen = Seen(options.limit)
    finished = read(source, seen)
    print(f"source     {options.data.name}")
    print("\n".join([*seen.report(), *cost(seen, experiment)]))
    if not finished:
        print("stopped before the end: the figures are of what was read until then")
        raise SystemExit(130)
    if not seen.documents:
        raise UserError(f"data: no usable documents in the corpus ({seen.skipped} items left out)")


def _options(mapping: Mapping[str, Any]) -> tuple[Options, Experiment | None]:
    """The options, with the source's name and the experiment's data filled in, and the experiment."""
    data = with_source_name(mapping.get("data"))
    if not mapping.get("experiment"):
        if data is None:
            raise UserError(
                "data.path is missing; write data.path=PATH, and data.name=NAME if the files do not tell it"
            )
        return from_mapping(Options, {**mapping, "data": data}), None
    experiment = load_experiment(str(mapping["experiment"]), settings=_settings(data))
    return from_mapping(Options, {**mapping, "data": to_mapping(experiment.data)}), experiment


def _settings(data: Any) -> dict[str, Any]:
    """The section as dotted keys: another name replaces an experiment's section, other keys are added."""
    section = {"name": data} if isinstance(data, str) else dict(data or {})
    name = {"data": section.pop("name")} if "name" in section else {}
    return {**name, **{f"data.{key}": value for key, value in section.items()}}


def with_source_name(data: Any) -> Any:
    """A section `data` with the name of the source that reads the files under its path, unless it has one.

    Prints which kind of files was taken where there are others.
    """
    if not isinstance(data, Mapping) or "name" in data:
        return data
    path = settled(str | list[str], data.get("path"), "data.path")
    if not path or not isinstance(path, (str, list)):
        return data
    name, others = told_source(path)
    if others:
        print(f"data.name  {name}, whose files fill data.path; not read: {'; '.join(others)}")
    return {"name": name, **data}


def told_source(path: str | list[str]) -> tuple[str, list[str]]:
    """The source that reads most of what lies under a path, and what lies there for other sources, in words.

    The kind of files with ten times the bytes of any other is taken, or else the one with the most files. Tables of
    captions and texts beside images belong to these.

    Raises:
        UserError: if no file has a known ending.
    """
    files = Files(path)
    kinds: dict[str, list[int]] = {}
    for file in files.list(tuple(ending for endings in FORMATS.values() for ending in endings)):
        if file.name.rpartition("/")[2] in TABLES:
            continue
        # A path that names one file lists it whatever its ending.
        for kind, ends in FORMATS.items():
            if file.name.lower().endswith(ends):
                kinds.setdefault(kind, []).append(file.size)
                break
    if not kinds:
        known = ", ".join(ending for endings in FORMATS.values() for ending in endings)
        raise UserError(
            f"data.path: {files.path} holds no files that end in {known}; say what it is with data.name=NAME"
        )

    by_bytes = sorted(kinds, key=lambda kind: -sum(kinds[kind]))
    rest = max((sum(kinds[kind]) for kind in by_bytes[1:]), default=0)
    chosen = by_bytes[0]
    if sum(kinds[chosen]) < FAR_MORE * rest:
        chosen = max(by_bytes, key=lambda kind: len(kinds[kind]))
    others = [
        f"{len(sizes):,} {'file' if len(sizes) == 1 else 'files'} for data.name={kind} "
        f"({_bytes(sum(sizes))})"
        for kind, sizes in kinds.items()
        if kind != chosen
    ]
    return chosen, others


# ------------------------------------------------------------------------------------------------ reading


@dataclass
class Broken:
    """Items that are left out for one reason: how many, and the files of some."""

    count: int = 0
    files: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Seen:
    """What was read. A document costs 16 bytes, for finding repeated ones; lengths and sizes are counted by value."""

    limit: int = 5
    """Files named for each reason."""
    kinds: Counter[str] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    text_bytes: int = 0
    sides: Counter[int] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    broken: dict[str, Broken] = field(default_factory=dict)
    ids: array[int] = field(default_factory=lambda: array("q"))
    """Hashes of the ids."""
    contents: array[int] = field(default_factory=lambda: array("q"))
    """Hashes of texts and images."""
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
        """The report's lines."""
        share = self.skipped / max(1, self.skipped + self.documents)
        lines = [
            f"documents  {self.documents:,} usable, {self.skipped:,} items left out ({share:.1%})"
        ]
        lines += [f"           {count:,} {kind}" for kind, count in self.kinds.most_common()]
        if self.characters:
            lines.append(f"text       characters a document: {_spread(self.characters)}")
        if self.sides:
            modes = ", ".join(f"{mode} {count:,}" for mode, count in self.modes.most_common())
            lines.append(
                f"images     {self.images:,}" + (f" ({modes} in their files)" if modes else "")
            )
            lines.append(f"           shorter side in pixels: {_spread(self.sides)}")
            lines.append(f"           pixels: {_spread(self.pixels)}")
        for what, hashes in (("an id", self.ids), ("the text and the images", self.contents)):
            if repeats := _repeats(hashes):
                lines.append(f"repeated   {repeats:,} documents have {what} of an earlier one")
        for reason, broken in sorted(self.broken.items(), key=lambda entry: -entry[1].count):
            lines.append(f"left out   {broken.count:,}: {printable(reason)}")
            lines += [
                f"             {printable(file)}: {printable(told)}" for file, told in broken.files
            ]
            if broken.count > len(broken.files):
                lines.append(f"             and {broken.count - len(broken.files):,} more")
        return lines


def _kind(document: Document, images: int) -> str:
    if not images:
        return "of text alone"
    if len(document.segments) == 1:
        return "of an image alone"
    return (
        "of a caption and its image"
        if len(document.segments) == 2 and images == 1
        else "pages of text and images"
    )


def _without_particulars(reason: str) -> str:
    """The reason without names and numbers, so that like ones are counted together."""
    return _PARTICULARS.sub("...", reason)


_PARTICULARS = re.compile(r"""'(?:\\.|[^'\\])*'|"[^"]*'[^"]*"|0x[0-9a-f]+|\d[\dx]*""")


def _content_hash(document: Document) -> int:
    return hash(
        tuple(
            (segment.pixels_HWC.shape, segment.pixels_HWC.tobytes())
            if isinstance(segment, ImageSegment)
            else segment
            for segment in document.segments
        )
    )


def _repeats(hashes: array[int]) -> int:
    """How many of the values occurred before."""
    return len(hashes) - len(np.unique(np.frombuffer(hashes, np.int64)))


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


# ------------------------------------------------------------------------------------------------ cost


@dataclass(frozen=True)
class Cost:
    """What a document costs: codes of an image, bytes of a token, width of a vector, images encoded a second."""

    whose: str = "the paper's"
    codes: int = PAPER_CODES
    token_bytes: int = 2
    width: int = CLIP_WIDTH
    rate: float | None = None

    @classmethod
    def of(cls, experiment: Experiment) -> Cost:
        """The cost with an experiment's tokenizers and encoder; its image tokenizer is timed on this machine."""
        tokenizer = IMAGE_TOKENIZERS.build(experiment.image_tokenizer).to(best_device()).ready()
        vocab = Vocab(
            experiment.text_tokenizer.vocab_size, tokenizer.codebook_size, experiment.sentinels
        )
        return cls(
            whose="the experiment's",
            codes=tokenizer.grid**2,
            token_bytes=np.dtype(vocab.id_dtype).itemsize,
            width=RETRIEVERS.get(experiment.retriever.name).vector_width(
                experiment.retriever.config
            ),
            rate=_images_per_second(tokenizer),
        )


def cost(seen: Seen, experiment: Experiment | None) -> list[str]:
    """What tokenising the documents will take, as the report's last lines."""
    each = Cost.of(experiment) if experiment else Cost()
    tokens = seen.images * each.codes + seen.text_bytes / BYTES_A_TEXT_TOKEN
    vectors = 2 * each.width * 2 * seen.documents
    lines = [
        f"tokens     about {tokens:,.0f} by {each.whose} tokenizers: {each.codes:,} an image, one for "
        f"{BYTES_A_TEXT_TOKEN:g} bytes of text",
        f"disk       tokens {_bytes(each.token_bytes * tokens)} ({each.token_bytes} bytes each), vectors "
        f"{_bytes(vectors)} (text and image, {each.width} x 2 bytes each)",
        f"time       reading and decoding took {seen.seconds:.1f} s in one process, "
        f"{seen.documents / max(seen.seconds, 1e-9):,.0f} documents/s",
    ]
    if each.rate is None:
        lines.append(
            "           encoding images is not timed; give experiment=NAME to time its image tokenizer here"
        )
    else:
        took = _duration(seen.images / each.rate)
        lines.append(
            f"           encoding images: {each.rate:,.0f} images/s on this machine's {_device()}, {took} in all"
        )
    return lines


def _images_per_second(tokenizer: Any) -> float:
    """Speed of encoding, which does not depend on the weights."""
    size = tokenizer.image_size
    images_BHWC = np.zeros((TIMED_IMAGES, size, size, 3), np.uint8)
    tokenizer.encode(images_BHWC)
    start, batches = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < 0.5:
        tokenizer.encode(images_BHWC)
        batches += 1
    return batches * TIMED_IMAGES / seconds


def _device() -> str:
    return "GPU" if best_device().type == "cuda" else "CPU"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:,.1f} hours"
