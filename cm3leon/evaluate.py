"""Answers of a model to a protocol's items, under a setting: shared out, gone on with after a kill, and measured."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cm3leon.api import CM3Leon, Completed, UsedDocument
from cm3leon.config import Component, result_settings, to_mapping
from cm3leon.evaluation.config import AskConfig
from cm3leon.evaluation.metrics import Measured, proportion
from cm3leon.evaluation.protocols.base import (
    Answer,
    Item,
    Protocol,
    asked,
    given_image,
    true_answer,
)
from cm3leon.io import atomic, digest_of, read_json, sha256, write_json
from cm3leon.permissions import check_readable
from cm3leon.records import MARKER, read_stage
from cm3leon.registry import PROTOCOLS, TASKS
from cm3leon.retrievers.index import ADDED
from cm3leon.stages.opening import open_run
from cm3leon.stages.tokens import token_documents
from cm3leon.types import Document, ImageSegment, TextSegment, TokenDocument, UserError

VERSION = 2
"""Raised when the same setting starts to give other answers."""
SHARD = 128
"""Items of a file of answers; a kill loses at most what one of them takes."""
SHOWN = 12
"""Items that a result has pictures of."""
SEEDS = 65_536
"""Seeds from one item's to the next one's: the most samples there may be."""


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a result: a model under a setting."""

    name: str
    model: str
    folder: Path
    """Run folder of the model."""
    setting: AskConfig
    point: dict[str, Any]
    """The swept keys and their values."""


@dataclass(frozen=True, eq=False)
class Example:
    """An item with its answer, as a report shows it."""

    text: str
    given_HWC: np.ndarray | None
    answer: Answer
    right: bool | None
    samples: Sequence[Answer] = ()
    """All images that were drawn, the best by CLIP first; empty for answers in text."""
    retrieved: Sequence[UsedDocument] = ()
    """The documents that stood in the prompt, the closest last."""


