"""A run's own evaluation: its model is asked by the protocols of `evaluations`,
its parts are measured."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.api import CM3Leon
from cm3leon.config import Component
from cm3leon.evaluate import (
    Evaluation,
    Row,
    bank_identity,
    figures_line,
    own_corpus,
    ranker_identity,
)
from cm3leon.evaluation.config import EvaluationConfig
from cm3leon.evaluation.metrics import codebook_use, proportion, psnr
from cm3leon.evaluation.protocols.corpus import UNKNOWN, OwnCorpus
from cm3leon.evaluation.report.answers import AnsweredItem
from cm3leon.experiment import row_name
from cm3leon.io import sha256, write_json
from cm3leon.models.serving import keep_weights
from cm3leon.registry import PROTOCOLS
from cm3leon.stages.inputs import recorded
from cm3leon.stages.neighbours import STRATEGY
from cm3leon.stages.run_folder import RunFolder
from cm3leon.stages.stage import Stage
from cm3leon.training.device import uses_bf16
from cm3leon.types import UserError, refuse

RESULTS = "results.json"
ANSWERS = "answers"
"""Folder of the answers, beside the stages' folders: they are kept when more is asked."""


def make_evaluation(run: RunFolder, folder: Path) -> None:
    """Ask everything that has no answer yet, measure, and write all figures to results.json."""
    if uses_bf16(run.device, run.experiment.training.precision):
        keep_weights(run.model, "bf16")  # autocast would convert them again for every token

    evaluator = Evaluator(run)
    found: dict[str, Any] = {}
    for name in run.experiment.evaluations:
        found[name] = evaluator.measured(name, found)
    write_json(
        folder / RESULTS,
        {
            "documents": evaluator.documents(),
            "judge": evaluator.judge_figures(),
            "reconstruction": evaluator.reconstruction(),
            "retriever": evaluator.retriever_figures(),
            "evaluations": found,
        },
    )


class Evaluator:
    """The run's own model and corpus, asked by one evaluation after the other."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.corpus: OwnCorpus = own_corpus(run)
        labels = []
        for label in run.corpus.labels:
            labels.append(UNKNOWN if label is None else label)
        self.labels_M = np.array(labels)
        self._model: CM3Leon | None = None

    def measured(self, name: str, before: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The figures of each row of an evaluation, after making missing answers.

        Args:
            before: the figures of the evaluations above it.
        """
        evaluation = self.evaluation(name)
        results = []
        for row in self.rows(name, before):
            evaluation.answer(row, range(evaluation.shards(row)))
            result = evaluation.measure(row)
            print(f"      {name} | {figures_line(row.name, result)}", flush=True)
            results.append({"row": row.name, "model": "", "point": row.point, **result})
        return results

    def shown(self, name: str, before: Mapping[str, Any]) -> list[list[AnsweredItem]]:
        """Some of the answers of each row, made again if their files are gone."""
        evaluation, found = self.evaluation(name), []
        for row in self.rows(name, before):
            evaluation.answer(row, range(evaluation.shards(row)))
            found.append(evaluation.shown(row))
        return found

    def evaluation(self, name: str) -> Evaluation:
        """The protocol of an evaluation, asked of the run's own model."""
        if self._model is None:
            asked = self.run.experiment.training.precision
            self._model = CM3Leon(self.run, precision="bf16" if asked == "float8" else asked)
        protocol = self.run.experiment.evaluations[name].protocol
        return Evaluation(protocol, self.run.folder / ANSWERS, (self._model, self.corpus))

    def lowest_is_best(self, name: str) -> Collection[str]:
        """The figures of an evaluation of which the lowest is best."""
        return PROTOCOLS.get(self.run.experiment.evaluations[name].protocol.name).lowest_is_best

    def rows(self, name: str, before: Mapping[str, Any]) -> list[Row]:
        """The rows of an evaluation: the run's model under each combination of swept values."""
        best: Mapping[str, Any] = {}
        best_of = self.run.experiment.evaluations[name].best_of
        if best_of is not None:
            best = best_row(before[best_of], self.lowest_is_best(best_of))["point"]

        rows = []
        for point, setting in self.run.experiment.points_of(name, best):
            rows.append(Row(row_name(name, point), "", self.run.folder, setting, point))
        return rows

    def documents(self) -> dict[str, int]:
        """Number of documents in each split, and of items that were skipped."""
        counts = {}
        for split in ("train", "validation", "held_out"):
            counts[split] = len(self.run.corpus.rows(split))
        skipped = (self.run.folder / "documents" / "skipped.jsonl").read_text().splitlines()
        return {**counts, "skipped": len(skipped)}

    def judge_figures(self) -> dict[str, Any] | None:
        """The judge's accuracy on real held-out images, and on their reconstructions."""
        if self.corpus.judge is None:
            return None
        rows = self.run.corpus.rows("held_out")
        real_BHWC = self.run.corpus.images_BHWC[rows]
        rebuilt_BHWC = self.run.image_tokenizer.decode(self.run.codes_MN[rows])
        labels_B = self.labels_M[rows]
        return {
            "real": asdict(proportion(self.corpus.judge.read(real_BHWC) == labels_B)),
            "reconstructed": asdict(proportion(self.corpus.judge.read(rebuilt_BHWC) == labels_B)),
        }

    def reconstruction(self) -> dict[str, Any]:
        """PSNR in dB by split (the mean over images),
        and how the held-out images use the codebook."""
        images_BHWC, codes_MN = self.run.corpus.images_BHWC, self.run.codes_MN
        figures: dict[str, Any] = {}
        for split in ("train", "held_out"):
            rows = self.run.corpus.rows(split)
            figures[f"psnr_{split}"] = psnr(
                images_BHWC[rows], self.run.image_tokenizer.decode(codes_MN[rows])
            )
        use, perplexity = codebook_use(
            codes_MN[self.run.corpus.rows("held_out")], self.run.image_tokenizer.codebook_size
        )
        rows_B = self.run.corpus.rows("train")
        distinct = len(np.unique(codes_MN[rows_B], axis=0)) / len(rows_B)
        return {
            **figures,
            "codes_per_image": codes_MN.shape[1],
            "codebook_size": self.run.image_tokenizer.codebook_size,
            "codebook_use": use,
            "codebook_perplexity": perplexity,
            "distinct_training_images": distinct,
        }

    def retriever_figures(self) -> dict[str, Any]:
        """The strategy's verdicts on the training queries, and the class of the nearest document to
        each held-out image as a guess of its class."""
        figures = json.loads((self.run.folder / "neighbours" / STRATEGY).read_text())
        if self.corpus.judge is None:
            return figures
        rows = self.run.corpus.rows("held_out")
        queries = self.run.retriever.parts(None, self.run.corpus.images_BHWC[rows])
        nearest_B1 = self.run.bank.search(queries.image_BD, 1)
        found = [self.run.bank_document(row).label for row in nearest_B1[:, 0].tolist()]
        if None in found:
            return figures
        read_B = np.array(found)
        return {
            **figures,
            "nearest_neighbour_vote": asdict(proportion(read_B == self.labels_M[rows])),
        }


