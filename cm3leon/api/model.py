"""Ask a finished run in texts and images, from Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from cm3leon.api.answers import (
    FoundDocument,
    GeneratedImage,
    Images,
    ShortageWarning,
    UnrankedWarning,
    found_of,
    shortage_of,
    shortened,
)
from cm3leon.api.filling import AskedFilling
from cm3leon.api.given import DecoderChoice, GivenImage, Samples
from cm3leon.api.pages import AskedPages
from cm3leon.arguments import Text, Worded, checked
from cm3leon.config import Guidance, NonNegativeInt, PositiveInt, to_mapping
from cm3leon.decoders.generate import Answers
from cm3leon.decoders.score import log_likelihoods
from cm3leon.registry import TASKS
from cm3leon.stages.opening import TUNED
from cm3leon.stages.own import with_own_documents
from cm3leon.stages.prompts import fitting_prompt, found_rows, text_scores
from cm3leon.tasks.base import Task
from cm3leon.types import (
    Notice,
    TokenDocument,
    UserError,
)

QUESTIONS = ("vqa", "reasoning")
"""Tasks of instructions that ask a question about an image."""


class CM3Leon(AskedPages, AskedFilling):
    """A finished run that generates images and texts, and scores them. `load` opens one.

    Every answer depends on its seed only. Mistakes of the caller raise UserErrors.
    """

    @checked
    def generate(
        self,
        prompt: Worded | Sequence[Worded],
        *,
        n: Samples = 1,
        retrieve: NonNegativeInt = 0,
        documents: Sequence[NonNegativeInt] | None = None,
        decoder: DecoderChoice = None,
        seed: NonNegativeInt = 0,
        size: tuple[int, int] | None = None,
    ) -> list[Any]:
        """Generate n images for a text, the best by CLIP first; for several texts, a list for each.

        If the run's retriever has no CLIP, images are in the order of their seeds and have NaN as
        scores.

        Args:
            prompt: the text, or several.
            n: number of images for each text.
            retrieve: number of documents to put before the prompt, fewer if the model lacks room.
            documents: instead of `retrieve`, the documents as rows of the memory bank, such as
                `documents_for` finds, the closest last.
            decoder: how codes are drawn; None = as the run is set. `mixture` alternates between
                top-p and CD-K, as in the paper before re-ranking.
            seed: of the first image; the others count on from it.
            size: width and height in pixels, one for which the model has tokens; None = the run's
                square images.

        Returns:
            `GeneratedImage`s.

        Raises:
            UserError: before anything is drawn, for a prompt that is too long for the model, with
                its index in the list.
        """
        # Check all prompts before the first is drawn.
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        for number, reason in self.too_long(texts, size=size).items():
            where = "prompt" if isinstance(prompt, str) else f"prompt.{number}"
            raise UserError(f"{where} ({shortened(texts[number])}): {reason}")

        task = self._drawing(size)
        asked_for = [TokenDocument(text, (self._text(text), task.fresh_image)) for text in texts]
        found, asked_count = self._before(texts, retrieve, documents)
        requests, used = [], []
        for document, rows in zip(asked_for, found, strict=True):
            asked, kept = fitting_prompt(self.run, task, document, rows)
            used.append(kept)
            requests.append(self._request(asked, decoder, range(seed, seed + n)))
        if n > 1 and not self.has_clip:
            name = self.run.experiment.retriever.name
            sentence = (
                f"the retriever {name} of this run has no CLIP: "
                "images stand in the order of their seeds"
            )
            self._notify(UnrankedWarning(sentence), stacklevel=3)

        # Draw all prompts together, then decode and rank the images of each.
        results = []
        for text, document, rows, kept, drawn in zip(
            texts, asked_for, found, used, self._answers(requests), strict=True
        ):
            codes_BN = np.stack(
                [
                    self.run.tokenizer.codes(task.complete(document, np.array(tokens)))
                    for tokens in drawn
                ]
            )
            pictures = self._pictures(
                text, codes_BN, range(seed, seed + n), self.used_documents(kept), size
            )
            shortage = shortage_of(asked_count, len(rows), len(kept))
            results.append(
                [replace(picture, asked=asked_count, shortage=shortage) for picture in pictures]
            )
        return results[0] if isinstance(prompt, str) else results

    def _before(
        self, texts: Sequence[str], retrieve: int, documents: Sequence[int] | None
    ) -> tuple[list[list[int]], int]:
        """Return the rows of the bank to put before each text, and how many were asked for."""
        if documents is None:
            return self.retrieved(texts, None, "text", retrieve), retrieve
        if retrieve:
            raise UserError("retrieve and documents are both given; give one of them")
        if documents:
            self._check_bank("documents")
            size = len(self.run.bank)
            for row in documents:
                if row >= size:
                    raise UserError(f"documents has {row}; the bank has rows from 0 to {size - 1}")
        return [list(documents) for _ in texts], len(documents)

    @checked
    def documents_for(self, prompt: Worded, count: NonNegativeInt) -> list[FoundDocument]:
        """Return the documents that `generate` puts before a prompt for `retrieve=count`.

        The closest comes last. Scores are inner products with the prompt.
        """
        (rows,) = self.retrieved([prompt], None, "text", count)
        scores = text_scores(self.run, prompt, rows)
        return self._found(zip(rows, scores, strict=True))

    @checked
    def __call__(
        self,
        prompt: Worded | Sequence[Worded],
        *,
        num_images_per_prompt: Samples = 1,
        guidance_scale: Guidance | None = None,
        generator: torch.Generator | None = None,
        seed: NonNegativeInt = 0,
        retrieve: NonNegativeInt = 0,
    ) -> Images:
        """Generate images by the arguments of diffusers' pipelines: `model("a dog").images[0]`.

        It calls `generate` and returns the images only. As there, the same call gives the same
        images, unless a generator or another seed is given.

        Args:
            prompt: a text, or several.
            num_images_per_prompt: number of images for each text.
            guidance_scale: weight of guidance (`cfg`) of the run's decoder; None = as the run is
                set.
            generator: the seed is drawn from it, so the next call with it gives other images.
            seed: of the first image of each prompt, if no generator is given.
            retrieve: number of documents to put before each prompt.

        Raises:
            UserError: for a decoder without guidance, and for a prompt that is too long.
        """
        decoder = None
        if guidance_scale is not None:
            own = to_mapping(self.run.experiment.decoder)
            if "cfg" not in own:
                raise UserError(
                    f"guidance_scale is given, but the decoder {own['name']} of this run has no "
                    "weight of guidance (cfg); leave it out"
                )
            decoder = {**own, "cfg": guidance_scale}

        if generator is not None:
            seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        drawn = self.generate(
            prompts, n=num_images_per_prompt, retrieve=retrieve, decoder=decoder, seed=seed
        )
        return Images([picture.image for of_prompt in drawn for picture in of_prompt])

    @checked
    def too_long(
        self, texts: Sequence[Text], *, size: tuple[int, int] | None = None
    ) -> dict[int, str]:
        """Find the texts that are too long to be drawn: index in `texts` -> reason."""
        task, reasons = self._drawing(size), {}
        for number, text in enumerate(texts):
            prompt = task.prompt(TokenDocument(text, (self._text(text), task.fresh_image)))
            if len(prompt.ids_T) + prompt.length > self.run.seq_len:
                reasons[number] = (
                    f"a prompt of {len(prompt.ids_T)} tokens and an image of {prompt.length} do "
                    f"not fit the model's {self.run.seq_len} positions"
                )
        return reasons

    def _drawing(self, size: tuple[int, int] | None) -> Task:
        """Build the task of drawing images of a size."""
        arguments = {**self._task_arguments(), "grid": self._grid_of(size)}
        return TASKS.build("text_to_image", **arguments)

    @checked
    def caption(
        self,
        image: GivenImage,
        *,
        retrieve: NonNegativeInt = 0,
        decoder: DecoderChoice = None,
        seed: NonNegativeInt = 0,
        max_tokens: PositiveInt = 64,
        question: Worded | None = None,
    ) -> str:
        """Generate a text for an image.

        Args:
            image: the image.
            retrieve: number of documents to put before the image, fewer if the model lacks room.
            decoder: how pieces are drawn; None = as the run is set.
            seed: of the text.
            max_tokens: largest number of pieces; a warning tells if the text was cut there.
            question: for public chat weights, which answer in turns, e.g. "What do you see in this
                image?"; None = the form of captions that is trained here.

        Raises:
            UserError: for a question to a model that has no turns.
        """
        if question is not None and not self.run.vocab.layout.turn:
            raise UserError(
                "question: this run has no token that ends a turn, as imported chat weights have; "
                "leave it out"
            )

        name = "caption" if question is None else "chat"
        task = TASKS.build({"name": name, "max_tokens": max_tokens}, **self._task_arguments())
        shown = self._image(self._pixels(image))
        document = TokenDocument("image", (self._text(question or ""), shown))
        (rows,) = self.retrieved(None, self._square(image), "image", retrieve)
        prompt, kept = fitting_prompt(self.run, task, document, rows)
        if shortage := shortage_of(retrieve, len(rows), len(kept)):
            notice = ShortageWarning(found_of(len(kept), retrieve, shortage))
            self._notify(notice, stacklevel=3)
        return self.run.text_tokenizer.decode(self._text_answer(prompt, decoder, seed))

    @checked
    def edit(
        self,
        image: GivenImage,
        instruction: Worded,
        *,
        n: Samples = 1,
        decoder: DecoderChoice = "edit",
        seed: NonNegativeInt = 0,
    ) -> list[GeneratedImage]:
        """Change an image as an instruction says, n times, the best by CLIP first (section 4.2).

        The decoder `edit` has one weight for the image and one for the instruction.

        Raises:
            UserError: for a model that was not fine-tuned on instructions.
        """
        self._check_tuned("edit", ("edit",))
        document = self._instruction(
            "edit", image1=self._pixels(image), instruction=instruction, image2=None
        )

        seeds = range(seed, seed + n)
        (drawn,) = self._answers(
            [self._request(self._task("instruction").prompt(document), decoder, seeds)]
        )
        codes_BN = np.stack([self.run.vocab.image_codes(np.array(tokens)) for tokens in drawn])
        return self._pictures(instruction, codes_BN, seeds, ())

    @checked
    def answer(
        self,
        image: GivenImage,
        question: Worded,
        *,
        decoder: DecoderChoice = None,
        seed: NonNegativeInt = 0,
        max_tokens: PositiveInt = 64,
    ) -> str:
        """Answer a question about an image, in at most `max_tokens` pieces.

        A warning tells if the answer was cut there. Public chat weights are asked in turns, other
        models in the form of their instructions.

        Raises:
            UserError: for a model that was not fine-tuned on instructions, here or by its
                publisher.
        """
        if self.run.vocab.layout.turn and self.run.experiment.objective.name != TUNED:
            return self.caption(
                image, question=question, decoder=decoder, seed=seed, max_tokens=max_tokens
            ).strip()

        self._check_tuned("answer", QUESTIONS)
        document = self._instruction(
            "vqa", image=self._pixels(image), question=question, answer="?"
        )
        task = TASKS.build(
            {"name": "instruction", "max_tokens": max_tokens}, **self._task_arguments()
        )
        prompt = task.prompt(document)
        answer_T = self._text_answer(prompt, decoder, seed)
        return self.run.text_tokenizer.decode(answer_T).strip()

    @checked
    def search(
        self,
        text: Worded | None = None,
        image: GivenImage | None = None,
        *,
        count: PositiveInt = 5,
    ) -> list[FoundDocument]:
        """Find the documents of the memory bank closest to a text, an image, or the mean of both.

        The best comes first.

        Raises:
            UserError: if neither is given, or for a run without a memory bank.
        """
        if text is None and image is None:
            raise UserError("text and image are both missing; give at least one to search by")
        self._check_bank("search")
        pixels_HWC = None if image is None else self._pixels(image)
        found = found_rows(self.run, text, pixels_HWC, min(count, len(self.run.bank)))
        return self._found(found)

    @checked
    def with_documents(self, path: str | Path) -> Self:
        """Return the same model with more documents in its memory bank; no file changes.

        Args:
            path: files that a source reads, such as a .jsonl file with an `image` and a `text` on
                each line (docs/data.md).

        Raises:
            UserError: for a run without a memory bank, or documents that cannot be used.
        """
        self._check_bank("own")
        if not isinstance(path, str | Path) or not str(path).strip():
            raise UserError(
                f"path is {path!r}; it must be the path of files that a source reads, "
                "for example own.jsonl"
            )
        other = copy(self)
        other.run = with_own_documents(self.run, Path(path))
        return other

    def _found(self, found: Iterable[tuple[int, float]]) -> list[FoundDocument]:
        """Turn rows of the bank and their scores into documents."""
        result = []
        for row, score in found:
            (each,) = self.used_documents([row])
            result.append(FoundDocument(each.id, each.text, each.image, row, score))
        return result

    @checked
    def score(
        self,
        *,
        texts: Sequence[Text] | None = None,
        images: Sequence[GivenImage] | None = None,
        image: GivenImage | None = None,
        text: Text | None = None,
        question: Worded | None = None,
    ) -> list[float]:
        """Compute log-likelihoods in nats: of `texts` for an `image`, or of `images` for a `text`.

        The texts are answers if there is a `question` about the image, captions otherwise. The
        `<end_of_span>` that follows a text is included. Nothing is divided by lengths.
        """
        vocab = self.run.vocab
        of_an_image = texts is not None and image is not None and images is None and text is None

        # Answers to a question.
        if question is not None:
            if texts is None or image is None or not of_an_image:
                raise UserError(
                    "a question is asked about an image: give image, and texts that may answer it"
                )
            self._check_tuned("a question", QUESTIONS)
            document = self._instruction(
                "vqa", image=self._pixels(image), question=question, answer="?"
            )
            encode = self.run.text_tokenizer.encode
            answers = [encode(f" {each}") for each in texts]  # they follow "Answer:"
            (found_K,) = self.rank([document], [[]], [answers])
            return [float(score) for score in found_K]

        # Captions of an image, or images of a text.
        if texts is not None and image is not None and of_an_image:
            document = TokenDocument("image", (self._text(""), self._image(self._pixels(image))))
            ids_T = self._task("caption").prompt(document).ids_T
            given = [np.append(self._text(each).ids_T, vocab.end_of_span) for each in texts]
        elif images is not None and text is not None and texts is None and image is None:
            given, asked = [], []
            for each in images:
                image_segment = self._image(self._pixels(each))
                task = TASKS.build(
                    "text_to_image", vocab=vocab, grid=image_segment.grid or self.run.grid
                )
                asked.append(task.prompt(TokenDocument(text, (self._text(text), image_segment))))
                given.append(image_segment.ids_T)
            with self._computing():
                prompts = [prompt.ids_T for prompt in asked]
                return log_likelihoods(self.run.model, prompts, given)
        else:
            raise UserError(
                "give texts and the image that they are for, "
                "or images and the text that they are for"
            )
        with self._computing():
            return log_likelihoods(self.run.model, [ids_T] * len(given), given)


def asked_through(model: CM3Leon, answerer: Answers, notices: list[Notice]) -> CM3Leon:
    """Return the same model with another answerer, and a list that collects its warnings.

    Python's warnings belong to the whole process, so each thread that asks takes a copy.
    """
    _ = model._learned  # cached here, so that all copies share it
    other = copy(model)
    other._answerer, other._notices = answerer, notices
    return other