class Evaluation:
    """The items of a protocol, put to one model after the other. `folder` holds the answers of all."""

    def __init__(self, protocol: Component, folder: Path) -> None:
        self.component, self.folder = protocol, folder
        self.protocol: Protocol = PROTOCOLS.build(protocol)
        self._items: tuple[int, list[Item]] | None = None
        self._sizes: dict[Path, int] = {}
        self._parts: dict[tuple[Path, bool], dict[str, Any]] = {}
        self._opened: tuple[tuple[Path, Path | None, int | None], CM3Leon] | None = None

    def items(self, row: Row) -> list[Item]:
        """The protocol's items, images in the size of the row's model; read again for a model of another size."""
        if row.folder not in self._sizes:
            run = open_run(row.folder, where="models", needs=("pretraining",))
            self._sizes[row.folder] = run.image_tokenizer_shape.image_size
        size = self._sizes[row.folder]
        if self._items is None or self._items[0] != size:
            self._items = None  # its memory is free for the next ones
            self._items = (size, self.protocol.items_squared(size))
        items = self._items[1]
        if not items:
            raise UserError("protocol: it has no items to ask")
        return items

    def shards(self, row: Row) -> int:
        """Files of answers that a row has."""
        return -(-len(self.items(row)) // SHARD)

    def answer(self, row: Row, numbers: Sequence[int]) -> None:
        """Makes those of the row's files of answers that are missing, or have too few samples.

        Raises:
            UserError: for a folder that is no finished run, or a setting that the model has no room for.
        """
        if self.protocol.ranks and row.setting.samples > 1:
            raise UserError(
                f"setting.samples is {row.setting.samples}; candidates are ranked once, it must be 1"
            )
        if row.setting.max_tokens is not None and self.max_tokens(row) is None:
            answers = "candidates that are ranked" if self.protocol.ranks else "images"
            raise UserError(
                f"setting.max_tokens is {row.setting.max_tokens}, and the answers of {self.component.name} are "
                f"{answers}; leave it out"
            )
        place = self.place(row)
        missing = [
            number for number in numbers if _samples_of(_file(place, number)) < row.setting.samples
        ]
        if not missing:
            return
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "setting.json").is_file():
            write_json(place / "setting.json", self.identity(row))
        model = self.model(row)
        if self.protocol.answers_in == "image" and row.setting.samples > 1 and not model.has_clip:
            name = model.run.experiment.retriever.name
            raise UserError(
                f"setting.samples is {row.setting.samples}, and the retriever {name} of {row.folder} has no CLIP "
                "to choose the best by; it must be 1"
            )
        asked = sum(len(self._of_shard(row, number)) for number in missing) * row.setting.samples
        bar = tqdm(total=asked, desc=row.name, unit="answer", mininterval=2.0, dynamic_ncols=True)
        with bar as progress:
            for number in missing:
                self._make(model, row, _file(place, number), number)
                progress.update(len(self._of_shard(row, number)) * row.setting.samples)

    def is_answered(self, row: Row) -> bool:
        """Whether all the row's answers are there."""
        place = self.place(row)
        return all(
            _samples_of(_file(place, number)) >= row.setting.samples
            for number in range(self.shards(row))
        )

    def measure(self, row: Row) -> dict[str, Any]:
        """The figures of a row whose answers are all there, the ceiling and the chance level where they are known."""
        place = self.place(row)
        done = place / f"result-{row.setting.samples}.json"
        if not done.is_file():
            items, answers = self.items(row), self.answers(row)
            seconds = sum(
                float(_read(_file(place, number))["seconds"].sum())
                for number in range(self.shards(row))
            )
            result: dict[str, Any] = {
                "metrics": _figures(self.protocol.score(items, answers)),
                "items": len(items),
                "seconds": seconds,
                "notes": self.protocol.notes(items),
            }
            if (max_tokens := self.max_tokens(row)) is not None:
                result["max_tokens"] = max_tokens
                result["truncated"] = asdict(
                    proportion(np.array([answer.truncated for answer in answers]))
                )
            share = self._with_all_documents(row)
            if share is not None:
                result["all_documents"] = asdict(share)
            if self.protocol.has_truth:
                truths = self._rebuilt_truths(row)
                result["ceiling"] = _figures(self.protocol.score(items, truths))
                others = [*truths[1:], truths[0]]
                result["chance"] = _figures(self.protocol.score(items, others))
            write_json(done, result)
        return read_json(done, {"metrics": dict})

    def answers(self, row: Row) -> list[Answer]:
        """The best answer to each item."""
        found: list[Answer] = []
        model = self.model(row)
        for number in range(self.shards(row)):
            held = _read(_file(self.place(row), number))
            if self.protocol.ranks:
                found += [
                    _ranked(*each)
                    for each in zip(self._of_shard(row, number), held["scores"][:, 0], strict=True)
                ]
                continue
            if self.protocol.answers_in == "text":
                found += [
                    Answer(text=str(texts[0]), truncated=bool(truncated[0]))
                    for texts, truncated in zip(held["texts"], held["truncated"], strict=True)
                ]
                continue
            clip_In = held["clip"][:, : row.setting.samples]
            best_I = clip_In.argmax(axis=1)
            codes_IN = held["codes"][np.arange(len(best_I)), best_I]
            images_BHWC = model.run.image_tokenizer.decode(codes_IN.astype(np.int64))
            scores = clip_In[np.arange(len(best_I)), best_I]
            found += [
                Answer(image_HWC=image, clip=float(clip))
                for image, clip in zip(images_BHWC, scores, strict=True)
            ]
        return found

    def shown(self, row: Row) -> list[Example]:
        """Some items of each kind with the row's answers, all their samples, and the documents in their prompts."""
        items, answers = self.items(row), self.answers(row)
        kinds = list(dict.fromkeys(item.kind for item in items))
        places: list[int] = []
        for kind in kinds:
            own = [place for place, item in enumerate(items) if item.kind == kind]
            places += own[: max(1, SHOWN // len(kinds))]
        samples, retrieved = self._samples(row, places), self._documents(row, places)
        examples = []
        for place, drawn, documents in zip(places, samples, retrieved, strict=True):
            item, answer = items[place], answers[place]
            right = self.protocol.right(item, answer)
            examples.append(
                Example(asked(item), given_image(item), answer, right, drawn, documents)
            )
        return examples

    def _samples(self, row: Row, places: Sequence[int]) -> list[list[Answer]]:
        """All images drawn for some items, the best by CLIP first; none where answers are no images."""
        if self.protocol.answers_in != "image":
            return [[] for _ in places]
        tokenizer = self.model(row).run.image_tokenizer
        folder, numbers = self.place(row), {place // SHARD for place in places}
        files = {number: _read(_file(folder, number)) for number in numbers}
        found = []
        for place in places:
            held, at, count = files[place // SHARD], place % SHARD, row.setting.samples
            clip_n = held["clip"][at, :count]
            order_n = np.argsort(-clip_n, kind="stable")
            codes_nN = held["codes"][at, :count][order_n].astype(np.int64)
            images_nHWC = tokenizer.decode(codes_nN)
            found.append(
                [
                    Answer(image_HWC=image_HWC, clip=float(clip))
                    for image_HWC, clip in zip(images_nHWC, clip_n[order_n], strict=True)
                ]
            )
        return found

    def _documents(self, row: Row, places: Sequence[int]) -> list[tuple[UsedDocument, ...]]:
        """The documents that stood in the prompts of some items: those that are retrieved for them once more."""
        if not row.setting.documents:
            return [() for _ in places]
        model = self.model(row)
        items = [self.items(row)[place] for place in places]
        documents = self._token_documents(model, items)
        rows = self._retrieved(model, items, documents, row)
        return [model.used_documents(each) for each in rows]

    def place(self, row: Row) -> Path:
        """The folder of the row's answers: another for everything that they depend on, but the number of samples."""
        identity = json.dumps(self.identity(row), sort_keys=True)
        return self.folder / digest_of(identity)[:16]

    def identity(self, row: Row) -> dict[str, Any]:
        """All that a row's answers depend on but the number of samples."""
        left_out = {"samples", "bank", "max_tokens"} | (
            {"checkpoint"} if row.setting.checkpoint is None else set()
        )
        setting = {
            name: value for name, value in to_mapping(row.setting).items() if name not in left_out
        }
        # Those of the protocol, too: answers that were cut at another length are other answers.
        if (max_tokens := self.max_tokens(row)) is not None:
            setting["max_tokens"] = max_tokens
        return {
            "version": VERSION,
            "protocol": result_settings(self.component),
            "files": self.protocol.fingerprint(),
            "model": self._parts_of(row),
            "setting": setting,
            "bank": _bank_of(row.setting.bank) if row.setting.bank else None,
        }

    def max_tokens(self, row: Row) -> int | None:
        """Tokens that an answer in text may have; None where answers are images, or candidates that are ranked."""
        if self.protocol.answers_in == "image" or self.protocol.ranks:
            return None
        return row.setting.max_tokens or self.protocol.max_tokens

    def _most(self, row: Row) -> dict[str, int]:
        """The same as the API's argument, which is left out where nothing is answered in text."""
        max_tokens = self.max_tokens(row)
        return {} if max_tokens is None else {"max_tokens": max_tokens}

    def _with_all_documents(self, row: Row) -> Measured | None:
        """Share of the items that had as many retrieved documents as the setting asks for.

        None without retrieval, and for files of answers that an older version wrote: they do not say it.
        """
        held = [_read(_file(self.place(row), number)) for number in range(self.shards(row))]
        if not row.setting.documents or not all("documents" in each for each in held):
            return None
        counts_I = np.concatenate([each["documents"] for each in held])
        return proportion(counts_I >= row.setting.documents)

    def _parts_of(self, row: Row) -> dict[str, Any]:
        """What answers depend on in the model's run: digests of its parts, and what a setting leaves to it."""
        with_bank = row.setting.documents > 0 and row.setting.bank is None
        key = (row.folder, with_bank)
        if key not in self._parts:
            run = open_run(row.folder, where="models", needs=("pretraining",))
            sections = (
                ("decoder", "text_decoder", "retriever")
                if row.setting.documents
                else ("decoder", "text_decoder")
            )
            left = run.section(*sections)
            self._parts[key] = {**run.parts_of_answers(with_bank=with_bank), **left}
        return self._parts[key]

    # -------------------------------------------------------------------------------------------- parts

    def model(self, row: Row) -> CM3Leon:
        """The row's model, kept until another one is asked for."""
        key = (row.folder, row.setting.bank, row.setting.checkpoint)
        if self._opened is None or self._opened[0] != key:
            self._opened = None  # its memory is free for the next one
            model = CM3Leon.load(
                row.folder, bank=row.setting.bank, checkpoint=row.setting.checkpoint
            )
            self._opened = (key, model)
        return self._opened[1]

    def _of_shard(self, row: Row, number: int) -> list[Item]:
        return self.items(row)[number * SHARD : (number + 1) * SHARD]

    def _make(self, model: CM3Leon, row: Row, file: Path, number: int) -> None:
        """Draws the samples that the file has not, and writes it with all."""
        setting = row.setting
        items, begun = self._of_shard(row, number), time.perf_counter()
        held = _read(file) if file.is_file() else {}
        samples = range(_samples_of(file), setting.samples)
        wants_image = self.protocol.answers_in == "image"
        documents = self._token_documents(model, items)
        drawn: list[list[Completed]] = [[] for _ in items]
        made: dict[str, np.ndarray] = {}
        retrieved = self._retrieved(model, items, documents, row)
        if self.protocol.ranks:
            made["scores"] = self._ranks(model, items, documents, retrieved)[:, None]
            samples = range(0)
        for task in dict.fromkeys(item.task for item in items if samples):
            places = [place for place, item in enumerate(items) if item.task == task]
            found = model.ask(
                task,
                [documents[place] for place in places],
                [retrieved[place] for place in places],
                samples=samples,
                seeds=[(setting.seed + number * SHARD + place) * SEEDS for place in places],
                decoder=setting.decoder,
                **self._most(row),
            )
            for place, completed in zip(places, found, strict=True):
                drawn[place] = completed
        if wants_image:
            made["codes"] = np.array(
                [[_last_codes(model, each.document) for each in of] for of in drawn]
            ).astype(np.int32)
            made["clip"] = np.stack(
                [
                    model.clip_scores(item.document.text, codes_nN)
                    for item, codes_nN in zip(items, made["codes"], strict=True)
                ]
            )
        elif not self.protocol.ranks:
            made["texts"] = np.array(
                [[_answered_text(model, each.document) for each in of] for of in drawn]
            )
            made["truncated"] = np.array([[each.truncated for each in of] for of in drawn])
        for name in made:
            if name in held:
                made[name] = np.concatenate([held[name], made[name]], axis=1)
        spent = np.array([time.perf_counter() - begun])
        made["seconds"] = np.concatenate([held["seconds"], spent]) if held else spent
        made["documents"] = np.array([len(rows) for rows in retrieved], np.int32)
        with atomic(file, shared=True) as partial, partial.open("wb") as content:
            np.savez_compressed(content, allow_pickle=False, **made)

    def _token_documents(self, model: CM3Leon, items: Sequence[Item]) -> list[TokenDocument]:
        """The items' documents in the model's tokens, with an empty image where one is asked for."""
        size = model.run.image_tokenizer.image_size
        wants_image = self.protocol.answers_in == "image"
        whole = [
            _with_place(item.document, size) if wants_image else item.document for item in items
        ]
        return list(token_documents(model.run, whole))

    def _ranks(
        self,
        model: CM3Leon,
        items: Sequence[Item],
        documents: Sequence[TokenDocument],
        retrieved: Sequence[Sequence[int]],
    ) -> np.ndarray:
        """Log-likelihoods (items, K) of the candidates, NaN where an item has fewer."""
        encode = model.run.text_tokenizer.encode
        # A candidate stands where the answer does in the template, with the space before it.
        options = [
            [encode(_answer_space(item) + option) for option in item.options] for item in items
        ]
        scores_NK = np.full((len(items), max(len(item.options) for item in items)), np.nan)
        for place, scores_K in enumerate(model.rank(documents, retrieved, options)):
            scores_NK[place, : len(scores_K)] = scores_K
        return scores_NK

    def _retrieved(
        self,
        model: CM3Leon,
        items: Sequence[Item],
        documents: Sequence[TokenDocument],
        row: Row,
    ) -> list[list[int]]:
        """Rows of the bank that stand in each item's prompt: of those that the setting asks for, as many as are found
        and leave room for the longest answer."""
        count = row.setting.documents
        rows: list[list[int]] = [[] for _ in items]
        for task in dict.fromkeys(item.task for item in items if count):
            places = [place for place, item in enumerate(items) if item.task == task]
            found = self._found(model, task, [items[place] for place in places], count)
            of_task = [documents[place] for place in places]
            fitting = model.fitting(task, of_task, found, **self._most(row))
            for place, kept in zip(places, fitting, strict=True):
                rows[place] = kept
        return rows

    def _found(
        self, model: CM3Leon, task: str, items: Sequence[Item], count: int
    ) -> list[list[int]]:
        by = TASKS.get(task).retrieves_by
        if by == "text":
            texts = [text_asked(item.document) for item in items]
            return model.retrieved(texts, None, by, count)
        # The last image is the one that the text belongs to, on a page of several, too.
        images_BHWC = np.stack([item.document.images[-1] for item in items])
        return model.retrieved(None, images_BHWC, by, count)

    def _rebuilt_truths(self, row: Row) -> list[Answer]:
        """The true answers as the model could at best give them: images through its tokenizer and back."""
        truths = [true_answer(item, self.protocol.answers_in) for item in self.items(row)]
        if self.protocol.answers_in == "text":
            return truths
        tokenizer = self.model(row).run.image_tokenizer
        rebuilt: list[Answer] = []
        for first in range(0, len(truths), SHARD):
            few = truths[first : first + SHARD]
            images = [truth.image_HWC for truth in few if truth.image_HWC is not None]
            decoded_BHWC = tokenizer.decode(tokenizer.encode(np.stack(images)))
            rebuilt += [Answer(image_HWC=image_HWC) for image_HWC in decoded_BHWC]
        return rebuilt


def text_asked(document: Document) -> str:
    """The words of a document that its answer is asked by: all but the true answer, which nothing is found by."""
    texts = [segment for segment in document.segments if isinstance(segment, TextSegment)]
    return " ".join(
        segment.text.strip()
        for segment in texts
        if segment.role != "answer" and segment.text.strip()
    )


def _with_place(document: Document, size: int) -> Document:
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


def _ranked(item: Item, scores_K: np.ndarray) -> Answer:
    scores_K = scores_K[: len(item.options)]
    return Answer(text=item.options[int(scores_K.argmax())], scores_K=scores_K)


def _last_codes(model: CM3Leon, document: Any) -> np.ndarray:
    image = next(segment for segment in reversed(document.segments) if segment.modality == "image")
    return model.run.vocab.image_codes(image.ids_T)


def _answered_text(model: CM3Leon, document: Any) -> str:
    answers = [segment for segment in document.segments if segment.role == "answer"]
    if answers:
        return model.run.text_tokenizer.decode(answers[0].ids_T).strip()
    return model.run.tokenizer.caption(document)


def _file(place: Path, number: int) -> Path:
    return place / f"{number:05d}.npz"


def _samples_of(file: Path) -> int:
    """Samples that a file of answers has; 0 for one that is not there."""
    if not file.is_file():
        return 0
    held = _read(file)
    return next(len(held[name][0]) for name in ("clip", "texts", "scores") if name in held)


def _read(file: Path) -> dict[str, np.ndarray]:
    check_readable(file)
    try:
        with np.load(file, allow_pickle=False) as held:
            return dict(held)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is damaged; remove it, and the same command makes it again"
        ) from error


def _bank_of(folder: Path) -> list[str]:
    """What identifies a memory bank: how its index was made, and the documents that were added to it."""
    check_readable(folder / "index" / MARKER)
    if not (folder / "index" / MARKER).is_file():
        raise UserError(f"setting.bank: {folder} is no run with a finished index")
    added = folder / "index" / ADDED
    return [
        read_stage(folder / "index")["fingerprint"],
        *([sha256(added)] if added.is_file() else []),
    ]


def _figures(measured: dict[str, Measured]) -> dict[str, Any]:
    return {name: asdict(value) for name, value in measured.items()}
