"""Read a corpus, and print what it holds, what is broken in it, and what tokenising it will cost.

    python -m cm3leon.run validate data.path=tars
    python -m cm3leon.run validate data.name=parquet data.path='t/**/*.parquet' experiment=corpus

Everything is read once, as training would read it; Ctrl-C prints what was read until then.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cm3leon.commands.words import DataOptions
from cm3leon.config import PositiveInt, to_mapping
from cm3leon.registry import IMAGE_TOKENIZERS, RETRIEVERS, SOURCES
from cm3leon.types import UserError

if TYPE_CHECKING:
    from cm3leon.data.survey import Seen
    from cm3leon.experiment import Experiment
    from cm3leon.tokenizers.image.base import ImageTokenizer

PAPER_CODES = 1024
"""Codes of an image of 256 x 256 pixels (paper section 2.1)."""
BYTES_A_TEXT_TOKEN = 4.0
"""Rough figure for English text and a vocabulary of tens of thousands of pieces."""
CLIP_WIDTH = 512
"""Width of the vectors of CLIP ViT-B/32 (paper section 2.2)."""
TIMED_IMAGES = 16
"""Images of a timed batch; batches are timed for half a second."""


@dataclass(kw_only=True)
class Options(DataOptions):
    """Options of the command validate."""

    experiment: str | None = None
    """Name or .yaml file of an experiment. Its section data is the default of `data`, and the cost
    is that of its tokenizers and encoder."""
    limit: PositiveInt = 5
    """How many files are named for each reason."""

    @classmethod
    def completed(cls, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the name of the source, and an experiment's other settings of it."""
        completed = super().completed(mapping)
        if not mapping.get("experiment"):
            return completed
        from cm3leon.experiment import load_experiment

        settings = _settings(completed.get("data"))
        experiment = load_experiment(str(mapping["experiment"]), settings=settings)
        return {**completed, "data": to_mapping(experiment.data)}


def main(options: Options) -> int | None:
    """Read the corpus and print the report.

    Returns:
        130 if Ctrl-C stopped it.

    Raises:
        UserError: for a corpus that does not exist or has no usable document.
    """
    from cm3leon.data.survey import Seen, read
    from cm3leon.experiment import load_experiment

    experiment = None
    if options.experiment:
        data = to_mapping(options.data)
        experiment = load_experiment(options.experiment, sections={"data": data})

    # What was read until Ctrl-C is reported too, with another exit code.
    source = SOURCES.build(options.data)
    seen = Seen(options.limit)
    finished = read(source, seen)
    print(f"source     {options.data.name}")
    print("\n".join([*seen.report(), *cost(seen, experiment)]))

    if not finished:
        print("stopped before the end; the figures cover what was read so far")
        return 130
    if not seen.documents:
        raise UserError(f"data: no usable documents in the corpus ({seen.skipped} items left out)")
    return None


def _settings(data: Any) -> dict[str, Any]:
    """The section data as settings of an experiment: `data` for its name, `data.KEY` for the rest.

    Another name replaces the experiment's whole section; other keys are added to it.
    """
    if isinstance(data, str):
        return {"data": data}
    section = dict(data or {})
    # Settings are applied in their order, so that the name, which may replace the section, is first.
    settings = {"data": section.pop("name")} if "name" in section else {}
    for key, value in section.items():
        settings[f"data.{key}"] = value
    return settings


@dataclass(frozen=True)
class Cost:
    """What a document costs."""

    whose: str = "the paper's"
    """Whose tokenizers and encoder the figures are for."""
    codes: int = PAPER_CODES
    """Codes of an image."""
    token_bytes: int = 2
    width: int = CLIP_WIDTH
    """Width of a vector."""
    rate: float | None = None
    """Images that this machine encodes in a second; None if that was not measured."""

    @classmethod
    def of(cls, experiment: Experiment) -> Cost:
        """The cost with an experiment's tokenizers, of which this times the image tokenizer."""
        from cm3leon.tokenizers.vocab import Vocab
        from cm3leon.training.device import best_device

        tokenizer = IMAGE_TOKENIZERS.build(experiment.image_tokenizer).to(best_device()).ready()
        vocab = Vocab(
            experiment.text_tokenizer.vocab_size, tokenizer.codebook_size, experiment.sentinels
        )
        retriever = experiment.retriever
        return cls(
            whose="the experiment's",
            codes=tokenizer.grid**2,
            token_bytes=np.dtype(vocab.id_dtype).itemsize,
            width=RETRIEVERS.get(retriever.name).vector_width(retriever.config),
            rate=_images_per_second(tokenizer),
        )


def cost(seen: Seen, experiment: Experiment | None) -> list[str]:
    """What tokenising the documents will take, as the report's last lines."""
    from cm3leon.data.formats import in_bytes

    each = Cost()
    if experiment is not None:
        each = Cost.of(experiment)
    tokens = seen.images * each.codes + seen.text_bytes / BYTES_A_TEXT_TOKEN
    vectors = 2 * each.width * 2 * seen.documents  # of text and of image, in float16
    lines = [
        f"tokens     about {tokens:,.0f} by {each.whose} tokenizers: {each.codes:,} an image, "
        f"one for {BYTES_A_TEXT_TOKEN:g} bytes of text",
        f"disk       tokens {in_bytes(each.token_bytes * tokens)} ({each.token_bytes} bytes each), "
        f"vectors {in_bytes(vectors)} (text and image, {each.width} x 2 bytes each)",
        f"time       reading and decoding took {seen.seconds:.1f} s in one process, "
        f"{seen.documents / max(seen.seconds, 1e-9):,.0f} documents/s",
    ]

    if each.rate is None:
        encoding = "is not timed; give experiment=NAME to time its image tokenizer here"
        return [*lines, f"           encoding images {encoding}"]
    took = _duration(seen.images / each.rate)
    encoding = f"{each.rate:,.0f} images/s on this machine's {_device()}, {took} in all"
    return [*lines, f"           encoding images: {encoding}"]


def _images_per_second(tokenizer: ImageTokenizer) -> float:
    """Speed of encoding; it does not depend on the weights, which need not be trained."""
    size = tokenizer.image_size
    images_BHWC = np.zeros((TIMED_IMAGES, size, size, 3), np.uint8)
    tokenizer.encode(images_BHWC)  # the first pass is slower
    start, batches = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < 0.5:
        tokenizer.encode(images_BHWC)
        batches += 1
    return batches * TIMED_IMAGES / seconds


def _device() -> str:
    from cm3leon.training.device import best_device

    return "GPU" if best_device().type == "cuda" else "CPU"


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:,.1f} hours"
