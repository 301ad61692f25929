"""The evaluation runner: rows (a model under a setting) answer a protocol's items and are scored.

A protocol is a list of items and a rule to score answers. The rows of a result share its items, and
each row has a folder of answers named by a hash of all that its answers depend on:

    answers/4f1c09ab77d2e310/       "digits, cfg 3", 300 items, 4 samples each
        setting.json                what the hash was taken of, for people
        00000.npz                   4 answers to each of items 0 to 127
        00001.npz                   items 128 to 255
        00002.npz                   items 256 to 299
        features-4-9d1e22c0/        features of the best of 4 images, where a metric needs them
        result-4.json               figures of the best of 4

A file is written when its answers are complete, so that a kill loses at most the answers of one
file, and a worker can make any files of a row (`answer`). Asking for 8 samples later adds 4 to each
file. `measure` scores a row when all of its files are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cm3leon.api import CM3Leon, UsedDocument
from cm3leon.config import Component, result_settings, to_mapping
from cm3leon.evaluate.asking import ItemAsker, check_others
from cm3leon.evaluate.best import (
    best_answers,
    drawn_images,
    images_of,
    rebuilt_truths,
    right_in_any,
)
from cm3leon.evaluate.figures import as_figures
from cm3leon.evaluate.files import add_answers, read_answers, sample_count, shard_file, write_arrays
from cm3leon.evaluate.own_corpus import own_corpus
from cm3leon.evaluate.row import Row, bank_identity, ranker_identity
from cm3leon.evaluation.metrics import proportion
from cm3leon.evaluation.protocols.base import Answer, Item, Protocol
from cm3leon.evaluation.protocols.corpus import CorpusTask, OwnCorpus
from cm3leon.evaluation.report.answers import AnsweredItem
from cm3leon.io import digest_of, read_json, write_json
from cm3leon.records import read_stage
from cm3leon.registry import PROTOCOLS
from cm3leon.stages.opening import open_run
from cm3leon.stages.run_folder import RunFolder
from cm3leon.training.device import best_device
from cm3leon.types import UserError

VERSION = 3
"""Raise it when the same setting starts to give other answers."""
SHARD = 128
"""Items of a file of answers."""
FEATURES = "features-{}-{}"
"""Folder of the features of the best images: filled in with the number of samples, and with a
digest of what computes the features."""
SHOWN = 12
"""Items whose answers are shown in a result."""
SEEDS = 65_536
"""Distance between the seeds of neighbouring items, and so the largest number of samples."""


class Evaluation:
    """The items of a protocol, asked of one model after the other.

    Args:
        folder: holds the answers of all rows.
        own: the model of the run whose own evaluation this is, while the run is being made, and
            what the model's run knows of its corpus; None: models are loaded from finished runs.
    """

    def __init__(
        self, protocol: Component, folder: Path, own: tuple[CM3Leon, OwnCorpus] | None = None
    ) -> None:
        self.component, self.folder = protocol, folder
        self.protocol: Protocol = PROTOCOLS.build(protocol)
        self.protocol.device = own[0].run.device if own else best_device()
        self.protocol.folder = folder
        self._own = own

        # What is expensive to read is kept until a row of another model asks for another.
        self._items: tuple[tuple[int, Path | None], list[Item]] | None = None
        self._sizes: dict[Path, int] = {}
        self._parts: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._levels: dict[Path, dict[str, Any]] = {}
        self._opened: tuple[tuple[Any, ...], CM3Leon] | None = None

    def items(self, row: Row) -> list[Item]:
        """The protocol's items, images in the size of the row's model;
        read again for a model of another size."""
        if row.folder not in self._sizes:
            self._sizes[row.folder] = self._run(row).image_tokenizer_shape.image_size
        size, of_run = self._sizes[row.folder], isinstance(self.protocol, CorpusTask)
        key = (size, row.folder if of_run else None)

        if self._items is None or self._items[0] != key:
            self._items = None  # frees its memory for the next items
            if isinstance(self.protocol, CorpusTask):
                corpus = self._own[1] if self._own else own_corpus(self._run(row))
                self.protocol.ask_about(corpus)
            self._items = (key, self.protocol.items_squared(size))
        items = self._items[1]
        if not items:
            raise UserError(
                f"protocol: {self.component.name} has no items to ask; check its source and limits"
            )
        return items

    def shards(self, row: Row) -> int:
        """Number of a row's files of answers."""
        return -(-len(self.items(row)) // SHARD)

    def answer(self, row: Row, numbers: Sequence[int]) -> None:
        """Make a row's files of answers with these numbers, where they are missing or have too few
        samples.

        Raises:
            UserError: for a folder that is not a finished run, or a setting that the model has no
                room for.
        """
        self._check(row)
        folder, samples = self.folder_of(row), row.setting.samples
        missing = []
        for number in numbers:
            if sample_count(shard_file(folder, number)) < samples:
                missing.append(number)
        if missing:
            self._make_missing(row, missing)

        # Features are computed by whoever draws the images. A row that has a result needs only
        # those of new answers.
        if self.protocol.scored_by:
            has_result = self._result_file(row).is_file()
            for number in missing if has_result else numbers:
                self._features(row, number)

    def _make_missing(self, row: Row, missing: Sequence[int]) -> None:
        if row.setting.shuffled and row.setting.documents:
            for number in missing:
                check_others(self._of_shard(row, number), f"file {number} of {row.name}")

        # The hash in the folder's name says nothing to people, so its text lies inside.
        folder, samples = self.folder_of(row), row.setting.samples
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "setting.json").is_file():
            write_json(folder / "setting.json", self.identity(row))

        model = self.model(row)
        if self.protocol.answers_in == "image" and samples > 1 and not model.has_clip:
            name = model.run.experiment.retriever.name
            raise UserError(
                f"setting.samples is {samples}, and the retriever {name} of {row.folder} has no "
                "CLIP to choose the best by; it must be 1, or setting.ranker must name a run whose "
                "retriever has one"
            )

        asker = ItemAsker(model, self.protocol, row.setting, self.max_tokens(row))

        # The bar counts answers, as the last file has fewer items than the others.
        asked = sum(len(self._of_shard(row, number)) for number in missing) * samples
        bar = tqdm(total=asked, desc=row.name, unit="answer", mininterval=2.0, dynamic_ncols=True)
        with bar as progress:
            for number in missing:
                self._make(asker, row, number)
                progress.update(len(self._of_shard(row, number)) * samples)

    def _result_file(self, row: Row) -> Path:
        return self.folder_of(row) / f"result-{row.setting.samples}.json"

    def measure(self, row: Row) -> dict[str, Any]:
        """The figures of a row whose answers are complete; where they are known, also the ceiling
        (the true answers as the tokenizer rebuilds them)
        and the chance level (answers to other items)."""
        done = self._result_file(row)
        if not done.is_file():
            write_json(done, self._result(row))
        return read_json(done, {"metrics": dict})

    def _result(self, row: Row) -> dict[str, Any]:
        items, held, answers = self.items(row), self._held(row), self.answers(row)
        result: dict[str, Any] = {
            "metrics": as_figures(self.protocol.score(items, answers)),
            "items": len(items),
            "seconds": sum(float(each["seconds"].sum()) for each in held),
            "notes": self.protocol.notes(items),
        }
        samples = row.setting.samples
        if self.protocol.answers_in == "image" and not self.protocol.scored_by and samples > 1:
            files = [(self._of_shard(row, number), each) for number, each in enumerate(held)]
            in_any = right_in_any(self.model(row), self.protocol, files, samples)
            result["metrics"] |= as_figures(in_any)

        # Answers that reached their largest length may have lost their end.
        if (max_tokens := self.max_tokens(row)) is not None:
            cut = proportion(np.array([answer.truncated for answer in answers]))
            result |= {"max_tokens": max_tokens, "truncated": asdict(cut)}

        # Files that an older version wrote do not say how many documents stood before each item.
        counts = [each["documents"] for each in held if "documents" in each]
        if row.setting.documents and len(counts) == len(held):
            counts_I = np.concatenate(counts)
            result["all_documents"] = asdict(proportion(counts_I >= row.setting.documents))

        if self.protocol.has_truth:
            result |= self._levels_of(row)
        return result

    def _levels_of(self, row: Row) -> dict[str, Any]:
        """The figures of the true answers, and of the true answers to other items; both are the
        same for all rows of a model."""
        if row.folder not in self._levels:
            items = self.items(row)
            truths = rebuilt_truths(self.model(row), self.protocol, items, SHARD)
            others = [*truths[1:], truths[0]]
            self._levels[row.folder] = {
                "ceiling": as_figures(self.protocol.score(items, truths)),
                "chance": as_figures(self.protocol.score(items, others)),
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
        """The best answer to each item of a shard as features, without decoding its image."""
        clip_In = read_answers(shard_file(self.folder_of(row), number))["clip"]
        best_I = clip_In[:, : row.setting.samples].max(axis=1)
        features_ID = self._features(row, number)
        answers = []
        for features_D, clip in zip(features_ID, best_I, strict=True):
            answers.append(Answer(features_D=features_D, clip=float(clip)))
        return answers

    def _features(self, row: Row, number: int) -> np.ndarray:
        """Features (items, D) of the best images of a shard, kept in a file beside the answers."""
        by = digest_of(self.protocol.scored_by)[:8]
        folder = self.folder_of(row) / FEATURES.format(row.setting.samples, by)
        file = shard_file(folder, number)
        if file.is_file():
            return read_answers(file)["features"]

        features_ID = self.protocol.features(images_of(self._answers_of(row, number)))
        folder.mkdir(exist_ok=True)
        write_arrays(file, {"features": features_ID})
        return features_ID

    def _answers_of(self, row: Row, number: int) -> list[Answer]:
        """The best answer to each item of a shard."""
        held = read_answers(shard_file(self.folder_of(row), number))
        items = self._of_shard(row, number)
        return best_answers(self.model(row), self.protocol, items, held, row.setting.samples)

    def shown(self, row: Row) -> list[AnsweredItem]:
        """Some items of each kind with the row's answers, all their samples,
        and the documents in their prompts."""
        items = self.items(row)

        # Every kind shows its first items, and all kinds together about `SHOWN`.
        of_kind: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            of_kind.setdefault(item.kind, []).append(index)
        chosen: list[int] = []
        for indices in of_kind.values():
            chosen += indices[: max(1, SHOWN // len(of_kind))]

        # Answers are decoded by whole files: only those that hold a chosen item.
        of_shard = {}
        for number in {index // SHARD for index in chosen}:
            of_shard[number] = self._answers_of(row, number)

        documents, examples = self._documents(row, chosen), []
        for number, index in enumerate(chosen):
            item, answer = items[index], of_shard[index // SHARD][index % SHARD]
            of_item = self.protocol.shown(item)
            examples.append(
                AnsweredItem(
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
        """All images that were drawn for an item, the best by CLIP first; [] for other answers."""
        if self.protocol.answers_in != "image":
            return []
        held = read_answers(shard_file(self.folder_of(row), index // SHARD))
        return drawn_images(self.model(row), held, index % SHARD, row.setting.samples)

    def _documents(self, row: Row, chosen: Sequence[int]) -> list[tuple[UsedDocument, ...]]:
        """The documents in the prompts of some items, which are retrieved once more."""
        if not row.setting.documents:
            return [() for _ in chosen]
        found: dict[int, Sequence[int]] = {}
        model = self.model(row)
        asker = ItemAsker(model, self.protocol, row.setting, self.max_tokens(row))
        for number in sorted({index // SHARD for index in chosen}):
            rows = asker.prompts(self._of_shard(row, number)).retrieved
            found.update(enumerate(rows, number * SHARD))
        return [model.used_documents(found[index]) for index in chosen]

    def folder_of(self, row: Row) -> Path:
        """The folder of a row's answers, named by a hash of all that they depend on except the
        number of samples."""
        identity = json.dumps(self.identity(row), sort_keys=True)
        return self.folder / digest_of(identity)[:16]

    def identity(self, row: Row) -> dict[str, Any]:
        """All that a row's answers depend on, except the number of samples."""
        # Settings younger than answers that are still valid are left out at their defaults, so
        # that those answers keep their hash.
        left_out = {"samples", "bank", "max_tokens"}
        for name in ("checkpoint", "shuffled", "ranker"):
            if not getattr(row.setting, name):
                left_out.add(name)
        setting = to_mapping(row.setting)
        if row.setting.decoder:
            setting["decoder"] = result_settings(row.setting.decoder)
        for name in left_out:
            del setting[name]

        # A run is known by what it holds, not by where it lies.
        if row.setting.ranker:
            setting["ranker"] = ranker_identity(row.setting.ranker)

        # Answers that were cut at another length are other answers, even if only the protocol
        # states the length.
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
        """Most tokens of an answer in text; None if answers are images,
        or candidates are ranked."""
        if self.protocol.answers_in == "image" or self.protocol.ranks:
            return None
        return row.setting.max_tokens or self.protocol.max_tokens

    def _parts_of(self, row: Row) -> dict[str, Any]:
        """What the answers depend on in the model's run: digests of its parts, and the settings of
        the run that stand in for what the row leaves out."""
        with_bank = row.setting.documents > 0 and row.setting.bank is None
        sections = []
        if row.setting.decoder is None:
            sections.append("text_decoder" if self.protocol.answers_in == "text" else "decoder")
        if row.setting.documents:
            sections.append("retriever")

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
        setting = row.setting
        key = (row.folder, setting.bank, setting.ranker, setting.checkpoint)
        if self._own and key == (self._own[0].run.folder, None, None, None):
            return self._own[0]
        if self._opened is None or self._opened[0] != key:
            self._opened = None  # frees its memory for the next model
            model = CM3Leon.load(
                row.folder, bank=setting.bank, ranker=setting.ranker, checkpoint=setting.checkpoint
            )
            self._opened = (key, model)
        return self._opened[1]

    def _of_shard(self, row: Row, number: int) -> list[Item]:
        return self.items(row)[number * SHARD : (number + 1) * SHARD]

    def _make(self, asker: ItemAsker, row: Row, number: int) -> None:
        """Draw the samples that a file of answers lacks, and add them to it."""
        begun, file = time.perf_counter(), shard_file(self.folder_of(row), number)
        items, setting = self._of_shard(row, number), row.setting

        # A sample's seed follows from its item and its index, never from which file or worker.
        first = setting.seed + number * SHARD
        seeds = [(first + index) * SEEDS for index in range(len(items))]
        samples = range(sample_count(file), setting.samples)

        # If the file is gone, so are the answers that any features were computed of.
        if not samples.start:
            for kept in self.folder_of(row).glob(FEATURES.format("*", "*")):
                shard_file(kept, number).unlink(missing_ok=True)

        made = asker.answers(asker.prompts(items), samples, seeds)
        add_answers(file, made, time.perf_counter() - begun)

    def _held(self, row: Row) -> list[dict[str, np.ndarray]]:
        """All the row's files of answers."""
        folder = self.folder_of(row)
        return [read_answers(shard_file(folder, number)) for number in range(self.shards(row))]

    def _check(self, row: Row) -> None:
        """Raise UserError for a setting that does not fit the protocol."""
        if self.protocol.ranks and row.setting.samples > 1:
            raise UserError(
                f"setting.samples is {row.setting.samples}; it must be 1, as candidates are ranked "
                "once"
            )
        if row.setting.max_tokens is not None and self.max_tokens(row) is None:
            answers = "candidates that are ranked" if self.protocol.ranks else "images"
            raise UserError(
                f"setting.max_tokens is {row.setting.max_tokens}, and the answers of "
                f"{self.component.name} are {answers}; leave it out"
            )
