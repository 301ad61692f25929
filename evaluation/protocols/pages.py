"""Pages of several texts and images: their images by what stands before them,
the texts behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np

from cm3leon.config import Component, PositiveInt, Probability
from cm3leon.data.corpus import split_of_key
from cm3leon.data.source import Skipped, Source
from cm3leon.evaluation.captions import caption_figures
from cm3leon.evaluation.images import WINDOW, ssim
from cm3leon.evaluation.metrics import Measured, average
from cm3leon.evaluation.protocols.base import Answer, Item, Protocol, check_missing, clip_score
from cm3leon.registry import PROTOCOLS, SOURCES
from cm3leon.types import Document, ImageSegment, Modality, TextSegment, UserError


@PROTOCOLS.register("pages")
class Pages(Protocol):
    """Images of interleaved documents by what stands before them, or the texts behind them.

    An item is a page as far as the segment that is asked for: an image behind other segments, or a
    text that stands directly behind an image. Of a corpus that was trained on, the pages are those
    of its held-out split.
    """

    @dataclass(kw_only=True)
    class Config:
        """Which pages, and what is asked of them."""

        data: Annotated[Component, SOURCES]
        """The corpus of pages."""
        asks: Modality
        """image: images by what stands before them. text: the texts behind them."""
        number: PositiveInt | None = None
        """Which image of each page it is about, counted from 1;
        null = each that something can be asked about."""
        count: PositiveInt | None = None
        """Items, the first ones; null = all."""
        split: Literal["train", "validation", "held_out", "all"] = "held_out"
        """Which pages; all for a corpus that nothing was trained on."""
        validation: Probability = 0.1
        """The share split.validation of the run that was trained on the corpus."""
        held_out: Probability = 0.2
        """The share split.held_out of that run."""
        missing: Probability = 0.01
        """Share of the pages that may be unusable, such as those with a missing image."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.answers_in = config.asks

    def items(self) -> list[Item]:
        return self._items()

    def items_squared(self, size: int) -> list[Item]:
        return self._items(size)

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Measured]:
        if self.answers_in == "text":
            return caption_figures([answer.text for answer in answers], [[i.truth] for i in items])
        similar = [
            ssim(item.document.images[-1][None], answer.image_HWC[None])[0]
            for item, answer in zip(items, answers, strict=True)
            if answer.image_HWC is not None and min(answer.image_HWC.shape[:2]) >= WINDOW
        ]
        figures = {"SSIM": average(np.array(similar))} if similar else {}
        return {**figures, **clip_score(answers)}

    def fingerprint(self) -> str:
        return self._source().fingerprint()

    # ---------------------------------------------------------------------------------------- parts

    def _source(self) -> Source:
        source: Source = SOURCES.build(self.config.data)
        return source

    def _items(self, size: int | None = None) -> list[Item]:
        config = self.config
        items: list[Item] = []
        skipped = pages = 0
        for found in self._source().documents(size=size):
            if isinstance(found, Skipped):
                skipped += 1
                continue
            pages += 1
            if self._is_asked(found):
                items += self._of_page(found)
            if config.count and len(items) >= config.count:
                break
        check_missing(skipped, pages, config.missing)
        if not items:
            wanted = "an image behind another segment"
            if config.asks == "text":
                wanted = "a text behind an image"
            raise UserError(
                f"protocol.data: none of {pages} pages is of the split {config.split} and has "
                f"{wanted}"
            )
        return items[: config.count]

    def _is_asked(self, page: Document) -> bool:
        config = self.config
        return config.split in (
            "all",
            split_of_key(page.split_key, validation=config.validation, held_out=config.held_out),
        )

    def _of_page(self, page: Document) -> Iterator[Item]:
        images = [
            index
            for index, segment in enumerate(page.segments)
            if isinstance(segment, ImageSegment)
        ]
        for number, index in enumerate(images, 1):
            if self.config.number not in (None, number):
                continue
            until = index + 1
            if self.config.asks == "image":
                if index:
                    begun = replace(page, segments=page.segments[:until])
                    yield Item(f"{page.id}#{number}", "page_image", begun)
            elif until < len(page.segments):
                text = page.segments[until]
                if isinstance(text, TextSegment):
                    # Its role keeps the true text out of what a report shows as asked.
                    answer = replace(text, role="answer")
                    document = replace(page, segments=(*page.segments[:until], answer))
                    yield Item(f"{page.id}#{number}", "page_text", document, text.text)
