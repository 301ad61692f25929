"""Infilling: generate a part of an image, or of its text, anew.

The parts to be generated become spans with a sentinel each, as in training. For the word "red" and
a box around I5 and I6 of an image of 3 x 3 codes,

    document   <eos> a red dog <break> I1 I2 I3 I4 I5 I6 I7 I8 I9 <eos>
    prompt     <eos> a <mask:0> dog <break> I1 I2 I3 I4 <mask:1> I7 I8 I9 <eos> <mask:0>

and the model goes on with a new word, `<mask:1>`, and two new codes. All other pieces and codes
stay as they are.
"""

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
    """A finished run that generates parts of images and texts."""

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
        """Generate a part of an image, or of its text, anew; all other codes and pieces stay.

        It is `infills`, which explains the arguments, for a single result.
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
        """Generate a part of an image, or of its text, anew, n times, in the order of their seeds.

        A box or a mask asks for the codes that it touches. Each run of them in reading order
        becomes a span with a sentinel of its own. Most samples in training have one span or two, so
        the more spans, the further the prompt is from the training.

        Guidance and CD-K compare with a stream that has a mask for the text if codes are asked for,
        and for the image if words are. If both are, there is nothing to compare with.

        Args:
            image: the image, of which the tokenizer sees the central square.
            text: its text.
            n: number of results.
            box: (left, top, right, bottom) in pixels of the given image, turned upright by its EXIF
                block, and inside the central square.
            mask: instead of a box: booleans (H, W), one for each pixel, True where it changes.
            words: characters [start, end) of the text, whose pieces change.
            decoder: how tokens are drawn; None = as the run is set.
            seed: of the first result; the others count on from it.
            max_tokens: largest number of pieces of the new text; a warning tells if it was cut
                there.
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

        # Three parts of the text are tokenized, so the words to change have pieces of their own.
        spans: list[AskedSpan] = []
        if words is not None:
            start, end = words
            if not 0 <= start < end <= len(text):
                raise UserError(
                    f"words is {words}; it must be (start, end), a part of the text of "
                    f"{len(text)} characters"
                )
            before, asked, after = text[:start], text[start:end], text[end:]
            pieces = [self._text(part).ids_T for part in (before, asked, after)]
            text_ids_T = np.concatenate(pieces)
            spans.append(AskedSpan(0, len(pieces[0]), len(pieces[0]) + len(pieces[1])))
        else:
            text_ids_T = self._text(text).ids_T
        spans += self._spans_of_image(image, box, mask)

        # Ask for all spans of the document in one request.
        text_segment = TokenSegment("text", text_ids_T)
        document = TokenDocument("infill", (text_segment, self._image(self._pixels(image))))
        request = self._filling(document, spans, decoder, seeds, max_tokens)
        (drawn,) = self._answers([request])

        # Texts as long as allowed were cut.
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
        """List the spans of codes that a box or a mask asks for."""
        layout = self.run.vocab.layout
        if box is None and mask_HW is None:
            return []
        height, width = read_given_image(image, "image").shape[:2]
        grid = self.run.grid_for(height, width)
        if box is not None and mask_HW is not None:
            raise UserError("box and mask are both given; give one of them")
        if box is not None:
            return box_spans(box, segment=1, grid=grid, width=width, height=height, layout=layout)
        assert mask_HW is not None
        if mask_HW.dtype != np.bool_ or mask_HW.shape != (height, width):
            raise UserError(
                f"mask is {mask_HW.dtype} of shape {mask_HW.shape}; it must be bool of shape "
                f"{(height, width)}, that of the image"
            )
        spans = code_spans(mask_codes(mask_HW, grid), segment=1, layout=layout)
        if not spans:
            raise UserError(
                "mask has no pixel in the central square of the image, which is all that the model "
                "sees; mark a part of it"
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
        """Build the request for the spans of a document."""
        vocab = self.run.vocab
        both = [
            prompt_of(document, spans, (), vocab)
            for prompt_of in (spans_prompt, unconditional_spans_prompt)
        ]
        streams = tuple(ids_T for ids_T in both if ids_T is not None)

        # The grammar of the answer: a text of free length, or as many codes as the span has.
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
