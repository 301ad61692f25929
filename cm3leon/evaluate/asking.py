"""Items of a protocol become prompts of a model, and the answers that it draws become arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cm3leon.api import CM3Leon, Completed
from cm3leon.evaluate.own_corpus import figures_of_own
from cm3leon.evaluation.config import AskConfig
from cm3leon.evaluation.protocols.base import Item, Protocol
from cm3leon.evaluation.protocols.corpus import CorpusTask
from cm3leon.registry import TASKS
from cm3leon.retrievers.strategy import NONE
from cm3leon.stages.tokens import token_documents
from cm3leon.types import Document, ImageSegment, TextSegment, TokenDocument, UserError


@dataclass(frozen=True, eq=False)
class Prompts:
    """Items in the tokens of a model, each with the documents that stand before it."""

    items: Sequence[Item]
    documents: Sequence[TokenDocument]
    retrieved: Sequence[Sequence[int]]
    """Rows of the memory bank for each item, the closest last."""


@dataclass(frozen=True, eq=False)
class Asker:
    """A model that is asked the items of a protocol under a setting."""

    model: CM3Leon
    protocol: Protocol
    setting: AskConfig
    max_tokens: int | None
    """Tokens of an answer in text; None where nothing is answered in text."""

    def prompts(self, items: Sequence[Item]) -> Prompts:
        """The items with the documents that are retrieved for them."""
        size = self.model.run.image_tokenizer.image_size
        whole = [item.document for item in items]
        if self.protocol.answers_in == "image":
            whole = [_with_empty_image(document, size) for document in whole]
        documents = list(token_documents(self.model.run, whole))
        return Prompts(items, documents, self._retrieved(items, documents))

    def answers(
        self, prompts: Prompts, samples: range, seeds: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """Samples of the answers as the arrays that a file of answers holds, a row for each item.

        Args:
            seeds: of the first sample of each item.
        """
        if self.protocol.ranks:
            drawn, made = [], {"scores": self._ranked(prompts)[:, None]}
        else:
            drawn = self._drawn(prompts, samples, seeds)
            made = self._arrays(prompts, drawn)
        if isinstance(self.protocol, CorpusTask):
            made |= figures_of_own(self.model, prompts.items, prompts.documents, drawn)
            most = max(1, *map(len, prompts.retrieved))
            rows_IK = np.full((len(prompts.items), most), NONE, np.int64)
            for index, rows in enumerate(prompts.retrieved):
                rows_IK[index, : len(rows)] = rows
            made["rows"] = rows_IK
        made["documents"] = np.array([len(rows) for rows in prompts.retrieved], np.int32)
        return made

    # ---------------------------------------------------------------------------------------- parts

    def _drawn(
        self, prompts: Prompts, samples: range, seeds: Sequence[int]
    ) -> list[list[Completed]]:
        """The documents of the items, completed by the model, in the order of the samples."""
        drawn: list[list[Completed]] = [[] for _ in prompts.items]
        for task in dict.fromkeys(item.task for item in prompts.items):
            of_task = [index for index, item in enumerate(prompts.items) if item.task == task]
            found = self.model.ask(
                task,
                [prompts.documents[index] for index in of_task],
                [prompts.retrieved[index] for index in of_task],
                samples=samples,
                seeds=[seeds[index] for index in of_task],
                decoder=self.setting.decoder,
                **self._most(),
            )
            for index, completed in zip(of_task, found, strict=True):
                drawn[index] = completed
        return drawn

    def _arrays(
        self, prompts: Prompts, drawn: Sequence[Sequence[Completed]]
    ) -> dict[str, np.ndarray]:
        """Codes and CLIP scores of images; texts, and whether they were cut."""
        model = self.model
        if self.protocol.answers_in == "text":
            texts = [[_answered_text(model, each.document) for each in of] for of in drawn]
            cut = [[each.truncated for each in of] for of in drawn]
            return {"texts": np.array(texts), "truncated": np.array(cut)}
        codes = [[_last_codes(model, each.document) for each in of] for of in drawn]
        codes_InN = np.array(codes).astype(np.int32)
        clip = [
            model.clip_scores(item.document.text, codes_nN)
            for item, codes_nN in zip(prompts.items, codes_InN, strict=True)
        ]
        return {"codes": codes_InN, "clip": np.stack(clip)}

    def _ranked(self, prompts: Prompts) -> np.ndarray:
        """Log-likelihoods (items, K) of the candidates, NaN where an item has fewer."""
        encode = self.model.run.text_tokenizer.encode
        options = []
        for item in prompts.items:
            # A candidate stands where the answer does in the template, with the space before it.
            space = _answer_space(item)
            options.append([encode(space + option) for option in item.options])
        scores_IK = np.full((len(options), max(map(len, options))), np.nan)
        ranked = self.model.rank(prompts.documents, prompts.retrieved, options)
        for index, scores_K in enumerate(ranked):
            scores_IK[index, : len(scores_K)] = scores_K
        return scores_IK

    def _retrieved(
        self, items: Sequence[Item], documents: Sequence[TokenDocument]
    ) -> list[list[int]]:
        """Rows of the bank for each item's prompt: up to `documents`,
        fewer where fewer are found or have room."""
        rows: list[list[int]] = [[] for _ in items]
        if not self.setting.documents:
            return rows
        for task in dict.fromkeys(item.task for item in items):
            of_task = [index for index, item in enumerate(items) if item.task == task]
            found = self._found(task, [items[index] for index in of_task])
            if self.setting.shuffled:
                found = [*found[1:], *found[:1]]
            asked = [documents[index] for index in of_task]
            fitting = self.model.fitting(task, asked, found, **self._most())
            for index, kept in zip(of_task, fitting, strict=True):
                rows[index] = kept
        return rows

    def _found(self, task: str, items: Sequence[Item]) -> list[list[int]]:
        by, count = TASKS.get(task).retrieves_by, self.setting.documents
        if by == "text":
            texts = [text_asked(item.document) for item in items]
            return self.model.retrieved(texts, None, by, count)
        # The last image is the one that the text belongs to, on a page of several, too.
        images_BHWC = np.stack([item.document.images[-1] for item in items])
        return self.model.retrieved(None, images_BHWC, by, count)

    def _most(self) -> dict[str, int]:
        """The longest answer as the API's argument,
        which is left out where nothing is answered in text."""
        return {} if self.max_tokens is None else {"max_tokens": self.max_tokens}


def text_asked(document: Document) -> str:
    """The words of a document that its answer is asked by: all but the true answer,
    which nothing is found by."""
    texts = [segment for segment in document.segments if isinstance(segment, TextSegment)]
    return " ".join(
        segment.text.strip()
        for segment in texts
        if segment.role != "answer" and segment.text.strip()
    )


def _with_empty_image(document: Document, size: int) -> Document:
    """The document with an empty image to be asked for, where it ends in a text."""
    if not isinstance(document.segments[-1], TextSegment):
        return document
    asked_for = ImageSegment(np.zeros((size, size, 3), np.uint8))
    return replace(document, segments=(*document.segments, asked_for))


def _answer_space(item: Item) -> str:
    answer = next(
        s for s in item.document.segments if isinstance(s, TextSegment) and s.role == "answer"
    )
    return answer.text[: len(answer.text) - len(answer.text.lstrip())]


def _last_codes(model: CM3Leon, document: TokenDocument) -> np.ndarray:
    image = next(segment for segment in reversed(document.segments) if segment.modality == "image")
    return model.run.vocab.image_codes(image.ids_T)


def _answered_text(model: CM3Leon, document: TokenDocument) -> str:
    answers = [segment for segment in document.segments if segment.role == "answer"]
    if answers:
        return model.run.text_tokenizer.decode(answers[0].ids_T).strip()
    return model.run.tokenizer.caption(document)


def check_others(items: Sequence[Item], where: str) -> None:
    """Raise UserError for an item that has no other of its task,
    whose documents it could be given."""
    for task, count in Counter(item.task for item in items).items():
        if count == 1:
            raise UserError(
                f"setting.shuffled is true, and {where} has a single item of the task {task}, so "
                "that there are no documents of another one; ask for an item more or fewer"
            )
