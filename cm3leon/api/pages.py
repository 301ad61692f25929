"""Pages of texts and images, gone on with from Python."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from cm3leon.api.answers import GeneratedImage, ShortageWarning, found_of, shortage_of
from cm3leon.api.asked import AskedRun
from cm3leon.api.given import DecoderChoice, Parts, Samples
from cm3leon.arguments import checked
from cm3leon.config import NonNegativeInt, PositiveInt
from cm3leon.decoders import grammar
from cm3leon.decoders.request import Request
from cm3leon.stages.prompts import fitting_prompt
from cm3leon.tokenizers.document import prompt_until
from cm3leon.types import Modality, Sample, TokenSegment, UserError


class AskedPages(AskedRun):
    """A finished run, asked for what follows the texts and images of a page."""

    @checked
    def page_image(
        self,
        parts: Parts,
        *,
        n: Samples = 1,
        retrieve: NonNegativeInt = 0,
        decoder: DecoderChoice = None,
        seed: NonNegativeInt = 0,
    ) -> list[GeneratedImage]:
        """The image that follows the texts and images of a page, n times, the best by CLIP first.

        The n-th image of a page is asked for by the parts before it. Guidance compares with a stream
        that has a mask for each text. Scores are cosines with all the texts. A page that is too long
        for the model loses its documents, then segments from its beginning.

        Args:
            parts: texts, and images in any form but a path as a text, which would be a text.
            retrieve: documents to put before the page, found by its texts.

        Raises:
            UserError: for a page that leaves the model no room for an image.
        """
        page = self._page(parts, self._fresh)
        text = " ".join(part for part in parts if isinstance(part, str))
        (rows,) = self.retrieved([text], None, "text", retrieve)
        prompt, kept = fitting_prompt(self.run, self._task("page_image"), page, rows)
        seeds = range(seed, seed + n)
        (drawn,) = self._answers([self._request(prompt, decoder, seeds)])
        codes_BN = np.stack([self.run.vocab.image_codes(np.array(tokens)) for tokens in drawn])
        shortage = shortage_of(retrieve, len(rows), len(kept))
        return [
            replace(picture, asked=retrieve, shortage=shortage)
            for picture in self._pictures(text, codes_BN, seeds, self.used_documents(kept))
        ]

    @checked
    def page_text(
        self,
        parts: Parts,
        *,
        retrieve: NonNegativeInt = 0,
        decoder: DecoderChoice = None,
        seed: NonNegativeInt = 0,
        max_tokens: PositiveInt = 64,
    ) -> str:
        """The text behind the image that a page ends in, of at most so many pieces.

        A warning says where it was cut there.

        Guidance compares with a stream that has a mask for each image. A page that is too long for the
        model loses its documents, then segments from its beginning.

        Args:
            parts: texts and images, the last one an image.
            retrieve: documents to put before the page, found by that image.
        """
        if not parts or isinstance(parts[-1], str):
            raise UserError("parts does not end in an image, behind which a text is asked for")
        page = self._page(parts)
        (rows,) = self.retrieved(None, self._square(parts[-1]), "image", retrieve)
        prompt, kept = fitting_prompt(
            self.run, self._task_with_room("page_text", max_tokens), page, rows
        )
        if shortage := shortage_of(retrieve, len(rows), len(kept)):
            notice = ShortageWarning(found_of(len(kept), retrieve, shortage))
            self._notify(notice, stacklevel=3)
        answer_T = self._text_answer(prompt, decoder, seed)
        return self.run.text_tokenizer.decode(answer_T).strip()

    @checked
    def interleave(
        self,
        parts: Parts,
        *,
        first: Modality = "text",
        segments: PositiveInt = 2,
        max_tokens: PositiveInt = 64,
        decoder: DecoderChoice = None,
        text_decoder: DecoderChoice = None,
        seed: NonNegativeInt = 0,
    ) -> list[str | Image.Image]:
        """What follows texts and images: at most so many more, in turn, the first of that modality.

        Args:
            parts: texts, and images in any form but a path as a text, which would be a text.
            max_tokens: pieces that each text may have, fewer where the model has not as many positions; a warning says
                where one was cut there.
        """
        layout = self.run.vocab.layout
        asked = self._fresh if first == "image" else self._text("")
        ids_T = prompt_until(Sample(self._page(parts, asked)), self.run.vocab)
        images = (segments + (first == "image")) // 2
        texts = segments - images
        of_images = images * (
            layout.image_length(self.run.grid) + layout.around_image(self.run.grid)
        )
        # What stands between the segments, and the end.
        between = segments * max(1, len(layout.between_segments))
        room = self.run.seq_len - len(ids_T) - of_images - between
        max_tokens = min(max_tokens, room // texts) if texts else max_tokens
        new = partial(
            grammar.interleaved,
            self.run.vocab,
            first=first,
            grid=self.run.grid,
            text_length=max_tokens,
            segments=segments,
        )
        of = self._of_each_modality(decoder, text_decoder)
        length = of_images + texts * max(max_tokens, 1) + between
        ((tokens,),) = self._answers([Request((ids_T,), new, length, [of], [seed])])
        result: list[str | Image.Image] = []
        found = list(grammar.segments_of(tokens, self.run.vocab))
        cut = [ids for modality, ids in found if modality == "text" and len(ids) == max_tokens]
        self._warn_truncated(cut, max_tokens)
        for modality, ids in found:
            if modality == "text":
                result.append(self.run.text_tokenizer.decode(ids))
            else:
                result.append(Image.fromarray(self._decoded(TokenSegment("image", np.array(ids)))))
        return result
