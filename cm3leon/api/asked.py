"""Ask a finished run in tokens. `CM3Leon` builds on it, and studies use it directly.

Documents are `TokenDocument`s, retrieved ones are rows of the memory bank, and images are codes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from cm3leon.api.answers import (
    Completed,
    GeneratedImage,
    TruncatedWarning,
    UntunedWarning,
    UsedDocument,
)
from cm3leon.api.documents import Documents
from cm3leon.api.given import DecoderChoice, check_codes, check_ids, check_lengths, check_queries
from cm3leon.api.loading import opened_model
from cm3leon.api.ranking import cosines, opened_clip
from cm3leon.arguments import Text, checked
from cm3leon.config import Component, NonNegativeInt, PositiveInt
from cm3leon.decoders.base import Decoder
from cm3leon.decoders.generate import Answerer, Answers, is_truncated, request_for
from cm3leon.decoders.request import Request
from cm3leon.decoders.score import log_likelihoods
from cm3leon.models.serving import keep_weights, share
from cm3leon.registry import DECODERS, TASKS
from cm3leon.retrievers.base import Encoder
from cm3leon.stages.opening import TUNED, tuned_on
from cm3leon.stages.prompts import fitting_prompt, retrieved_rows
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.trust import Opening
from cm3leon.tasks.base import Task
from cm3leon.training.device import autocast, device_named, uses_bf16
from cm3leon.training.distributed import Ranks
from cm3leon.types import (
    Execution,
    Modality,
    Notice,
    Precision,
    Prompt,
    TokenDocument,
    UserError,
    Weights,
)

DECODERS_KEPT = 100
"""Decoders of different settings that are kept for the next request that asks for one."""


class AskedRun(Documents):
    """The tokenizers, the memory bank and the model of a finished run.

    Every answer depends on its seed only. Mistakes of the caller raise UserErrors.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        precision: Precision = "auto",
        window: int | None = None,
        execution: Execution = "eager",
        ranker: Encoder | None = None,
    ) -> None:
        super().__init__(run)
        self._ranker = ranker
        self._answerer: Answers = Answerer(run.model, run.vocab, window=window, execution=execution)
        self._decoders: dict[str, Decoder] = {}
        self._notices: list[Notice] | None = None
        self._precision: Precision = precision

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
        ranker: Path | None = None,
        checkpoint: PositiveInt | None = None,
        revision: str | None = None,
        adapter: str | Path | None = None,
        plugins: str | Sequence[str] = (),
        trust: bool = False,
        verify: bool = True,
    ) -> Self:
        """Load the model of a run folder, of a folder that `export to=hf` wrote, or of the Hub.

        A model on the Hub is named org/name. huggingface_hub downloads it unless its cache has it;
        with HF_HUB_OFFLINE=1 only the cache is used. Code that comes with the model is never run.

        Args:
            run: the folder, or the name on the Hub.
            device: where it computes; None = a GPU if there is one.
            precision: of the computation; auto takes what suits the device.
            weights: type of the stored matrices; None = the precision, which changes no result.
                int8 and fp8 halve the memory of bf16 and change results a little.
            window: image codes that a step computes: the next one, and drafts behind it. It changes
                no result (up to rounding). None = 4 for a single image, 1 for more.
            execution: how steps are run; graph and compiled graph need CUDA.
            ranks: processes that share the model; all of them have to make the same calls.
            bank: run folder whose documents are the memory bank; None = the run's own.
            ranker: run folder whose retriever's CLIP ranks the images; None = the run's own.
            checkpoint: step of the pretraining whose weights are taken; None = the last.
            revision: a branch, a tag or a commit of a model on the Hub; None = its main branch.
            adapter: PEFT's LoRA to merge into an exported model, a folder or a model on the Hub.
            plugins: .py files or package folders to load, also those that the run names.
            trust: load all plugins that the run names, which runs their code.
            verify: compare a file with its recorded checksum before its first use in a process.

        Raises:
            UserError: for a folder without a finished pretraining, files that have changed, plugins
                that are not trusted, or weights that are not available here.
        """
        ranks = ranks or Ranks(device_named(device))
        named = [plugins] if isinstance(plugins, str) else list(plugins)
        opening = Opening(plugins=named, trust=trust, verify=verify)
        opened, model = opened_model(
            run,
            opening,
            ranks.device,
            revision=revision,
            adapter=adapter,
            bank=bank,
            checkpoint=checkpoint,
        )

        if ranks.count > 1:
            share(model, rank=ranks.rank, count=ranks.count)
        kind: Weights = weights or ("bf16" if uses_bf16(ranks.device, precision) else "float32")

        # Half of the bytes go to the GPU if weights are rounded to bf16 before.
        keep_weights(model, "float32" if kind == "float32" else "bf16")
        keep_weights(model.to(ranks.device), kind)
        opened = replace(opened, asked_model=model)
        clip = None if ranker is None else opened_clip(ranker, opening, ranks.device)
        return cls(opened, precision=precision, window=window, execution=execution, ranker=clip)

    def _notify(self, notice: Notice, *, stacklevel: int) -> None:
        """Warn the caller of the public method, which is `stacklevel` calls above."""
        if self._notices is None:
            warnings.warn(notice, stacklevel=stacklevel + 1)
        else:
            self._notices.append(notice)

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
        """Draw samples of a task's answers, and return the completed documents for each document.

        Sample n of a document is the same whichever other samples are drawn, up to rounding.

        Args:
            task: name of a registered task.
            documents: the documents to complete.
            retrieved: rows of the bank for each document, the closest last, used if there is room.
            samples: numbers of the samples to draw.
            seeds: of sample 0 of each document; the others count on from it.
            decoder: how tokens are drawn; None = as the run is set.
            max_tokens: largest number of pieces of a text; answers tell if they were cut there.
        """
        check_lengths(documents=documents, retrieved=retrieved, seeds=seeds)
        if samples.start < 0 or samples.step != 1:
            raise UserError(f"samples is {samples}; it must be a range of numbers from 0 on")

        built = self._task_with_room(task, max_tokens)
        prompts, requests = [], []
        for document, rows, seed in zip(documents, retrieved, seeds, strict=True):
            prompt, _ = fitting_prompt(self.run, built, document, list(rows))
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
        """Return the closest of each document's retrieved rows, as many as `ask` has room for.

        The arguments are those of `ask`.
        """
        check_lengths(documents=documents, retrieved=retrieved)
        built = self._task_with_room(task, max_tokens)
        return [
            fitting_prompt(self.run, built, document, list(rows))[1]
            for document, rows in zip(documents, retrieved, strict=True)
        ]

    @checked
    def rank(
        self,
        documents: Sequence[TokenDocument],
        retrieved: Sequence[Sequence[NonNegativeInt]],
        options: Sequence[Sequence[np.ndarray]],
    ) -> list[np.ndarray]:
        """Compute the log-likelihoods (K,) in nats of K candidate answers, in text, by document.

        Documents and their retrieved rows are given as to `ask`.

        Args:
            options: ids (T,) of each document's candidates; `<end_of_span>` is scored behind them.
        """
        check_lengths(documents=documents, retrieved=retrieved, options=options)
        task, end = self._task("instruction"), self.run.vocab.end_of_span
        result = []
        for document, rows, candidates in zip(documents, retrieved, options, strict=True):
            prompt, _ = fitting_prompt(self.run, task, document, list(rows))
            for ids_T in candidates:
                check_ids("options", ids_T, self.run.vocab.size)
            given = [np.append(ids_T, end) for ids_T in candidates]
            with self._computing():
                found = log_likelihoods(self.run.model, [prompt.ids_T] * len(given), given)
            result.append(np.array(found))
        return result

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with autocast(self.run.device, self._precision):
            yield

    def _answers(self, requests: Sequence[Request]) -> list[list[list[int]]]:
        with self._computing():
            return self._answerer.answers(requests)

    def _text_answer(self, prompt: Prompt, decoder: DecoderChoice, seed: int) -> np.ndarray:
        """Draw one text, without the token that ends it; a warning tells if it was cut."""
        ((tokens,),) = self._answers([self._request(prompt, decoder, [seed])])
        answer_T = np.array(prompt.content(tokens), np.int64)
        cut = is_truncated(prompt, answer_T, self.run.seq_len)
        self._warn_truncated([answer_T] if cut else [], len(answer_T), stacklevel=5)
        return answer_T

    def _warn_truncated(self, cut: Sequence[Any], pieces: int, *, stacklevel: int = 4) -> None:
        """Warn of texts that were cut at so many pieces, if there are any."""
        if cut:
            what = "the text was" if len(cut) == 1 else f"{len(cut)} texts were"
            sentence = (
                f"{what} cut at {pieces} pieces, before the end; raise `max_tokens`, where the "
                f"model's {self.run.seq_len} positions have room"
            )
            self._notify(TruncatedWarning(sentence), stacklevel=stacklevel)

    def _request(self, prompt: Prompt, decoder: DecoderChoice, seeds: Sequence[int]) -> Request:
        built = self._decoder(decoder, prompt.modality)
        return request_for(
            prompt, built, vocab=self.run.vocab, seeds=seeds, seq_len=self.run.seq_len
        )

    def _decoder(self, choice: DecoderChoice, modality: Modality) -> Decoder:
        experiment = self.run.experiment
        usual = experiment.decoder if modality == "image" else experiment.text_decoder
        chosen = usual if choice is None else choice
        component = chosen if isinstance(chosen, Component) else DECODERS.check(chosen)

        # The engine chooses the tokens of all samples with one decoder in one operation, so that
        # requests with equal settings are given the same one.
        key = repr(component)
        decoder = self._decoders.get(key)
        if decoder is None:
            decoder = DECODERS.build(component)
            if len(self._decoders) >= DECODERS_KEPT:
                self._decoders.clear()
            self._decoders[key] = decoder
        return decoder

    def _of_each_modality(
        self, image: DecoderChoice, text: DecoderChoice
    ) -> Mapping[Modality, Decoder]:
        """Build the decoders of a prompt with one sample."""
        return {
            "image": self._decoder(image, "image").of(0),
            "text": self._decoder(text, "text").of(0),
        }

    def _task_arguments(self) -> dict[str, Any]:
        return {"vocab": self.run.vocab, "grid": self.run.grid}

    def _task(self, name: str) -> Task:
        return TASKS.build(name, **self._task_arguments())

    def _task_with_room(self, name: str, max_tokens: int) -> Task:
        """Build a task; if its answers are texts, they have at most `max_tokens` pieces."""
        room = {"max_tokens": max_tokens} if TASKS.has_setting(name, "max_tokens") else {}
        return TASKS.build({"name": name, **room}, **self._task_arguments())

    @checked
    def retrieved(
        self,
        texts: Sequence[Text] | None,
        images_BHWC: np.ndarray | None,
        by: Modality,
        count: NonNegativeInt,
    ) -> list[list[int]]:
        """Retrieve rows of the bank for each query, the closest last.

        Args:
            texts: the queries' texts, if `by` is text.
            images_BHWC: uint8, in the size of the image tokenizer, if `by` is image.
            by: the modality that is searched with.
            count: number of rows of a query.
        """
        if count:
            self._check_bank("retrieve")
        check_queries(by, texts, images_BHWC)
        return retrieved_rows(self.run, texts, images_BHWC, by, count)

    def _check_bank(self, where: str) -> None:
        if not self.run.has_retriever:
            raise UserError(
                f"{where}: the run {self.run.folder} has no memory bank, as its weights were made "
                "elsewhere; retrieve from a run of your own that starts from it (training.start)"
            )

    @checked
    def used_documents(self, rows: Sequence[NonNegativeInt]) -> tuple[UsedDocument, ...]:
        """Return rows of the bank, e.g. those of `retrieved`, as documents to look at."""
        shown = []
        for document in map(self.run.bank_document, rows):
            image = None
            if segment := document.segment("image"):
                image = Image.fromarray(self._decoded(segment))
            shown.append(UsedDocument(document.id, self.run.tokenizer.caption(document), image))
        return tuple(shown)

    @property
    def has_clip(self) -> bool:
        """Whether there is a CLIP whose cosines rank samples."""
        return self.clip is not None

    @property
    def clip(self) -> Encoder | None:
        """The CLIP that ranks samples: the given one, or the run's own; None if it has none."""
        if self._ranker is not None or not self.run.has_retriever:
            return self._ranker
        encoder = self.run.retriever.encoder
        return encoder if encoder.joint else None

    @checked
    def clip_scores(
        self,
        text: Text | Sequence[Text],
        codes_BN: np.ndarray,
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Compute the cosine (B,) of each image and its text by the run's CLIP; NaN without one.

        Args:
            text: one text for all images, or one for each of them.
            codes_BN: codes of images, as the image tokenizer numbers them.
            size: width and height of the images in pixels; None = the run's usual ones.
        """
        tokenizer = self.run.image_tokenizer
        grid = self._grid_of(size)
        check_codes("codes_BN", codes_BN, math.prod(grid), tokenizer.codebook_size)
        texts = [text] * len(codes_BN) if isinstance(text, str) else list(text)
        check_lengths(codes_BN=list(codes_BN), text=texts)
        encoder = self.clip
        if encoder is None:
            return np.full(len(codes_BN), np.nan, np.float32)
        return cosines(encoder, tokenizer, texts, codes_BN, grid)

    @cached_property
    def _learned(self) -> set[str] | None:
        """Tasks of instructions that the model was fine-tuned on; None if that is not known."""
        return tuned_on(self.run.experiment)

    def _check_tuned(self, asked: str, tasks: Sequence[str]) -> None:
        """Raise UserError for a model that was not trained with the objective `instruct`.

        If it was trained on other tasks than these, only a warning says so.
        """
        objective = self.run.experiment.objective.name
        if objective != TUNED:
            raise UserError(
                f"{asked} needs a model that was fine-tuned on instructions "
                f"(objective.name={TUNED}, docs/tasks.md); the run {self.run.folder} was trained "
                f"with {objective}"
            )

        learned = self._learned
        if learned is not None and not learned.intersection(tasks):
            sentence = (
                f"{asked} needs a model that was fine-tuned on instructions of the task "
                f"{' or '.join(tasks)}; the run {self.run.folder} was fine-tuned on "
                f"{', '.join(sorted(learned))} alone"
            )
            self._notify(UntunedWarning(sentence), stacklevel=4)

    def _pictures(
        self,
        text: str,
        codes_BN: np.ndarray,
        seeds: Sequence[int],
        documents: tuple[UsedDocument, ...],
        size: tuple[int, int] | None = None,
    ) -> list[GeneratedImage]:
        images_BHWC = self.run.image_tokenizer.decode(codes_BN, grid=self._grid_of(size))
        scores_B = self.clip_scores(text, codes_BN, size)
        pictures = [
            GeneratedImage(Image.fromarray(pixels_HWC), codes_N, float(score), seed, documents)
            for pixels_HWC, codes_N, score, seed in zip(
                images_BHWC, codes_BN, scores_B, seeds, strict=True
            )
        ]
        if not self.has_clip:
            return pictures
        return sorted(pictures, key=lambda picture: -picture.score)
