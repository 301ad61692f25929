"""Evaluation: every setting read by the judge and measured, written as one file of figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.evaluation.generated import UNKNOWN, Generated
from cm3leon.evaluation.judge import Judge
from cm3leon.evaluation.metrics import Measured, codebook_use, proportion, psnr
from cm3leon.io import write_json
from cm3leon.registry import METRICS, TASKS
from cm3leon.stages.artifacts import Run
from cm3leon.stages.generate import Generation, Setting, read_generations, settings
from cm3leon.stages.neighbours import STRATEGY
from cm3leon.stages.tokens import training_codes

RESULTS = "results.json"


def make_evaluation(run: Run, folder: Path) -> None:
    """Measures everything, and writes it as results.json."""
    evaluator = Evaluator(run)
    measured = [evaluator.setting(setting) for setting in settings(run)]
    write_json(
        folder / RESULTS,
        {
            "documents": evaluator.documents(),
            "judge": evaluator.judge_figures(),
            "reconstruction": evaluator.reconstruction(),
            "retriever": evaluator.retriever_figures(),
            "settings": measured,
            "chosen_cfg": chosen_cfg(measured),
        },
    )


class Evaluator:
    """What the figures of all settings share: the corpus as arrays, and the judge."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.labels_M = np.array(
            [UNKNOWN if label is None else label for label in run.corpus.labels]
        )
        self.training_rows = run.corpus.rows("train")
        self.metrics = {
            component.name: METRICS.build(component) for component in run.experiment.metrics
        }

    @cached_property
    def judge(self) -> Judge | None:
        """Trained on the training images only; None where documents have no known class."""
        labels_B = self.labels_M[self.training_rows]
        if (labels_B == UNKNOWN).any() or len(set(labels_B.tolist())) < 2:
            return None
        return Judge(self.run.corpus.images_BHWC[self.training_rows], labels_B)

    @cached_property
    def training_MN(self) -> np.ndarray:
        """Image codes of the training documents of the sample, in all their versions."""
        return training_codes(self.run)

    def read_images(self, images_BHWC: np.ndarray) -> np.ndarray:
        """The class that the judge reads in each image, -1 without a judge."""
        return (
            np.full(len(images_BHWC), UNKNOWN)
            if self.judge is None
            else self.judge.read(images_BHWC)
        )

    def documents(self) -> dict[str, int]:
        """How many documents each split has, and how many items were skipped."""
        counts = {
            split: len(self.run.corpus.rows(split)) for split in ("train", "validation", "held_out")
        }
        skipped = (self.run.folder / "documents" / "skipped.jsonl").read_text().splitlines()
        return {**counts, "skipped": len(skipped)}

    def judge_figures(self) -> dict[str, Any] | None:
        """The judge's own accuracy on real held-out images, and on their reconstructions."""
        if self.judge is None:
            return None
        rows = self.run.corpus.rows("held_out")
        real_BHWC = self.run.corpus.images_BHWC[rows]
        rebuilt_BHWC = self.run.image_tokenizer.decode(self.run.codes_MN[rows])
        labels_B = self.labels_M[rows]
        return {
            "real": asdict(proportion(self.judge.read(real_BHWC) == labels_B)),
            "reconstructed": asdict(proportion(self.judge.read(rebuilt_BHWC) == labels_B)),
        }

    def reconstruction(self) -> dict[str, Any]:
        """PSNR in dB by split (the mean over images), and how the held-out images use the codebook."""
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
        distinct = len(np.unique(codes_MN[self.training_rows], axis=0)) / len(self.training_rows)
        return {
            **figures,
            "codes_per_image": codes_MN.shape[1],
            "codebook_size": self.run.image_tokenizer.codebook_size,
            "codebook_use": use,
            "codebook_perplexity": perplexity,
            "distinct_training_images": distinct,
        }

    def retriever_figures(self) -> dict[str, Any]:
        """The strategy's verdicts on the training queries, and the vote of retrieved documents on held-out images."""
        figures = json.loads((self.run.folder / "neighbours" / STRATEGY).read_text())
        if self.judge is None:
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

    def setting(self, setting: Setting) -> dict[str, Any]:
        """All metrics of a setting that apply to it."""
        generated = self.generated(setting)
        measured = {name: metric(generated) for name, metric in self.metrics.items()}
        generations = read_generations(self.run.folder / "generation", setting)
        if setting.documents:
            measured["all_documents"] = with_all_documents(setting, generations)
        if TASKS.get(setting.task).answers_in == "text":
            measured["truncated"] = truncated(generations)
        return {
            **asdict(setting),
            "n": len(generated.codes_BN),
            "metrics": {
                name: asdict(value) for name, value in measured.items() if value is not None
            },
        }

    def generated(self, setting: Setting) -> Generated:
        """The generations of a setting as the arrays that metrics look at."""
        run = self.run
        generations = read_generations(run.folder / "generation", setting)
        rows = [generation.row for generation in generations]
        codes_BN = np.array([generation.codes for generation in generations])
        texts = [generation.caption for generation in generations]
        answers_in = TASKS.get(setting.task).answers_in
        if answers_in == "image":
            images_BHWC = run.image_tokenizer.decode(codes_BN)
            read_B = self.read_images(images_BHWC)
        else:
            images_BHWC = run.corpus.images_BHWC[rows]
            named = [run.source.class_in(text) for text in texts]
            read_B = np.array([UNKNOWN if label is None else label for label in named])
        parts = run.retriever.parts(texts, images_BHWC)
        return Generated(
            modality=answers_in,
            asked_B=self.labels_M[rows],
            read_B=read_B,
            codes_BN=codes_BN,
            texts=texts,
            given_texts=[run.corpus.captions[row] for row in rows],
            training_MN=self.training_MN,
            retrieved=[self._codes(generation.retrieved) for generation in generations],
            clip_B=(parts.text_BD * parts.image_BD).sum(axis=1)
            if run.retriever.encoder.joint
            else None,
            exact_B=self._given_is_kept(setting, generations),
        )

    def _codes(self, rows: list[int]) -> np.ndarray:
        """Image codes (K, N) of documents of the bank, without those that have no image."""
        documents = [self.run.bank_document(row) for row in rows]
        return np.array(
            [self.run.tokenizer.codes(d) for d in documents if d.segment("image") is not None]
        )

    def _given_is_kept(self, setting: Setting, generations: list[Generation]) -> np.ndarray:
        """Whether each completed document, as it was written to the file, has what the prompt gave."""
        component = next(c for c in self.run.experiment.tasks if c.name == setting.task)
        task = TASKS.build(component, vocab=self.run.vocab, image_codes=self.run.codes_MN.shape[1])
        kept = []
        for generation in generations:
            original = self.run.token_documents[generation.row]
            completed = self.run.tokenizer.token_document(
                original.id, generation.caption, np.array(generation.codes)
            )
            kept.append(task.keeps_given(original, completed))
        return np.array(kept)


def with_all_documents(setting: Setting, generations: Sequence[Generation]) -> Measured:
    """Share of the prompts that had as many retrieved documents as the setting asks for.

    The others have fewer: there was no room for more, or the retriever's rules left no more.
    """
    return proportion(
        np.array([len(generation.retrieved) >= setting.documents for generation in generations])
    )


def truncated(generations: Sequence[Generation]) -> Measured:
    """Share of the texts that were stopped by their length before they ended."""
    return proportion(np.array([generation.truncated for generation in generations]))


def chosen_cfg(measured: list[dict[str, Any]]) -> float | None:
    """The guidance weight with the best validation accuracy (CLIP score where classes are unknown), of text to image.

    Ties go to the smaller weight.
    """
    candidates = [
        entry
        for entry in measured
        if entry["split"] == "validation"
        and entry["task"] == "text_to_image"
        and entry["cfg"] is not None
    ]
    by = "accuracy" if all("accuracy" in entry["metrics"] for entry in candidates) else "clip_score"
    if not candidates or not all(by in entry["metrics"] for entry in candidates):
        return None
    return max(candidates, key=lambda entry: (entry["metrics"][by]["value"], -entry["cfg"]))["cfg"]
