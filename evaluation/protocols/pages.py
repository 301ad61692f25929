"""Pages of several texts and images: images given what stands before them, or the texts behind
them."""

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
    """Images of interleaved documents given what stands before them, or the texts behind them.

    An item is a page up to the segment that is asked for: an image behind other segments, or a text
    directly behind an image. Of a corpus that a run was trained on, only the held-out pages are
    asked.
    """

    @dataclass(kw_only=True)
    class Config:
        """Which pages, and what is asked of them."""

        data: Annotated[Component, SOURCES]
        """The corpus of pages."""
        asks: Modality
        """image: images given what stands before them. text: the texts behind them."""
        number: PositiveInt | None = None
        """Number of the image on each page, from 1; null:
        each image that something can be asked about."""
        count: PositiveInt | None = None
        """Number of items, the first ones; null: all."""
        split: Literal["train", "validation", "held_out", "all"] = "held_out"
        """The split of the pages; all for a corpus that no run was trained on. Pages that a run was
        trained on are in its memory bank, so retrieved documents may show what is asked for."""
        validation: Probability = 0.1
        """split.validation of the run that was trained on the corpus."""
        held_out: Probability = 0.2
        """split.held_out of that run."""
        missing: Probability = 0.01
        """Share of the pages that may be unusable, for example because an image is missing."""

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

        # Images smaller than the window of SSIM have none.
        similar = []
        for item, answer in zip(items, answers, strict=True):
            image_HWC = answer.image_HWC
            if image_HWC is not None and min(image_HWC.shape[:2]) >= WINDOW:
                similar.append(ssim(item.document.images[-1][None], image_HWC[None])[0])

        figures: dict[str, Measured] = {}
        if similar:
            figures["SSIM"] = average(np.array(similar))
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

        # The last page that was read may have given more items than were still missing.
        return items[: config.count]

    def _is_asked(self, page: Document) -> bool:
        """Whether a page is of the split that is asked."""
        config = self.config
        return config.split in (
            "all",
            split_of_key(page.split_key, validation=config.validation, held_out=config.held_out),
        )

    def _of_page(self, page: Document) -> Iterator[Item]:
        """The items of a page."""
        number = 0
        for index, segment in enumerate(page.segments):
            if not isinstance(segment, ImageSegment):
                continue
            number += 1
            if self.config.number not in (None, number):
                continue

            until = index + 1
            if self.config.asks == "image":
                # The first segment has nothing before it that an image could follow from.
                if index:
                    begun = replace(page, segments=page.segments[:until])
                    yield Item(f"{page.id}#{number}", "page_image", begun)
            elif until < len(page.segments):
                text = page.segments[until]
                if isinstance(text, TextSegment):
                    # The role keeps the true text out of what a report shows as the prompt.
                    answer = replace(text, role="answer")
                    document = replace(page, segments=(*page.segments[:until], answer))
                    yield Item(f"{page.id}#{number}", "page_text", document, text.text)
