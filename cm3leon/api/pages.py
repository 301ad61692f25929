"""Continue pages of texts and images from Python."""

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
    """A finished run that continues pages of texts and images."""

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
        """Generate n images that follow the texts and images of a page, the best by CLIP first.

        For an image in the middle of a page, give the parts before it. Guidance compares with a
        stream that has a mask for each text. Scores are cosines with all texts together. A page
        that is too long for the model loses its retrieved documents, then segments from its
        beginning.

        Args:
            parts: texts and images; the path of an image is a `Path`, because a string is a text.
            n: number of images.
            retrieve: number of documents to put before the page, found by its texts.
            decoder: how codes are drawn; None = as the run is set.
            seed: of the first image; the others count on from it.

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
        """Generate the text that follows a page whose last part is an image.

        Guidance compares with a stream that has a mask for each image. A page that is too long for
        the model loses its retrieved documents, then segments from its beginning.

        Args:
            parts: texts and images, the last one an image.
            retrieve: number of documents to put before the page, found by that image.
            decoder: how pieces are drawn; None = as the run is set.
            seed: of the text.
            max_tokens: largest number of pieces; a warning tells if the text was cut there.
        """
        if not parts or isinstance(parts[-1], str):
            raise UserError(
                "parts must end in an image, after which the text is written; add one, or leave "
                "out the texts behind the last image"
            )

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
        """Continue a page by texts and images in turn.

        Args:
            parts: texts and images; the path of an image is a `Path`, because a string is a text.
            first: modality of the first new segment.
            segments: largest number of new segments.
            max_tokens: largest number of pieces of each text, fewer if the model lacks positions;
                a warning tells if a text was cut there.
            decoder: how codes are drawn; None = as the run is set.
            text_decoder: how pieces are drawn; None = as the run is set.
            seed: of the continuation.
        """
        layout = self.run.vocab.layout
        asked = self._fresh if first == "image" else self._text("")
        ids_T = prompt_until(Sample(self._page(parts, asked)), self.run.vocab)

        # Images take what they need, and the texts share the positions that are left.
        images = (segments + (first == "image")) // 2
        texts = segments - images
        of_images = images * (
            layout.image_length(self.run.grid) + layout.around_image(self.run.grid)
        )
        between = segments * max(1, len(layout.between_segments))  # the end included
        room = self.run.seq_len - len(ids_T) - of_images - between
        if texts:
            max_tokens = min(max_tokens, room // texts)

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

        # Decode the segments in their order.
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
