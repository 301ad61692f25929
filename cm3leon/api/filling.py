"""Infilling: a part of an image, or of its text, made anew."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from PIL import Image

from cm3leon.api.answers import Filled
from cm3leon.api.asked import AskedRun
from cm3leon.api.given import DecoderChoice, GivenImage, Samples
from cm3leon.arguments import Text, checked
from cm3leon.config import NonNegativeInt, PositiveInt
from cm3leon.data.images import read_given_image
from cm3leon.decoders import grammar
from cm3leon.decoders.base import Decoder
from cm3leon.decoders.request import Request
from cm3leon.tasks.prompts import (
    AskedSpan,
    box_spans,
    code_spans,
    fill,
    mask_codes,
    spans_prompt,
    unconditional_spans_prompt,
)
from cm3leon.types import Modality, TokenDocument, TokenSegment, UserError

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of an image."""


class AskedFilling(AskedRun):
    """A finished run, asked for parts of images and texts."""

    @checked
    def infill(
        self,
        image: GivenImage,
        text: Text,
        *,
        box: Box | None = None,
        mask: np.ndarray | None = None,
        words: tuple[int, int] | None = None,
        decoder: DecoderChoice = None,
        seed: NonNegativeInt = 0,
        max_tokens: PositiveInt = 64,
    ) -> Filled:
        """An image and its text with a part of either made anew: what is not asked for keeps its codes and pieces.

        As `infills`, which says more, for a single one.
        """
        asked = (box, mask, words)
        (filled,) = self._infills(image, text, asked, decoder, range(seed, seed + 1), max_tokens)
        return filled

    @checked
    def infills(
        self,
        image: GivenImage,
        text: Text,
        *,
        n: Samples = 1,
        box: Box | None = None,
        mask: np.ndarray | None = None,
        words: tuple[int, int] | None = None,
        decoder: DecoderChoice = None,
        seed: NonNegativeInt = 0,
        max_tokens: PositiveInt = 64,
    ) -> list[Filled]:
        """An image and its text with a part of either made anew, n times, in the order of their seeds.

        A box, or a mask, asks for the codes that it touches: each run of them in reading order becomes a span with a
        sentinel of its own. The more there are, the further it is from what the model was trained on, one span or two
        in most samples.

        Guidance and CD-K compare with a stream that has a mask for the text where codes are asked for,
        and for the image where words are; where both are, there is nothing to compare with.

        Args:
            box: (left, top, right, bottom) in pixels of the given image, upright as its EXIF block says; inside its
                central square, which is what the tokenizer sees.
            mask: in the place of a box: booleans (H, W), as many as the image has pixels, True where it is made anew.
            words: characters [start, end) of the text, whose pieces are asked for.
            seed: of the first sample; the others count on from it.
            max_tokens: pieces that the new text may have; a warning says where it was cut there.
        """
        asked = (box, mask, words)
        return self._infills(image, text, asked, decoder, range(seed, seed + n), max_tokens)

    def _infills(
        self,
        image: GivenImage,
        text: str,
        asked_for: tuple[Box | None, np.ndarray | None, tuple[int, int] | None],
        decoder: DecoderChoice,
        seeds: range,
        max_tokens: int,
    ) -> list[Filled]:
        box, mask, words = asked_for
        if box is None and mask is None and words is None:
            raise UserError("box, mask and words are missing; give what is to be made anew")
        spans: list[AskedSpan] = []
        if words is not None:
            start, end = words
            if not 0 <= start < end <= len(text):
                raise UserError(
                    f"words is {words}; it must be (start, end), a part of the text of {len(text)} characters"
                )
            before, asked, after = text[:start], text[start:end], text[end:]
            pieces = [self._text(part).ids_T for part in (before, asked, after)]
            text_ids_T = np.concatenate(pieces)
            spans.append(AskedSpan(0, len(pieces[0]), len(pieces[0]) + len(pieces[1])))
        else:
            text_ids_T = self._text(text).ids_T
        spans += self._spans_of_image(image, box, mask)

        text_segment = TokenSegment("text", text_ids_T)
        document = TokenDocument("infill", (text_segment, self._image(self._pixels(image))))
        request = self._filling(document, spans, decoder, seeds, max_tokens)
        (drawn,) = self._answers([request])
        cut: list[list[int]] = []
        for tokens in drawn:
            segments = grammar.segments_of(tokens, self.run.vocab)
            cut += [ids for kind, ids in segments if kind == "text" and len(ids) == max_tokens]
        self._warn_truncated(cut, max_tokens, stacklevel=5)
        return [self._filled(fill(document, spans, tokens, self.run.vocab)) for tokens in drawn]

    def _spans_of_image(
        self,
        image: GivenImage,
        box: Box | None,
        mask_HW: np.ndarray | None,
    ) -> list[AskedSpan]:
        """The codes of the image that are asked for."""
        layout = self.run.vocab.layout
        if box is None and mask_HW is None:
            return []
        height, width = read_given_image(image, "image").shape[:2]
        grid = self.run.grid_for(height, width)
        if box is not None and mask_HW is not None:
            raise UserError("box and mask are both given; one of them says what is made anew")
        if box is not None:
            return box_spans(box, segment=1, grid=grid, width=width, height=height, layout=layout)
        assert mask_HW is not None
        if mask_HW.dtype != np.bool_ or mask_HW.shape != (height, width):
            raise UserError(
                f"mask is {mask_HW.dtype} of shape {mask_HW.shape}; it must be bool of shape {(height, width)}, "
                "that of the image"
            )
        spans = code_spans(mask_codes(mask_HW, grid), segment=1, layout=layout)
        if not spans:
            raise UserError(
                "mask has no pixel in the central square of the image, which is what the model sees"
            )
        return spans

    def _filling(
        self,
        document: TokenDocument,
        spans: list[AskedSpan],
        decoder: DecoderChoice,
        seeds: range,
        max_tokens: int,
    ) -> Request:
        """What is asked for those spans of a document."""
        vocab = self.run.vocab
        both = [
            prompt_of(document, spans, (), vocab)
            for prompt_of in (spans_prompt, unconditional_spans_prompt)
        ]
        streams = tuple(ids_T for ids_T in both if ids_T is not None)
        gaps = []
        for span in spans:
            if span.segment == 0:
                gaps.append(grammar.Gap("text", max_tokens))
                continue
            _, columns = vocab.layout.grid_of(document.segments[1].ids_T)
            closed = vocab.layout.row_ends(columns, span.start, span.end)
            gaps.append(grammar.Gap("image", span.end - span.start, closed))
        of: list[Mapping[Modality, Decoder]] = [
            {
                "image": self._decoder(decoder, "image").of(number),
                "text": self._decoder(decoder, "text").of(number),
            }
            for number in range(len(seeds))
        ]
        length = sum(gap.length + 2 for gap in gaps)
        return Request(streams, partial(grammar.infilling, vocab, gaps), length, of, seeds)

    def _filled(self, completed: TokenDocument) -> Filled:
        pixels_HWC = self._decoded(completed.segments[1])
        codes_N = self.run.tokenizer.codes(completed)
        return Filled(Image.fromarray(pixels_HWC), self.run.tokenizer.caption(completed), codes_N)
