"""Models under settings are asked the items of a protocol, and their answers are scored."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cm3leon.api import CM3Leon, UsedDocument
from cm3leon.config import Component, result_settings, to_mapping
from cm3leon.evaluate.asking import Asker, check_others
from cm3leon.evaluate.files import add_answers, read_answers, sample_count, shard_file, write_arrays
from cm3leon.evaluate.own_corpus import own_corpus
from cm3leon.evaluate.row import Row, bank_identity
from cm3leon.evaluation.config import shown
from cm3leon.evaluation.metrics import Measured, proportion
from cm3leon.evaluation.protocols.base import Answer, Item, Protocol, true_answer
from cm3leon.evaluation.protocols.corpus import CorpusTask, OwnCorpus
from cm3leon.evaluation.report.answers import Example
from cm3leon.io import digest_of, read_json, write_json
from cm3leon.records import read_stage
from cm3leon.registry import PROTOCOLS
from cm3leon.retrievers.strategy import NONE
from cm3leon.stages.opening import open_run
from cm3leon.stages.run_folder import RunFolder
from cm3leon.training.device import best_device
from cm3leon.types import UserError

VERSION = 3
"""Raised when the same setting starts to give other answers."""
SHARD = 128
"""Items of a file of answers; a kill loses at most what one of them takes."""
FEATURES = "features-{}-{}"
"""Folder of the features of the best of so many samples, by what gives them."""
SHOWN = 12
"""Items that a result has pictures of."""
SEEDS = 65_536
"""Seeds from one item's to the next one's: the most samples there may be."""


class Evaluation:
    """The items of a protocol, put to one model after the other. `folder` holds the answers of all.

    Args:
        own: the model of a run that is being made, whose own evaluation this is;
            with what it knows of its corpus.
    """

    def __init__(
        self, protocol: Component, folder: Path, own: tuple[CM3Leon, OwnCorpus] | None = None
    ) -> None:
        self.component, self.folder = protocol, folder
        self.protocol: Protocol = PROTOCOLS.build(protocol)
        self.protocol.device = own[0].run.device if own else best_device()
        self.protocol.folder = folder
        self._own = own
        self._items: tuple[tuple[int, Path | None], list[Item]] | None = None
        self._sizes: dict[Path, int] = {}
        self._parts: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._levels: dict[Path, dict[str, Any]] = {}
        self._opened: tuple[tuple[Path, Path | None, int | None], CM3Leon] | None = None

    def items(self, row: Row) -> list[Item]:
        """The protocol's items, images in the size of the row's model;
        read again for a model of another size."""
        if row.folder not in self._sizes:
            self._sizes[row.folder] = self._run(row).image_tokenizer_shape.image_size
        size, of_run = self._sizes[row.folder], isinstance(self.protocol, CorpusTask)
        key = (size, row.folder if of_run else None)
        if self._items is None or self._items[0] != key:
            self._items = None  # its memory is free for the next ones
            if isinstance(self.protocol, CorpusTask):
                corpus = self._own[1] if self._own else own_corpus(self._run(row))
                self.protocol.ask_about(corpus)
            self._items = (key, self.protocol.items_squared(size))
        items = self._items[1]
        if not items:
            raise UserError("protocol: it has no items to ask")
        return items

    def shards(self, row: Row) -> int:
        """Files of answers that a row has."""
        return -(-len(self.items(row)) // SHARD)

    def answer(self, row: Row, numbers: Sequence[int]) -> None:
        """Make those of the row's files of answers that are missing, or have too few samples.

        Raises:
            UserError: for a folder that is no finished run,
                or a setting that the model has no room for.
        """
        self._check(row)
        folder, samples = self.folder_of(row), row.setting.samples
        missing = [
            number for number in numbers if sample_count(shard_file(folder, number)) < samples
        ]
        if missing:
            self._make_missing(row, missing)
        if self.protocol.scored_by:
            # A row that is scored needs those of answers that have just been made alone.
            wanted = missing if self._result_file(row).is_file() else numbers
            for number in wanted:
                self._features(row, number)

    def _make_missing(self, row: Row, missing: Sequence[int]) -> None:
        if row.setting.shuffled and row.setting.documents:
            for number in missing:
                check_others(self._of_shard(row, number), f"file {number} of {row.name}")
        folder, samples = self.folder_of(row), row.setting.samples
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "setting.json").is_file():
            write_json(folder / "setting.json", self.identity(row))
        model = self.model(row)
        if self.protocol.answers_in == "image" and samples > 1 and not model.has_clip:
            name = model.run.experiment.retriever.name
            raise UserError(
                f"setting.samples is {samples}, and the retriever {name} of {row.folder} has no "
                "CLIP to choose the best by; it must be 1"
            )

        asker = Asker(model, self.protocol, row.setting, self.max_tokens(row))
        asked = sum(len(self._of_shard(row, number)) for number in missing) * samples
        bar = tqdm(total=asked, desc=row.name, unit="answer", mininterval=2.0, dynamic_ncols=True)
        with bar as progress:
            for number in missing:
                self._make(asker, row, number)
                progress.update(len(self._of_shard(row, number)) * samples)

    def _result_file(self, row: Row) -> Path:
        return self.folder_of(row) / f"result-{row.setting.samples}.json"

    def measure(self, row: Row) -> dict[str, Any]:
        """The figures of a row whose answers are all there,
        the ceiling and the chance level where they are known."""
        done = self._result_file(row)
        if not done.is_file():
            write_json(done, self._result(row))
        return read_json(done, {"metrics": dict})

    def _result(self, row: Row) -> dict[str, Any]:
        items, held = self.items(row), self._held(row)
        answers = self.answers(row)
        result: dict[str, Any] = {
            "metrics": _figures(self.protocol.score(items, answers)),
            "items": len(items),
            "seconds": sum(float(each["seconds"].sum()) for each in held),
            "notes": self.protocol.notes(items),
        }
        if (max_tokens := self.max_tokens(row)) is not None:
            cut = proportion(np.array([answer.truncated for answer in answers]))
            result |= {"max_tokens": max_tokens, "truncated": asdict(cut)}

        # Files that an older version wrote do not say how many documents stood before each item.
        if row.setting.documents and all("documents" in each for each in held):
            counts_I = np.concatenate([each["documents"] for each in held])
            result["all_documents"] = asdict(proportion(counts_I >= row.setting.documents))
        if self.protocol.has_truth:
            result |= self._levels_of(row)
        return result

    def _levels_of(self, row: Row) -> dict[str, Any]:
        """The figures of the true answers, and of those to other items;
        the same for all rows of a model."""
        if row.folder not in self._levels:
            items, truths = self.items(row), self._rebuilt_truths(row)
            others = [*truths[1:], truths[0]]
            self._levels[row.folder] = {
                "ceiling": _figures(self.protocol.score(items, truths)),
                "chance": _figures(self.protocol.score(items, others)),
            }
        return self._levels[row.folder]

    def answers(self, row: Row) -> list[Answer]:
        """The best answer to each item."""
        found: list[Answer] = []
        for number in range(self.shards(row)):
            if self.protocol.scored_by:
                found += self._scored_answers(row, number)
            else:
                found += self._answers_of(row, number)
        return found

    def _scored_answers(self, row: Row, number: int) -> list[Answer]:
        """The best answer to each item of a shard by its features, without its image."""
        clip_In = read_answers(shard_file(self.folder_of(row), number))["clip"]
        best_I = clip_In[:, : row.setting.samples].max(axis=1)
        features_ID = self._features(row, number)
        return [
            Answer(features_D=features_D, clip=float(clip))
            for features_D, clip in zip(features_ID, best_I, strict=True)
        ]

    def _features(self, row: Row, number: int) -> np.ndarray:
        """Features (items, D) of the best answers of a shard,
        which whoever draws these keeps beside them."""
        by = digest_of(self.protocol.scored_by)[:8]
        folder = self.folder_of(row) / FEATURES.format(row.setting.samples, by)
        file = shard_file(folder, number)
        if file.is_file():
            return read_answers(file)["features"]
        answers = self._answers_of(row, number)
        images = [answer.image_HWC for answer in answers if answer.image_HWC is not None]
        features_ID = self.protocol.features(np.stack(images))
        folder.mkdir(exist_ok=True)
        write_arrays(file, {"features": features_ID})
        return features_ID

    def _answers_of(self, row: Row, number: int) -> list[Answer]:
        """The best answer to each item of a shard."""
        model = self.model(row)
        held = read_answers(shard_file(self.folder_of(row), number))
        if self.protocol.ranks:
            pairs = zip(self._of_shard(row, number), held["scores"][:, 0], strict=True)
            return [_ranked(*pair) for pair in pairs]
        beside = self._beside(model, held)
        if self.protocol.answers_in == "text":
            texts = zip(held["texts"], held["truncated"], strict=True)
            return [
                Answer(text=str(text[0]), truncated=bool(cut[0]), **beside(index, 0))
                for index, (text, cut) in enumerate(texts)
            ]
        clip_In = held["clip"][:, : row.setting.samples]
        best_I = clip_In.argmax(axis=1)
        codes_IN = held["codes"][np.arange(len(best_I)), best_I]
        images_IHWC = model.run.image_tokenizer.decode(codes_IN.astype(np.int64))
        return [
            Answer(image_HWC=image, codes_N=codes_IN[index], **beside(index, int(best_I[index])))
            for index, image in enumerate(images_IHWC)
        ]

    def _beside(
        self, model: CM3Leon, held: dict[str, np.ndarray]
    ) -> Callable[[int, int], dict[str, Any]]:
        """What a file of answers says of one of them besides the answer,
        by its item's and its sample's number."""
        retrieved: dict[int, np.ndarray] = {}
        for number in sorted({int(row) for row in held.get("rows", np.empty(0)).ravel()} - {NONE}):
            document = model.run.bank_document(number)
            if document.segment("image") is not None:
                retrieved[number] = model.run.tokenizer.codes(document)

        def beside(item: int, sample: int) -> dict[str, Any]:
            said: dict[str, Any] = {}
            if "clip" in held:
                said["clip"] = float(held["clip"][item, sample])
            if "kept" in held:
                said["given_kept"] = bool(held["kept"][item, sample])
                rows = map(int, held["rows"][item])
                said["retrieved"] = [retrieved[row] for row in rows if row in retrieved]
            return said

        return beside

    def shown(self, row: Row) -> list[Example]:
        """Some items of each kind with the row's answers, all their samples,
        and the documents in their prompts."""
        items = self.items(row)
        kinds = list(dict.fromkeys(item.kind for item in items))
        chosen: list[int] = []
        for kind in kinds:
            own = [index for index, item in enumerate(items) if item.kind == kind]
            chosen += own[: max(1, SHOWN // len(kinds))]
        # Answers are decoded a file at a time, so that only those of the chosen items are.
        of_shard = {
            number: self._answers_of(row, number) for number in {i // SHARD for i in chosen}
        }

        documents, examples = self._documents(row, chosen), []
        for number, index in enumerate(chosen):
            item, answer = items[index], of_shard[index // SHARD][index % SHARD]
            of_item = self.protocol.shown(item)
            examples.append(
                Example(
                    of_item.text,
                    of_item.given_HWC,
                    answer,
                    right=self.protocol.right(item, answer),
                    samples=self._samples(row, index),
                    retrieved=documents[number],
                    original_HWC=of_item.original_HWC,
                )
            )
        return examples

    def _samples(self, row: Row, index: int) -> list[Answer]:
        """All images drawn for an item, the best by CLIP first;
        none where answers are no images."""
        if self.protocol.answers_in != "image":
            return []
        held = read_answers(shard_file(self.folder_of(row), index // SHARD))
        clip_n = held["clip"][index % SHARD, : row.setting.samples]
        order_n = np.argsort(-clip_n, kind="stable")
        codes_nN = held["codes"][index % SHARD, : row.setting.samples][order_n].astype(np.int64)
        images_nHWC = self.model(row).run.image_tokenizer.decode(codes_nN)
        return [
            Answer(image_HWC=image_HWC, clip=float(clip))
            for image_HWC, clip in zip(images_nHWC, clip_n[order_n], strict=True)
        ]

    def _documents(self, row: Row, chosen: Sequence[int]) -> list[tuple[UsedDocument, ...]]:
        """The documents that stood in the prompts of some items:
        those that are retrieved for them once more."""
        if not row.setting.documents:
            return [() for _ in chosen]
        found: dict[int, Sequence[int]] = {}
        model = self.model(row)
        asker = Asker(model, self.protocol, row.setting, self.max_tokens(row))
        for number in sorted({index // SHARD for index in chosen}):
            rows = asker.prompts(self._of_shard(row, number)).retrieved
            found.update(enumerate(rows, number * SHARD))
        return [model.used_documents(found[index]) for index in chosen]

    def folder_of(self, row: Row) -> Path:
        """The folder of the row's answers: another for everything that they depend on,
        but the number of samples."""
        identity = json.dumps(self.identity(row), sort_keys=True)
        return self.folder / digest_of(identity)[:16]

    def identity(self, row: Row) -> dict[str, Any]:
        """All that a row's answers depend on but the number of samples."""
        left_out = {"samples", "bank", "max_tokens"}
        # Left out where they say nothing, as they came later than answers that are still good.
        left_out |= {name for name in ("checkpoint", "shuffled") if not getattr(row.setting, name)}
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
            "bank": bank_identity(row.setting.bank) if row.setting.bank else None,
        }

    def max_tokens(self, row: Row) -> int | None:
        """Tokens that an answer in text may have; None where answers are images,
        or candidates that are ranked."""
        if self.protocol.answers_in == "image" or self.protocol.ranks:
            return None
        return row.setting.max_tokens or self.protocol.max_tokens

    def _parts_of(self, row: Row) -> dict[str, Any]:
        """What answers depend on in the model's run: digests of its parts,
        and what a setting leaves to it."""
        with_bank = row.setting.documents > 0 and row.setting.bank is None
        own = "text_decoder" if self.protocol.answers_in == "text" else "decoder"
        sections = [own] if row.setting.decoder is None else []
        sections += ["retriever"] if row.setting.documents else []
        key = (row.folder, with_bank, *sections)
        if key not in self._parts:
            run = self._run(row)
            left = run.depends_on(*sections)
            if isinstance(self.protocol, CorpusTask):
                left["documents"] = read_stage(row.folder / "documents")["fingerprint"]
            self._parts[key] = {**run.parts_of_answers(with_bank=with_bank), **left}
        return self._parts[key]

    # ---------------------------------------------------------------------------------------- parts

    def _run(self, row: Row) -> RunFolder:
        if self._own and row.folder == self._own[0].run.folder:
            return self._own[0].run
        return open_run(row.folder, where="models", needs=("pretraining",))

    def model(self, row: Row) -> CM3Leon:
        """The row's model, kept until another one is asked for."""
        key = (row.folder, row.setting.bank, row.setting.checkpoint)
        if self._own and key == (self._own[0].run.folder, None, None):
            return self._own[0]
        if self._opened is None or self._opened[0] != key:
            self._opened = None  # its memory is free for the next one
            model = CM3Leon.load(
                row.folder, bank=row.setting.bank, checkpoint=row.setting.checkpoint
            )
            self._opened = (key, model)
        return self._opened[1]

    def _of_shard(self, row: Row, number: int) -> list[Item]:
        return self.items(row)[number * SHARD : (number + 1) * SHARD]

    def _make(self, asker: Asker, row: Row, number: int) -> None:
        """Draw the samples that a file of answers has not, and add them to it."""
        begun, file = time.perf_counter(), shard_file(self.folder_of(row), number)
        items, setting = self._of_shard(row, number), row.setting
        first = setting.seed + number * SHARD
        seeds = [(first + index) * SEEDS for index in range(len(items))]
        samples = range(sample_count(file), setting.samples)
        if not samples.start:  # features of answers that are gone
            for kept in self.folder_of(row).glob(FEATURES.format("*", "*")):
                shard_file(kept, number).unlink(missing_ok=True)
        made = asker.answers(asker.prompts(items), samples, seeds)
        add_answers(file, made, time.perf_counter() - begun)

    def _held(self, row: Row) -> list[dict[str, np.ndarray]]:
        """All the row's files of answers."""
        folder = self.folder_of(row)
        return [read_answers(shard_file(folder, number)) for number in range(self.shards(row))]

    def _check(self, row: Row) -> None:
        """Raise UserError for a setting that does not go with the protocol."""
        if self.protocol.ranks and row.setting.samples > 1:
            raise UserError(
                f"setting.samples is {row.setting.samples}; candidates are ranked once, it must be "
                "1"
            )
        if row.setting.max_tokens is not None and self.max_tokens(row) is None:
            answers = "candidates that are ranked" if self.protocol.ranks else "images"
            raise UserError(
                f"setting.max_tokens is {row.setting.max_tokens}, and the answers of "
                f"{self.component.name} are {answers}; leave it out"
            )

    def _rebuilt_truths(self, row: Row) -> list[Answer]:
        """The true answers as the model could at best give them:
        images through its tokenizer and back."""
        truths = [true_answer(item, self.protocol.answers_in) for item in self.items(row)]
        if self.protocol.answers_in == "text":
            return truths
        tokenizer = self.model(row).run.image_tokenizer
        rebuilt: list[Answer] = []
        for first in range(0, len(truths), SHARD):
            few = truths[first : first + SHARD]
            images = [truth.image_HWC for truth in few if truth.image_HWC is not None]
            codes_BN = tokenizer.encode(np.stack(images))
            rebuilt += [
                Answer(image_HWC=image_HWC, codes_N=codes_N)
                for image_HWC, codes_N in zip(tokenizer.decode(codes_BN), codes_BN, strict=True)
            ]
        return rebuilt


def figures_line(row: str, result: Mapping[str, Any]) -> str:
    """The figures of a row on the command line: `cfg 2: right 0.93`,
    `right 0.93 ± 0.02` over several seeds."""
    told = dict(result["metrics"])
    if "truncated" in result:
        told[f"truncated at {result['max_tokens']} tokens"] = result["truncated"]
    said = []
    for metric, found in told.items():
        text = f"{metric} {shown(round(found['value'], 4))}"
        if "runs" in found:
            text += f" ± {shown(round(found['runs']['deviation'], 4))}"
        said.append(text)
    return f"{row}: {', '.join(said)}"


def _ranked(item: Item, scores_K: np.ndarray) -> Answer:
    scores_K = scores_K[: len(item.options)]
    return Answer(text=item.options[int(scores_K.argmax())], scores_K=scores_K)


def _figures(measured: dict[str, Measured]) -> dict[str, Any]:
    return {name: asdict(value) for name, value in measured.items()}