def best_row(
    rows: Sequence[Mapping[str, Any]], lowest_is_best: Collection[str] = ()
) -> Mapping[str, Any]:
    """The row with the best first figure, such as accuracy; of equal ones the first.

    Args:
        lowest_is_best: names of figures of which the lowest is best.
    """

    def goodness(row: Mapping[str, Any]) -> float:
        for name, found in row["metrics"].items():
            return -found["value"] if name in lowest_is_best else found["value"]
        return -math.inf

    return max(rows, key=goodness)


def check_protocol(where: str, protocol: Component) -> None:
    """Raise UserError, which names the settings, if files of a protocol are missing."""
    mistakes: list[str] = []
    for key, value in vars(protocol.config).items():
        if isinstance(value, Path) and not value.exists():
            mistakes.append(f"{where}.{key} is {value}, which does not exist; give another path")
    try:
        PROTOCOLS.build(protocol).fingerprint()
    except UserError as error:
        mistakes.append(f"{where}: {error}")
    refuse(mistakes)


def named_runs(evaluation: EvaluationConfig) -> Iterator[tuple[str, Path, str]]:
    """The other runs that the setting of a run's own evaluation names: the key, the run folder, and
    the stage that the run must have finished."""
    for key, stage in (("bank", "index"), ("ranker", "retriever")):
        for folder in (evaluation.setting.get(key), *evaluation.sweep.get(key, ())):
            if folder is not None:
                yield key, Path(folder), stage


def check_named_runs(run: RunFolder, name: str) -> None:
    """Raise UserError if a run that an evaluation names is missing."""
    for key, folder, _ in named_runs(run.experiment.evaluations[name]):
        # The run's own bank and ranker are made before they are asked for.
        if folder.absolute() == run.folder.absolute():
            continue
        identity = bank_identity if key == "bank" else ranker_identity
        try:
            identity(folder)
        except UserError as error:
            raise UserError(f"evaluations.{name}: {error}") from error


SECTIONS = ("evaluations", "decoder", "text_decoder", "seed")


def evaluation_inputs(run: RunFolder) -> dict[str, Any]:
    """What the figures depend on besides the model: how it is asked,
    and what the protocols hold."""
    protocols = {}
    for name, evaluation in run.experiment.evaluations.items():
        protocols[name] = PROTOCOLS.build(evaluation.protocol).fingerprint()
    inputs = {**run.depends_on(*SECTIONS), "protocols": protocols}

    # Of a memory bank the content counts, not its folder.
    banks = {}
    for name, asked in inputs["evaluations"].items():
        given = [asked["setting"].pop("bank", None), *asked["sweep"].pop("bank", [])]
        if any(given):
            banks[name] = [bank and bank_identity(Path(bank)) for bank in given]
    if banks:
        inputs["banks"] = banks
    if run.added_tokens_file.is_file():
        inputs["added"] = sha256(run.added_tokens_file)
    return inputs


STAGE = Stage(
    "evaluation",
    version=7,
    inputs=evaluation_inputs,
    make=make_evaluation,
    needs=("pretraining",),
    settings=recorded(*SECTIONS),
    results=(RESULTS,),
)
