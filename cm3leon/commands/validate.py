"""Read a corpus, say what it holds, what is broken in it, and what tokenising it will cost.

    python -m cm3leon.run validate data.path=tars
    python -m cm3leon.run validate data.name=parquet data.path='tables/**/*.parquet' experiment=corpus limit=100

Everything is read once, as training would read it; Ctrl-C prints what was seen until then.
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
"""Of English text, about, with a vocabulary of tens of thousands of pieces."""
CLIP_WIDTH = 512
"""Width of the vectors of CLIP ViT-B/32 (paper section 2.2)."""
TIMED_IMAGES = 16
"""Images of a timed batch; batches are timed for half a second."""


@dataclass(kw_only=True)
class Options(DataOptions):
    """Options of the command validate."""

    experiment: str | None = None
    """Name or .yaml file of an experiment whose tokenizers and encoder the cost is stated for, and whose section data
    is read."""
    limit: PositiveInt = 5
    """Files named for each reason."""

    @classmethod
    def completed(cls, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the name of the source, and the rest of its section by the experiment, if one is named."""
        completed = super().completed(mapping)
        if not mapping.get("experiment"):
            return completed
        from cm3leon.experiment import load_experiment

        settings = _settings(completed.get("data"))
        experiment = load_experiment(str(mapping["experiment"]), settings=settings)
        return {**completed, "data": to_mapping(experiment.data)}


def main(options: Options) -> int | None:
    """Reads the corpus and prints the report.

    Raises:
        UserError: for a corpus that is missing, or one without a usable document.
    """
    from cm3leon.data.survey import Seen, read
    from cm3leon.experiment import load_experiment

    experiment = None
    if options.experiment:
        data = to_mapping(options.data)
        experiment = load_experiment(options.experiment, sections={"data": data})
    source = SOURCES.build(options.data)
    seen = Seen(options.limit)
    finished = read(source, seen)
    print(f"source     {options.data.name}")
    print("\n".join([*seen.report(), *cost(seen, experiment)]))
    if not finished:
        print("stopped before the end: the figures are of what was read until then")
        return 130
    if not seen.documents:
        raise UserError(f"data: no usable documents in the corpus ({seen.skipped} items left out)")
    return None


def _settings(data: Any) -> dict[str, Any]:
    """The section as dotted keys: another name replaces an experiment's section, other keys are added."""
    section = {"name": data} if isinstance(data, str) else dict(data or {})
    name = {"data": section.pop("name")} if "name" in section else {}
    return {**name, **{f"data.{key}": value for key, value in section.items()}}


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
        from cm3leon.tokenizers.vocab import Vocab
        from cm3leon.training.device import best_device

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
    from cm3leon.data.formats import in_bytes

    each = Cost.of(experiment) if experiment else Cost()
    tokens = seen.images * each.codes + seen.text_bytes / BYTES_A_TEXT_TOKEN
    vectors = 2 * each.width * 2 * seen.documents
    lines = [
        f"tokens     about {tokens:,.0f} by {each.whose} tokenizers: {each.codes:,} an image, one for "
        f"{BYTES_A_TEXT_TOKEN:g} bytes of text",
        f"disk       tokens {in_bytes(each.token_bytes * tokens)} ({each.token_bytes} bytes each), vectors "
        f"{in_bytes(vectors)} (text and image, {each.width} x 2 bytes each)",
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


def _images_per_second(tokenizer: ImageTokenizer) -> float:
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
    from cm3leon.training.device import best_device

    return "GPU" if best_device().type == "cuda" else "CPU"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:,.1f} hours"
