"""A finished run, to be asked from Python.

from cm3leon import CM3Leon

m = CM3Leon.load("runs/digits")
best = m.generate("a handwritten seven", n=8, retrieve=2)[0]
best.image.save("seven.png")
m.caption(best.image)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image

from cm3leon.arguments import Text, Worded, any_text, checked
from cm3leon.config import Component, NonNegativeInt, PositiveInt, Range
from cm3leon.data.images import ImageInput, read_given_image, square
from cm3leon.data.instructions.templates import ROLES, TABLE_5
from cm3leon.data.instructions.templates import fill as fill_template
from cm3leon.decoders import grammar
from cm3leon.decoders.decoders import decoder_of
from cm3leon.decoders.generate import Answerer, is_truncated, request_for
from cm3leon.decoders.request import Request
from cm3leon.decoders.score import log_likelihoods
from cm3leon.models.pretrained import load_model
from cm3leon.models.serving import keep_weights, share
from cm3leon.records import MARKER
from cm3leon.registry import DECODERS, TASKS
from cm3leon.retrievers.strategy import NONE
from cm3leon.stages.artifacts import Run
from cm3leon.stages.opening import TUNED, open_run, tuned_on
from cm3leon.stages.pretrain import load_checkpoint
from cm3leon.stages.trust import Opening
from cm3leon.tasks.prompts import (
    AskedSpan,
    box_spans,
    fill,
    spans_prompt,
    unconditional_spans_prompt,
)
from cm3leon.tokenizers.document import lay_out
from cm3leon.training.device import autocast, device_named, uses_bf16
from cm3leon.training.distributed import Ranks
from cm3leon.types import (
    Execution,
    Modality,
    Notice,
    Precision,
    Sample,
    TextSegment,
    TokenDocument,
    TokenSegment,
    UserError,
    Weights,
)

DecoderChoice = Annotated[str | dict[str, Any] | Component, DECODERS] | None
"""A decoder by its name, by a section as in YAML, or None for the run's own."""
GivenImage = Annotated[ImageInput, read_given_image]
"""An image as a path, the bytes of a file, a Pillow image or an array (see `read_image`); methods get its pixels."""
Samples = Annotated[int, Range(ge=1, le=65_536)]

QUESTIONS = ("vqa", "reasoning")
"""Tasks of instructions that ask a question about an image."""
NO_ROOM = "the model has no room for more"
NO_MORE = "the retriever's rules leave no more of the memory bank"


def _part(value: Any, where: str) -> str | np.ndarray:
    """A text, or the pixels of an image, whose file is given as a Path."""
    return any_text(value, where) if isinstance(value, str) else read_given_image(value, where)


Parts = Sequence[Annotated[str | ImageInput, _part]]
"""The texts and images of a page, in order."""


class UnrankedWarning(Notice):
    """Samples are in the order of their seeds, as there is nothing to rank them by."""


class UntunedWarning(Notice):
    """What is asked for is a task that the model was not fine-tuned on."""


class ShortageWarning(Notice):
    """Fewer retrieved documents than asked stand in a prompt."""


class TruncatedWarning(Notice):
    """A text was stopped by its length before it ended."""


@dataclass(frozen=True, eq=False)
class Completed:
    """A document with the answer that was asked for."""

    document: TokenDocument
    truncated: bool
    """Whether the answer is a text that was stopped by its length before it ended."""


@dataclass(frozen=True, eq=False)
class UsedDocument:
    """A retrieved document that stood in a prompt."""

    id: str
    text: str
    image: Image.Image | None


@dataclass(frozen=True, eq=False)
class GeneratedImage:
    """A generated image."""

    image: Image.Image
    codes_N: np.ndarray
    score: float
    """Cosine of prompt and image by the run's own CLIP; NaN where its retriever has none."""
    seed: int
    documents: tuple[UsedDocument, ...]
    """What stood in the prompt, the closest last."""
    asked: int = 0
    """Documents that were asked for."""
    shortage: str = ""
    """Why fewer documents than asked stood in the prompt; "" where there were as many."""


