"""From a protocol's items to prompts of a model, and from its answers to arrays."""

from __future__ import annotations

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
    """Items as token documents of a model, each with the documents retrieved for its prompt."""

    items: Sequence[Item]
    documents: Sequence[TokenDocument]
    retrieved: Sequence[Sequence[int]]
    """Rows of the memory bank for each item, the closest last."""


@dataclass(frozen=True, eq=False)
class ItemAsker:
    """A model that is asked the items of a protocol under a setting."""

    model: CM3Leon
    protocol: Protocol
    setting: AskConfig
    max_tokens: int | None
    """Most tokens of an answer in text; None if nothing is answered in text."""

    def prompts(self, items: Sequence[Item]) -> Prompts:
        """The items with the documents that are retrieved for them."""
        size = self.model.run.image_tokenizer.image_size
        whole = []
        for item in items:
            document = item.document
            if self.protocol.answers_in == "image":
                document = _with_empty_image(document, size)
            whole.append(document)
        documents = list(token_documents(self.model.run, whole))
        return Prompts(items, documents, self._retrieved(items, documents))

    def answers(
        self, prompts: Prompts, samples: range, seeds: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """Samples of the answers, as the arrays of a file of answers: one row for each item.

        Args:
            samples: indices of the samples to draw.
            seeds: of the first sample of each item.
        """
        drawn: list[list[Completed]] = []
        if self.protocol.ranks:
            made = {"scores": self._ranked(prompts)[:, None]}
        else:
            drawn = self._drawn(prompts, samples, seeds)
            made = self._arrays(prompts, drawn)

        # The protocol of the run's own corpus also looks at what was given and at what was copied.
        if isinstance(self.protocol, CorpusTask):
            made |= figures_of_own(self.model, prompts.items, prompts.documents, drawn)
            most = max(1, *map(len, prompts.retrieved))
            rows_IK = np.full((len(prompts.items), most), NONE, np.int64)
            for index, rows in enumerate(prompts.retrieved):
                rows_IK[index, : len(rows)] = rows
            made["rows"] = rows_IK

        made["documents"] = np.array(list(map(len, prompts.retrieved)), np.int32)
        return made

    # ---------------------------------------------------------------------------------------- parts

    def _drawn(
        self, prompts: Prompts, samples: range, seeds: Sequence[int]
    ) -> list[list[Completed]]:
        """For each item, the samples of its document as the model completed it."""
        drawn: list[list[Completed]] = [[] for _ in prompts.items]
        for task, of_task in _by_task(prompts.items).items():
            documents, retrieved, first_seeds = [], [], []
            for index in of_task:
                documents.append(prompts.documents[index])
                retrieved.append(prompts.retrieved[index])
                first_seeds.append(seeds[index])
            found = self.model.ask(
                task,
                documents,
                retrieved,
                samples=samples,
                seeds=first_seeds,
                decoder=self.setting.decoder,
                **self._max_tokens(),
            )
            for index, completed in zip(of_task, found, strict=True):
                drawn[index] = completed
        return drawn

    def _arrays(
        self, prompts: Prompts, drawn: Sequence[Sequence[Completed]]
    ) -> dict[str, np.ndarray]:
        """Codes and CLIP scores of images; texts, and whether they were cut at their length."""
        model = self.model
        if self.protocol.answers_in == "text":
            texts, cut = [], []
            for of_item in drawn:
                of_texts, of_cut = [], []
                for each in of_item:
                    of_texts.append(_answered_text(model, each.document))
                    of_cut.append(each.truncated)
                texts.append(of_texts)
                cut.append(of_cut)
            return {"texts": np.array(texts), "truncated": np.array(cut)}

        codes, asked = [], []
        for item, of_item in zip(prompts.items, drawn, strict=True):
            for each in of_item:
                codes.append(_last_codes(model, each.document))
                asked.append(item.document.text)
        codes_BN = np.stack(codes).astype(np.int32)
        clip_B = model.clip_scores(asked, codes_BN)

        # One row for each item, with its samples beside each other.
        items = len(prompts.items)
        return {
            "codes": codes_BN.reshape(items, -1, codes_BN.shape[-1]),
            "clip": clip_B.reshape(items, -1),
        }

    def _ranked(self, prompts: Prompts) -> np.ndarray:
        """Log-likelihoods (items, K) of the candidates; NaN where an item has fewer than K."""
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
        """Rows of the bank for each item's prompt: `setting.documents` of them, or as many as are
        found and fit."""
        rows: list[list[int]] = [[] for _ in items]
        if not self.setting.documents:
            return rows

        for task, of_task in _by_task(items).items():
            of_items, asked = [], []
            for index in of_task:
                of_items.append(items[index])
                asked.append(documents[index])

            found = self._found(task, of_items)
            if self.setting.shuffled:
                # Each item is given the documents of the next one of its task.
                found = [*found[1:], *found[:1]]
            fitting = self.model.fitting(task, asked, found, **self._max_tokens())
            for index, kept in zip(of_task, fitting, strict=True):
                rows[index] = kept
        return rows

    def _found(self, task: str, items: Sequence[Item]) -> list[list[int]]:
        by, count = TASKS.get(task).retrieves_by, self.setting.documents
        if by == "text":
            texts = [text_asked(item.document) for item in items]
            return self.model.retrieved(texts, None, by, count)
        # On a page of several images, the text belongs to the last one.
        images_BHWC = np.stack([item.document.images[-1] for item in items])
        return self.model.retrieved(None, images_BHWC, by, count)

    def _max_tokens(self) -> dict[str, int]:
        """The longest answer as an argument of the API; none if nothing is answered in text."""
        return {} if self.max_tokens is None else {"max_tokens": self.max_tokens}


def _by_task(items: Sequence[Item]) -> dict[str, list[int]]:
    """Group the indices of items by task, in the order in which the tasks first appear."""
    found: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        found.setdefault(item.task, []).append(index)
    return found


def text_asked(document: Document) -> str:
    """The words that documents are retrieved by: all of a document's but the true answer."""
    words = []
    for segment in document.segments:
        if isinstance(segment, TextSegment) and segment.role != "answer" and segment.text.strip():
            words.append(segment.text.strip())
    return " ".join(words)


def _with_empty_image(document: Document, size: int) -> Document:
    """Append an empty image, which is to be drawn, to a document that ends in a text."""
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
    for segment in document.segments:
        if segment.role == "answer":
            return model.run.text_tokenizer.decode(segment.ids_T).strip()
    return model.run.tokenizer.caption(document)


def check_others(items: Sequence[Item], where: str) -> None:
    """Raise UserError for a task with a single item,
    as `shuffled` needs the documents of another."""
    for task, of_task in _by_task(items).items():
        if len(of_task) == 1:
            raise UserError(
                f"setting.shuffled is true, but {where} has only one item of the task {task}, so "
                "there is no other item whose documents it could get; ask for more items, or leave "
                "shuffled out"
            )
