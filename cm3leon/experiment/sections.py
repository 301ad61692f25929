"""The sections of an experiment, and how they go together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cm3leon.config import (
    Component,
    Location,
    NoEffect,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seed,
    choices,
    to_mapping,
)
from cm3leon.data.augment import AugmentConfig
from cm3leon.evaluation.config import Aim, AskConfig, EvaluationConfig, named, with_values
from cm3leon.objectives.packing import PackingConfig
from cm3leon.registry import (
    DECODERS,
    IMAGE_TOKENIZERS,
    LAUNCHERS,
    LOGGERS,
    MODELS,
    OBJECTIVES,
    PROTOCOLS,
    RETRIEVERS,
    SOURCES,
)
from cm3leon.retrievers.index import IndexConfig
from cm3leon.tokenizers.text import TextTokenizerConfig
from cm3leon.training.config import DecoderTrainingConfig, TrainingConfig
from cm3leon.types import Notice, UserError


@dataclass(kw_only=True)
class SplitConfig:
    """How documents are divided; the rest is for training, and is the memory bank."""

    validation: Probability = 0.1
    """Share of the documents that settings are chosen on."""
    held_out: Probability = 0.2
    """Share of the documents that results are reported on."""


@dataclass(kw_only=True)
class ShardsConfig:
    """How the corpus is tokenised, embedded and given its neighbours: in shards,
    one for each part of the source.

    A sample of it trains the tokenizers and the retriever's encoder, and is what results are
    reported on; of a small corpus that is all of it.
    """

    sample: PositiveInt = 10_000
    """Documents of that sample, taken from parts all over the corpus."""
    tokenizer_images: Literal["sample", "corpus"] = "sample"
    """What the image tokenizer is trained on: the images of the sample, cut to their centre, or
    those of the whole corpus, read as they come and cut and mirrored at random."""
    tokenizers: Path | None = None
    """Run folder whose tokenizers, and encoder if it has one, are used as they are;
    None trains them on the sample."""
    bank: Path | None = None
    """Run folder whose documents are the memory bank; None makes one of this corpus."""
    mix: Annotated[dict[str, PositiveFloat], Location()] = field(default_factory=dict)
    """Run folders with more training documents, each with the share it is to have beside this
    corpus's 1.0; none is repeated more than 3 times in an epoch nor cut below 0.3 of it."""
    workers: PositiveInt = 1
    """Processes on this machine that make shards, spread over its GPUs; on a cluster, array jobs do
    (see the command part)."""
    decoded_gb: NonNegativeFloat = 20.0
    """Gigabytes of the run's folder for images as the stage tokens decoded them, until their
    neighbours are found, so that each is decoded once;
    parts that have no room there are decoded again. 0 keeps none."""


@dataclass(kw_only=True)
class ReconstructionConfig:
    """What is measured of reconstructions besides PSNR, SSIM and the use of the codes."""

    perceptual_file: Path | None = None
    """Weights of torchvision's VGG16 (vgg16-397923af.pth), for LPIPS; None leaves it out."""
    inception_file: Path | None = None
    """Weights of pytorch-fid's Inception (pt_inception-2015-12-05-6726825d.pth), for rFID;
    None leaves it out."""


@dataclass(kw_only=True)
class RunEvaluation(EvaluationConfig):
    """A protocol that the run's own model is asked by."""

    best_of: str | None = None
    """Name of an evaluation above; of what it sweeps, the values of its best row are taken: the one
    with the best of the figures that stand first, which is the highest,
    or the lowest of a distance."""

    def check(self) -> None:
        super().check()
        # The file that the settings are recorded in may be read from elsewhere.
        if isinstance(bank := self.setting.get("bank"), str | Path):
            self.setting = {**self.setting, "bank": str(Path(bank).expanduser().absolute())}