@dataclass(frozen=True, eq=False)
class Filled:
    """An image with its text, a part of which was made anew."""

    image: Image.Image
    text: str
    codes_N: np.ndarray


class CM3Leon:
    """The tokenizers, the memory bank and the decoder of a finished run. Made by `load`.

    Every answer depends on its seed alone. Mistakes are UserErrors, one sentence each.
    """

    def __init__(
        self,
        run: Run,
        *,
        precision: Precision = "auto",
        window: int | None = None,
        execution: Execution = "eager",
    ) -> None:
        self.run = run
        self._answerer = Answerer(run.model, run.vocab, window=window, execution=execution)
        self._precision: Precision = precision
        self._fresh = TokenSegment("image", np.empty(0, np.int64))

    @classmethod
    @checked
    def load(
        cls,
        run: str | Path,
        *,
        device: str | torch.device | None = None,
        precision: Precision = "auto",
        weights: Weights | None = None,
        window: PositiveInt | None = None,
        execution: Execution = "eager",
        ranks: Ranks | None = None,
        bank: Path | None = None,
        checkpoint: PositiveInt | None = None,
        plugins: str | Sequence[str] = (),
        trust: bool = False,
        verify: bool = True,
    ) -> CM3Leon:
        """The run of that folder, on a device (None = a GPU where there is one).

        Args:
            weights: what the decoder's matrices are kept in; None = the precision, which changes no result. int8 and
                fp8 take half of bf16's memory, and change results a little.
            window: image codes that a step computes, the next one and drafts behind it, which changes no result (up to
                rounding); None = 4 for a single image, 1 for more.
            execution: eager, compiled, graph or compiled graph: how steps are run. The last two need CUDA.
            ranks: processes that share the decoder; all of them have to ask the same.
            bank: run folder whose documents are the memory bank; None = the run's own.
            checkpoint: step of the pretraining whose weights are taken; None = the last.
            plugins: plugins (.py files or package folders) to load; those of the run are loaded if they are named here.
            trust: load all plugins that the run names; their code is run.
            verify: compare each file with its recorded checksum before it is read, once in a process.

        Raises:
            UserError: for a folder without a finished pretraining, files that have changed, plugins that are not
                trusted, or weights that cannot be had here.
        """
        ranks = ranks or Ranks(device_named(device))
        named = [plugins] if isinstance(plugins, str) else list(plugins)
        opening = Opening(plugins=named, trust=trust, verify=verify)
        opened = open_run(run, opening, needs=("pretraining",), device=ranks.device)
        experiment, folder = opened.experiment, opened.folder
        if bank is not None:
            if experiment.shards is None or not (bank / "index" / MARKER).is_file():
                why = (
                    f"{bank} has no finished index"
                    if experiment.shards
                    else f"the corpus of {folder} is in memory"
                )
                raise UserError(
                    f"bank: {why}; a memory bank is a run in shards made with until=index"
                )
            shards = replace(experiment.shards, bank=bank)
            opened = replace(opened, experiment=replace(experiment, shards=shards))
        model = load_model(folder, verify=verify)
        if checkpoint is not None:
            load_checkpoint(model, experiment.training, folder, checkpoint, verify=verify)
        if ranks.count > 1:
            share(model, rank=ranks.rank, count=ranks.count)
        kind: Weights = weights or ("bf16" if uses_bf16(ranks.device, precision) else "float32")
        keep_weights(
            model, "float32" if kind == "float32" else "bf16"
        )  # before a GPU has to hold them
        keep_weights(model.to(ranks.device), kind)
        opened = replace(opened, asked_model=model)
        return cls(opened, precision=precision, window=window, execution=execution)

    # -------------------------------------------------------------------------------------------- asking

    @checked
    def generate(
        self,
        prompt: Worded | Sequence[Worded],
        *,
        n: Samples = 1,
        retrieve: NonNegativeInt = 0,
        decoder: DecoderChoice = None,
        seed: NonNegativeInt = 0,
    ) -> list[Any]:
        """Images for a text: n of them, the best by CLIP first; for several texts, a list for each.

        Where the run's retriever has no CLIP, images stand in the order of their seeds, and their scores are NaN.

        Args:
            retrieve: documents to put before the prompt, fewer where the model has no room for as many.
            decoder: how codes are drawn; `mixture` takes top-p and CD-K in turn, as the paper does before re-ranking.
            seed: of the first sample; the others count on from it.

        Returns:
            `GeneratedImage`s.

        Raises:
            UserError: before anything is drawn, for a prompt that is too long for the model, by its place in the list.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        for number, reason in self.too_long(texts).items():
            where = "prompt" if isinstance(prompt, str) else f"prompt.{number}"
            raise UserError(f"{where} ({shortened(texts[number])}): {reason}")
        task = self._task("text_to_image")
        documents = [TokenDocument(text, (self._text(text), self._fresh)) for text in texts]
        found = self.retrieved(texts, None, "text", retrieve)
        requests, used = [], []
        for document, rows in zip(documents, found, strict=True):
            asked, kept = self._fitting(task, document, rows)
            used.append(kept)
            requests.append(self._request(asked, decoder, range(seed, seed + n)))
        if n > 1 and not self.has_clip:
            name = self.run.experiment.retriever.name
            warnings.warn(
                f"the retriever {name} of this run has no CLIP: images stand in the order of their seeds",
                UnrankedWarning,
                stacklevel=3,
            )
        results = []
        for text, document, rows, kept, drawn in zip(
            texts, documents, found, used, self._answers(requests), strict=True
        ):
            codes_BN = np.stack(
                [
                    self.run.tokenizer.codes(task.complete(document, np.array(tokens)))
                    for tokens in drawn
                ]
            )
            pictures = self._pictures(
                text, codes_BN, range(seed, seed + n), self.used_documents(kept)
            )
            shortage = _shortage(retrieve, len(rows), len(kept))
            results.append(
                [replace(picture, asked=retrieve, shortage=shortage) for picture in pictures]
            )
        return results[0] if isinstance(prompt, str) else results

    @checked
    def too_long(self, texts: Sequence[Text]) -> dict[int, str]:
        """Why a text is too long to be drawn, for those of `texts` that are, by their places in the list."""
        task, reasons = self._task("text_to_image"), {}
        for number, text in enumerate(texts):
            prompt = task.prompt(TokenDocument(text, (self._text(text), self._fresh)))
            if len(prompt.ids_T) + prompt.length > self.run.seq_len:
                reasons[number] = (
                    f"a prompt of {len(prompt.ids_T)} tokens and an image of {prompt.length} do not fit "
                    f"the model's {self.run.seq_len} positions"
                )
        return reasons

    @checked
    def ask(
        self,
        task: str,
        documents: Sequence[TokenDocument],
        retrieved: Sequence[Sequence[NonNegativeInt]],
        *,
        samples: range,
        seeds: Sequence[NonNegativeInt],
        decoder: DecoderChoice = None,
        max_tokens: PositiveInt = 64,
    ) -> list[list[Completed]]:
        """Some of the samples of a registered task's answers: for each document, the completed ones.

        Sample n of a document is the same whichever others are asked for, up to rounding.

        Args:
            retrieved: rows of the bank for each document, the closest last; fewer are used where there is no room.
            samples: their numbers.
            seeds: of the first sample of each document; the others count on from it.
            max_tokens: pieces of an answer in text; the answers say whether they were cut there.
        """
        _check_lengths(documents=documents, retrieved=retrieved, seeds=seeds)
        if samples.start < 0 or samples.step != 1:
            raise UserError(f"samples is {samples}; it must be a range of numbers from 0 on")
        built = self._task_with_room(task, max_tokens)
        prompts, requests = [], []
        for document, rows, seed in zip(documents, retrieved, seeds, strict=True):
            prompt, _ = self._fitting(built, document, list(rows))
            request = self._request(prompt, decoder, range(seed, seed + samples.stop))
            prompts.append(prompt)
            requests.append(request.part(samples))

        found = self._answers(requests)
        result: list[list[Completed]] = [[] for _ in documents]
        for number, drawn in enumerate(found):
            for tokens in drawn:
                answer_T = np.array(prompts[number].content(tokens), np.int64)
                completed = built.complete(documents[number], answer_T)
                cut = is_truncated(prompts[number], answer_T, self.run.seq_len)
                result[number].append(Completed(completed, cut))
        return result

    @checked
    def fitting(
        self,
        task: str,
        documents: Sequence[TokenDocument],
        retrieved: Sequence[Sequence[NonNegativeInt]],
        *,
        max_tokens: PositiveInt = 64,
    ) -> list[list[int]]:
        """Those of each document's retrieved rows, the closest ones, that `ask` and `rank` have room for.

        Args:
            retrieved: rows of the bank for each document, the closest last.
            max_tokens: pieces of an answer in text.
        """
        _check_lengths(documents=documents, retrieved=retrieved)
        built = self._task_with_room(task, max_tokens)
        return [
            self._fitting(built, document, list(rows))[1]
            for document, rows in zip(documents, retrieved, strict=True)
        ]

    @checked
    def rank(
        self,
        documents: Sequence[TokenDocument],
        retrieved: Sequence[Sequence[NonNegativeInt]],
        options: Sequence[Sequence[np.ndarray]],
    ) -> list[np.ndarray]:
        """Log-likelihoods (K,) in nats of the candidates for each document's answer, all of them in text.

        Args:
            retrieved: rows of the bank for each document, the closest last; fewer are used where there is no room.
            options: ids (T,) of each document's candidates; the `<end_of_span>` behind each counts with it.
        """
        _check_lengths(documents=documents, retrieved=retrieved, options=options)
        task, end = self._task("instruction"), self.run.vocab.end_of_span
        result = []
        for document, rows, candidates in zip(documents, retrieved, options, strict=True):
            prompt, _ = self._fitting(task, document, list(rows))
            for ids_T in candidates:
                self._check_ids("options", ids_T)
            given = [np.append(ids_T, end) for ids_T in candidates]
            with self._computing():
                result.append(
                    np.array(log_likelihoods(self.run.model, [prompt.ids_T] * len(given), given))
                )
        return result

    @checked
    def caption(
        self,
        image: GivenImage,
        *,
        retrieve: NonNegativeInt = 0,
        decoder: DecoderChoice = None,
        seed: NonNegativeInt = 0,
        max_tokens: PositiveInt = 64,
    ) -> str:
        """A text for an image, of at most so many pieces; a warning says where it was cut there."""
        task = TASKS.build({"name": "caption", "max_tokens": max_tokens}, **self._task_arguments())
        pixels_HWC = self._pixels(image)
        document = TokenDocument("image", (self._text(""), self._image(pixels_HWC)))
        (rows,) = self.retrieved(None, pixels_HWC[None], "image", retrieve)
        prompt, kept = self._fitting(task, document, rows)
        if shortage := _shortage(retrieve, len(rows), len(kept)):
            warnings.warn(found_of(len(kept), retrieve, shortage), ShortageWarning, stacklevel=3)
        return self.run.text_tokenizer.decode(self._text_answer(prompt, decoder, seed))

    @checked
    def infill(
        self,
        image: GivenImage,
        text: Text,
        *,
        box: tuple[int, int, int, int] | None = None,
        words: tuple[int, int] | None = None,
        decoder: DecoderChoice = None,
        seed: NonNegativeInt = 0,
        max_tokens: PositiveInt = 64,
    ) -> Filled:
        """An image and its text with a part of either made anew: what is not asked for keeps its codes and pieces.

        A box becomes a span of codes in each row that it touches, each with a sentinel of its own; the more there are,
        the further it is from what the model was trained on, one span or two in most samples.

        Guidance and CD-K compare with a stream that has a mask for the text where a box is asked for,
        and for the image where words are; where both are, there is nothing to compare with.

        Args:
            box: (left, top, right, bottom) in pixels of the given image, upright as its EXIF block says; inside its
                central square, which is what the tokenizer sees.
            words: characters [start, end) of the text, whose pieces are asked for.
            max_tokens: pieces that the new text may have; a warning says where it was cut there.
        """
        pixels_HWC = self._pixels(image)
        spans: list[AskedSpan] = []
        if box is None and words is None:
            raise UserError("box and words are both missing; give what is to be made anew")
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
        tokenizer = self.run.image_tokenizer
        if box is not None:
            height, width = read_given_image(image, "image").shape[:2]
            spans += box_spans(box, segment=1, grid=tokenizer.grid, width=width, height=height)
        document = TokenDocument(
            "infill", (TokenSegment("text", text_ids_T), self._image(pixels_HWC))
        )
        both = [
            prompt_of(document, spans, (), self.run.vocab)
            for prompt_of in (spans_prompt, unconditional_spans_prompt)
        ]
        streams = tuple(ids_T for ids_T in both if ids_T is not None)
        gaps = [
            grammar.Gap("text", max_tokens)
            if span.segment == 0
            else grammar.Gap("image", span.end - span.start)
            for span in spans
        ]
        length = sum(gap.length + 2 for gap in gaps)
        new = partial(grammar.infilling, self.run.vocab, gaps)
        of = self._of_each_modality(decoder, decoder)
        ((tokens,),) = self._answers([Request(streams, new, length, [of], [seed])])
        texts = [ids for kind, ids in grammar.segments_of(tokens, self.run.vocab) if kind == "text"]
        self._warn_truncated([ids for ids in texts if len(ids) == max_tokens], max_tokens)
        completed = fill(document, spans, tokens, self.run.vocab)
        codes_N = self.run.tokenizer.codes(completed)
        return Filled(
            Image.fromarray(tokenizer.decode(codes_N[None])[0]),
            self.run.tokenizer.caption(completed),
            codes_N,
        )

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
        """The image changed as the instruction says, n times, the best by CLIP first (paper section 4.2).

        The decoder `edit` has a weight for the image and one for the instruction.

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
        """The answer to a question about an image, of at most so many pieces; a warning says where it was cut there.

        Raises:
            UserError: for a model that was not fine-tuned on instructions.
        """
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
        prompt, kept = self._fitting(self._task("page_image"), page, rows)
        seeds = range(seed, seed + n)
        (drawn,) = self._answers([self._request(prompt, decoder, seeds)])
        codes_BN = np.stack([self.run.vocab.image_codes(np.array(tokens)) for tokens in drawn])
        shortage = _shortage(retrieve, len(rows), len(kept))
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
        (rows,) = self.retrieved(None, self._pixels(parts[-1])[None], "image", retrieve)
        prompt, kept = self._fitting(self._task_with_room("page_text", max_tokens), page, rows)
        if shortage := _shortage(retrieve, len(rows), len(kept)):
            warnings.warn(found_of(len(kept), retrieve, shortage), ShortageWarning, stacklevel=3)
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
        ids_T = lay_out(Sample(self._page(parts, self._fresh)), self.run.vocab).ids_T[:-1]
        codes = self.run.image_tokenizer.grid**2
        images = (segments + (first == "image")) // 2
        texts = segments - images
        room = (
            self.run.seq_len - len(ids_T) - images * codes - segments
        )  # a break or an end behind each
        max_tokens = min(max_tokens, room // texts) if texts else max_tokens
        new = partial(
            grammar.interleaved,
            self.run.vocab,
            first=first,
            codes=codes,
            text_length=max_tokens,
            segments=segments,
        )
        of = self._of_each_modality(decoder, text_decoder)
        length = images * codes + texts * max(max_tokens, 1) + segments
        ((tokens,),) = self._answers([Request((ids_T,), new, length, [of], [seed])])
        result: list[str | Image.Image] = []
        found = list(grammar.segments_of(tokens, self.run.vocab))
        cut = [ids for modality, ids in found if modality == "text" and len(ids) == max_tokens]
        self._warn_truncated(cut, max_tokens)
        for modality, ids in found:
            if modality == "text":
                result.append(self.run.text_tokenizer.decode(ids))
            else:
                (pixels_HWC,) = self.run.image_tokenizer.decode(
                    self.run.vocab.image_codes(np.array(ids))[None]
                )
                result.append(Image.fromarray(pixels_HWC))
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
        """Log-likelihoods in nats: of each of some `texts` for an `image`, or of each of some `images` for a `text`.

        With a `question` about the image the texts are answers to it, else captions. A text counts with the
        `<end_of_span>` behind it. Divide by lengths as the use demands.
        """
        vocab = self.run.vocab
        of_an_image = texts is not None and image is not None and images is None and text is None
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
            (found_K,) = self.rank(
                [document], [[]], [[encode(f" {each}") for each in texts]]
            )  # behind "Answer:"
            return [float(score) for score in found_K]
        if texts is not None and image is not None and of_an_image:
            document = TokenDocument("image", (self._text(""), self._image(self._pixels(image))))
            ids_T = self._task("caption").prompt(document).ids_T
            given = [np.append(self._text(each).ids_T, vocab.end_of_span) for each in texts]
        elif images is not None and text is not None and texts is None and image is None:
            document = TokenDocument(text, (self._text(text), self._fresh))
            ids_T = self._task("text_to_image").prompt(document).ids_T
            given = [self._image(self._pixels(each)).ids_T for each in images]
        else:
            raise UserError(
                "give texts and the image that they are for, or images and the text that they are for"
            )
        with self._computing():
            return log_likelihoods(self.run.model, [ids_T] * len(given), given)

    # -------------------------------------------------------------------------------------------- parts

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with autocast(self.run.device, self._precision):
            yield

    def _answers(self, requests: Sequence[Request]) -> list[list[list[int]]]:
        with self._computing():
            return self._answerer.answers(requests)

    def _text_answer(self, prompt: Any, decoder: DecoderChoice, seed: int) -> np.ndarray:
        """The only sample of a prompt for a text, without its end; a warning says where it was cut."""
        ((tokens,),) = self._answers([self._request(prompt, decoder, [seed])])
        answer_T = np.array(prompt.content(tokens), np.int64)
        cut = is_truncated(prompt, answer_T, self.run.seq_len)
        self._warn_truncated([answer_T] if cut else [], len(answer_T), stacklevel=5)
        return answer_T

    def _warn_truncated(self, cut: Sequence[Any], pieces: int, *, stacklevel: int = 4) -> None:
        """Say of texts that were stopped at so many pieces that they were."""
        if cut:
            what = "the text was" if len(cut) == 1 else f"{len(cut)} texts were"
            warnings.warn(
                f"{what} cut at {pieces} pieces, before the end; raise `max_tokens`, where the model's "
                f"{self.run.seq_len} positions have room",
                TruncatedWarning,
                stacklevel=stacklevel,
            )

    def _request(self, prompt: Any, decoder: DecoderChoice, seeds: Sequence[int]) -> Request:
        built = self._decoder(decoder, prompt.modality)
        return request_for(
            prompt, built, vocab=self.run.vocab, seeds=seeds, seq_len=self.run.seq_len
        )

    def _decoder(self, choice: DecoderChoice, modality: Modality) -> Any:
        usual = (
            self.run.experiment.decoder if modality == "image" else self.run.experiment.text_decoder
        )
        return DECODERS.build(usual if choice is None else choice)

    def _of_each_modality(
        self, image: DecoderChoice, text: DecoderChoice
    ) -> Mapping[Modality, Any]:
        """The decoders of a prompt's only sample."""
        return {
            "image": decoder_of(self._decoder(image, "image"), 0),
            "text": decoder_of(self._decoder(text, "text"), 0),
        }

    def _task_arguments(self) -> dict[str, Any]:
        return {"vocab": self.run.vocab, "image_codes": self.run.image_tokenizer.grid**2}

    def _task(self, name: str) -> Any:
        return TASKS.build(name, **self._task_arguments())

    def _task_with_room(self, name: str, max_tokens: int) -> Any:
        """The task, with room for so many pieces where it is answered in text."""
        room = {"max_tokens": max_tokens} if hasattr(TASKS.config_class(name), "max_tokens") else {}
        return TASKS.build({"name": name, **room}, **self._task_arguments())

    def _instruction(self, task: str, **values: np.ndarray | str | None) -> TokenDocument:
        """The first template of a task, filled: with texts and pixels, None for an image that is asked for."""
        segments: list[TokenSegment] = []
        for segment in fill_template(TABLE_5[task][0], values, ROLES[task]):
            if isinstance(segment, TextSegment):
                ids_T = self.run.text_tokenizer.encode(segment.text)
                segments.append(TokenSegment("text", ids_T, segment.role, segment.joined))
            else:
                given: Any = segment.content
                image = self._fresh if given is None else self._image(given)
                segments.append(replace(image, role=segment.role))
        return TokenDocument(task, tuple(segments))

    def _page(self, parts: Sequence[str | ImageInput], *more: TokenSegment) -> TokenDocument:
        """Texts and images as a document, with more segments behind them."""
        given = [
            self._text(part) if isinstance(part, str) else self._image(self._pixels(part))
            for part in parts
        ]
        return TokenDocument("page", (*given, *more))

    def _text(self, text: str) -> TokenSegment:
        return TokenSegment("text", self.run.text_tokenizer.encode(text))

    def _pixels(self, image: ImageInput, argument: str = "image") -> np.ndarray:
        return np.array(
            square(read_given_image(image, argument), self.run.image_tokenizer.image_size)
        )

    def _image(self, pixels_HWC: np.ndarray) -> TokenSegment:
        return TokenSegment(
            "image", self.run.vocab.image_ids(self.run.image_tokenizer.encode(pixels_HWC[None])[0])
        )

    @checked
    def retrieved(
        self,
        texts: Sequence[Text] | None,
        images_BHWC: np.ndarray | None,
        by: Modality,
        count: NonNegativeInt,
    ) -> list[list[int]]:
        """Rows of the bank for each query, the closest last.

        Args:
            images_BHWC: uint8, in the size of the image tokenizer.
            by: the modality that is searched with.
        """
        given: Sequence[Any] | np.ndarray | None = texts if by == "text" else images_BHWC
        if given is None:
            raise UserError(f"by is {by}, and no {'texts' if by == 'text' else 'images'} are given")
        if not count or not len(given):
            return [[] for _ in given]
        queries = self.run.retriever.parts(texts, images_BHWC)
        # Every document takes at least a position: no more of them have room.
        count = min(count, self.run.seq_len)
        rows_QK, _ = self.run.retriever.retrieve(self.run.bank, queries, by, count=count)
        return [[row for row in reversed(rows_K) if row != NONE] for rows_K in rows_QK.tolist()]

    def _fitting(
        self, task: Any, document: TokenDocument, rows: list[int]
    ) -> tuple[Any, list[int]]:
        """The prompt with as many of the documents, the closest ones, as leave room for the answer.

        Where there is none without any, a page loses segments from its beginning.
        """
        while True:
            prompt = task.prompt(document, [self.run.bank_document(row) for row in rows])
            if len(prompt.ids_T) + prompt.length <= self.run.seq_len:
                return prompt, rows
            shorter = None if rows else task.shortened(document)
            if not rows and shorter is None:
                return prompt, rows
            rows, document = rows[1:], shorter or document

    @checked
    def used_documents(self, rows: Sequence[NonNegativeInt]) -> tuple[UsedDocument, ...]:
        """Rows of the bank, such as `retrieved` finds, as documents to look at: ids, texts and images."""
        shown = []
        for document in map(self.run.bank_document, rows):
            image = None
            if document.segment("image"):
                (pixels_HWC,) = self.run.image_tokenizer.decode(
                    self.run.tokenizer.codes(document)[None]
                )
                image = Image.fromarray(pixels_HWC)
            shown.append(UsedDocument(document.id, self.run.tokenizer.caption(document), image))
        return tuple(shown)

    @property
    def has_clip(self) -> bool:
        """Whether the run's retriever has a CLIP, whose cosines rank samples."""
        return bool(self.run.retriever.encoder.joint)

    @checked
    def clip_scores(self, text: Text, codes_BN: np.ndarray) -> np.ndarray:
        """Cosine (B,) of each image and a text, by the run's own CLIP; NaN where its retriever has none.

        Args:
            codes_BN: codes of images, as the image tokenizer numbers them.
        """
        tokenizer = self.run.image_tokenizer
        if codes_BN.ndim != 2 or codes_BN.shape[1] != tokenizer.grid**2:
            raise UserError(
                f"codes_BN has the shape {codes_BN.shape}; it must be (images, {tokenizer.grid**2})"
            )
        if not np.issubdtype(codes_BN.dtype, np.integer) or (
            codes_BN.size and not 0 <= codes_BN.min() <= codes_BN.max() < tokenizer.codebook_size
        ):
            raise UserError(f"codes_BN must be integers from 0 to {tokenizer.codebook_size - 1}")
        if not self.has_clip:
            return np.full(len(codes_BN), np.nan)
        encoder = self.run.retriever.encoder
        images_BHWC = tokenizer.decode(codes_BN.astype(np.int64))
        return encoder.encode_images(images_BHWC) @ encoder.encode_texts([text])[0]

    def _check_ids(self, where: str, ids_T: np.ndarray) -> None:
        whole = ids_T.ndim == 1 and np.issubdtype(ids_T.dtype, np.integer)
        if not whole or (ids_T.size and not 0 <= ids_T.min() <= ids_T.max() < self.run.vocab.size):
            raise UserError(
                f"{where} must be lists (T,) of ids from 0 to {self.run.vocab.size - 1} of the vocabulary"
            )

    @cached_property
    def _learned(self) -> set[str] | None:
        """The tasks of instructions that the model was fine-tuned on, None where that is not known."""
        return tuned_on(self.run.experiment)

    def _check_tuned(self, asked: str, tasks: Sequence[str]) -> None:
        """Instructions are asked of a model that has learned from some: with the objective `instruct`.

        One that has learned other tasks than these is asked all the same, and a warning says so.
        """
        objective = self.run.experiment.objective.name
        if objective != TUNED:
            raise UserError(
                f"{asked} needs a model that was fine-tuned on instructions (objective.name={TUNED}, "
                f"docs/tasks.md); the run {self.run.folder} was trained with {objective}"
            )
        learned = self._learned
        if learned is not None and not learned.intersection(tasks):
            warnings.warn(
                f"{asked} needs a model that was fine-tuned on instructions of the task {' or '.join(tasks)}; "
                f"the run {self.run.folder} was fine-tuned on {', '.join(sorted(learned))} alone",
                UntunedWarning,
                stacklevel=4,
            )

    def _pictures(
        self,
        text: str,
        codes_BN: np.ndarray,
        seeds: Sequence[int],
        documents: tuple[UsedDocument, ...],
    ) -> list[GeneratedImage]:
        images_BHWC = self.run.image_tokenizer.decode(codes_BN)
        scores_B = self.clip_scores(text, codes_BN)
        pictures = [
            GeneratedImage(Image.fromarray(pixels_HWC), codes_N, float(score), seed, documents)
            for pixels_HWC, codes_N, score, seed in zip(
                images_BHWC, codes_BN, scores_B, seeds, strict=True
            )
        ]
        if not self.has_clip:
            return pictures
        return sorted(pictures, key=lambda picture: -picture.score)


def _check_lengths(**lists: Sequence[Any]) -> None:
    """Raises UserError for lists that are to have one item a document, and have not as many as the first."""
    (first, items), *others = lists.items()
    for name, other in others:
        if len(other) != len(items):
            raise UserError(f"{name} has {len(other)} items, and {first} {len(items)}")


def _shortage(asked: int, found: int, kept: int) -> str:
    """Why fewer retrieved documents than asked stand in a prompt, "" if as many do."""
    if kept == asked:
        return ""
    return NO_ROOM if kept < found else NO_MORE


def found_of(kept: int, asked: int, shortage: str) -> str:
    """What is said of a prompt with fewer retrieved documents than asked."""
    return f"found {kept} of {asked} documents: {shortage}"


def shortened(text: str, length: int = 40) -> str:
    """The beginning of a text, quoted, as messages show it."""
    return repr(text if len(text) <= length else f"{text[:length]}...")
