"""The 1,797 scans of handwritten digits in scikit-learn (Alpaydin & Kaynak 1998, 8x8 grey)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from cm3leon.config import Seed
from cm3leon.data.source import Skipped, Source
from cm3leon.io import digest_of_parts
from cm3leon.registry import SOURCES
from cm3leon.types import Document, ImageSegment, TextSegment, UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {word}",
    "the digit {number}",
    "a scan of the number {word}",
    "{word}, written by hand",
    "a pen-written {number}",
    "someone wrote the digit {word}",
)


@SOURCES.register("digits")
class DigitsSource(Source):
    """Real handwritten digits, each with a caption drawn from a few templates; nothing is
    downloaded."""

    @dataclass(kw_only=True)
    class Config:
        """How the scans are captioned."""

        templates: list[str] = field(default_factory=lambda: list(TEMPLATES))
        """Captions; {word} and {number} stand for the digit as a word and as a numeral."""
        caption_seed: Seed = 0
        """Seed for drawing each scan's template."""

        def check(self) -> None:
            for template in self.templates:
                if not re.fullmatch(r"[^{}]*\{(word|number)\}[^{}]*", template):
                    raise UserError(
                        f"templates holds {template!r}; each must have one {{word}} or one "
                        '{number}, as in "a handwritten {word}"'
                    )
            if not self.templates:
                raise UserError(
                    'templates is empty; give at least one, such as "a handwritten {word}"'
                )

    class_names = WORDS

    def __init__(self, config: Config) -> None:
        self.config = config

    def parts(self) -> list[str]:
        return ["scans"]

    def read(self, part: str, start: int = 0) -> Iterator[Document | Skipped]:
        from sklearn.datasets import load_digits

        scans = load_digits()
        grey_MHW = np.rint(scans.images * (255 / 16)).astype(np.uint8)
        draw = np.random.default_rng(self.config.caption_seed)

        # A template is drawn for the scans before `start` too, so each scan keeps its own.
        for number, (grey_HW, label) in enumerate(
            zip(grey_MHW, scans.target.tolist(), strict=True)
        ):
            template = self.config.templates[draw.integers(len(self.config.templates))]
            if number < start:
                continue

            caption = template.format(word=WORDS[label], number=label)
            pixels_HWC = np.repeat(grey_HW[..., None], 3, axis=2)
            yield Document(
                f"scan-{number:04d}", (TextSegment(caption), ImageSegment(pixels_HWC)), label
            )

    def fingerprint(self) -> str:
        from sklearn.datasets import load_digits

        scans = load_digits()
        held = [np.ascontiguousarray(array).tobytes() for array in (scans.images, scans.target)]
        return digest_of_parts(held)

    def class_in(self, text: str) -> int | None:
        found: set[int] = set()
        for word in _NAMES.findall(text.lower()):
            found.add(int(word) if word.isdigit() else WORDS.index(word))
        return found.pop() if len(found) == 1 else None


_NAMES = re.compile(rf"\b(?:{'|'.join(WORDS)}|[0-9])\b")