@dataclass(kw_only=True)
class Experiment:
    """Everything an experiment fixes; `config.to_mapping` gives the resolved file kept beside the
    run."""

    seed: Seed = 0
    """Seed of every random draw."""

    plugins: list[str] = field(default_factory=list)
    """Paths of plugins (.py files or package folders), relative to the file that names them."""

    data: Annotated[Component, SOURCES]
    """Where the documents come from."""

    split: SplitConfig = field(default_factory=SplitConfig)
    """How documents are divided into training, validation and held-out."""

    shards: ShardsConfig = field(default_factory=ShardsConfig)
    """The shards of the corpus, its sample, and other runs that it is used with."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Varied versions of the training images, for small corpora."""

    text_tokenizer: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    """Byte-level BPE, trained on the captions of the training documents or on `text_data`."""

    text_data: Annotated[Component, SOURCES] | None = None
    """Corpus whose training documents the text tokenizer is trained on;
    null = the captions of this experiment."""

    image_tokenizer: Annotated[Component, IMAGE_TOKENIZERS]
    """Turns images into codes and back."""

    image_tokenizer_training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it is trained on the training images, if it has to be."""

    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """How it is measured on the held-out images."""

    sentinels: PositiveInt = 512
    """Mask tokens of the vocabulary."""

    retriever: Annotated[Component, RETRIEVERS]
    """Finds the documents that go before the query document."""

    index: IndexConfig = field(default_factory=IndexConfig)
    """How the memory bank is searched."""

    retriever_training: TrainingConfig | None = None
    """How its encoder is trained on the training pairs; None leaves it frozen as it was loaded. It
    is left out for a retriever that has nothing to train."""

    objective: Annotated[Component, OBJECTIVES]
    """What the model learns from a sample."""

    packing: PackingConfig = field(default_factory=PackingConfig)
    """How samples are packed into blocks."""

    model: Annotated[Component, MODELS]
    """The network from ids to logits."""

    training: DecoderTrainingConfig
    """Pretraining."""

    loggers: list[Annotated[Component, LOGGERS]] = field(
        default_factory=lambda: [LOGGERS.check("tensorboard")]
    )
    """Where figures, images and tables of the trainings go,
    beside the lines of JSON in the run's folder."""

    launcher: Annotated[Component, LAUNCHERS] = field(
        default_factory=lambda: LAUNCHERS.check("here")
    )
    """Where it runs, and what its jobs are given."""

    decoder: Annotated[Component, DECODERS]
    """How image tokens are drawn from logits."""

    text_decoder: Annotated[Component, DECODERS]
    """How text tokens are drawn from logits."""

    evaluations: dict[str, RunEvaluation] = field(default_factory=dict)
    """What the trained model is asked, by names for the report."""

    aims: Annotated[list[Aim], NoEffect("what the report compares figures with")] = field(
        default_factory=list
    )
    """Figures for the top of the report."""

    until: str | None = None
    """Stage after which a run of this experiment ends, if the command line names none;
    None = the last one."""

    def check(self) -> None:
        if self.retriever_training and not RETRIEVERS.get(self.retriever.name).trained:
            # So that retriever=lexical is enough for an experiment whose own retriever is trained.
            self.retriever_training = None
            warnings.warn(
                f"retriever_training is left out: the retriever {self.retriever.name} has nothing "
                "to train",
                Notice,
                stacklevel=2,
            )
        names = [logger.name for logger in self.loggers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(
                f"loggers: {', '.join(twice)} is named twice; each may stand there once"
            )
        self._check_aims(self._rows())

    def _rows(self) -> dict[str, list[str]]:
        """The names of the rows of each evaluation.
        Raises UserError for settings that do not go together."""
        points: dict[str, list[dict[str, Any]]] = {}
        for name, evaluation in self.evaluations.items():
            best: Mapping[str, Any] = {}
            if evaluation.best_of is not None:
                if evaluation.best_of not in points:
                    raise UserError(
                        f"evaluations.{name}.best_of is {evaluation.best_of}, which is no "
                        f"evaluation above; {choices(evaluation.best_of, points)}"
                    )
                # Any of its rows may turn out the best; all of them set the same keys.
                best = points[evaluation.best_of][0]
            points[name] = [point for point, _ in self.points_of(name, best)]
            left_out = [key for key in evaluation.sweep if key not in points[name][0]]
            if left_out:
                warnings.warn(
                    f"evaluations.{name}.sweep: {', '.join(left_out)} is left out, which the "
                    "experiment's own decoder does not have",
                    Notice,
                    stacklevel=2,
                )
        return {name: [row_name(name, point) for point in of] for name, of in points.items()}

    def points_of(
        self, name: str, best: Mapping[str, Any]
    ) -> list[tuple[dict[str, Any], AskConfig]]:
        """Each combination of what an evaluation sweeps, with the setting that it makes.

        Args:
            best: the values of the best row of the evaluation that `best_of` names.

        Raises:
            UserError: for a setting that is none.
        """
        evaluation = self.evaluations[name]
        setting, sweep = {"seed": self.seed, **evaluation.setting}, evaluation.sweep
        in_decoder = any(key.startswith("decoder.") for key in (*sweep, *best))
        if in_decoder and setting.get("decoder") is None:
            in_text = PROTOCOLS.build(evaluation.protocol).answers_in == "text"
            own = self.text_decoder if in_text else self.decoder
            setting["decoder"] = to_mapping(AskConfig(decoder=own))["decoder"]
            # So that decoder=greedy is enough for an experiment
            # whose evaluations set a weight of guidance.
            sweep = _without_others(sweep, own)
            lacking = best.keys() - _without_others(best, own).keys()
            if lacking:
                raise UserError(
                    f"evaluations.{name}.best_of is {evaluation.best_of}, whose best row sets "
                    f"{', '.join(lacking)}, which the decoder {own.name} does not have; give "
                    f"evaluations.{name}.setting.decoder one that has"
                )
        whole = replace(evaluation, setting=with_values(setting, best), sweep=sweep)
        return list(whole.points(f"evaluations.{name}.setting"))

    def _check_aims(self, rows: Mapping[str, Sequence[str]]) -> None:
        for aim in self.aims:
            if aim.evaluation not in rows:
                raise UserError(
                    f"aims: {aim.label}: evaluation is {aim.evaluation}; "
                    f"{choices(aim.evaluation, rows)}"
                )
            if aim.row not in rows[aim.evaluation]:
                raise UserError(
                    f"aims: {aim.label}: row is {aim.row}, which {aim.evaluation} has not; "
                    f"{choices(aim.row, rows[aim.evaluation])}"
                )


def _without_others(values: Mapping[str, Any], decoder: Component) -> dict[str, Any]:
    """The values without those of keys that other decoders have and this one has not."""
    own = {field.name for field in fields(decoder.config)}
    others = {
        field.name for name in DECODERS.names() for field in fields(DECODERS.config_class(name))
    }
    left_out = {f"decoder.{name}" for name in others - own}
    return {key: value for key, value in values.items() if key not in left_out}


def row_name(evaluation: str, point: Mapping[str, Any]) -> str:
    """The name of a row of a run's own evaluation: what is swept, or that of the evaluation."""
    return ", ".join(named(point)) or evaluation
