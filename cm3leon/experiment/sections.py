"""The sections of an experiment, and what they must agree on."""

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
    """How the corpus is tokenised, embedded and given its neighbours: in shards, one for each part
    of the source.

    A sample of the corpus trains the tokenizers and the retriever's encoder, and results are
    reported on it; for a small corpus, the sample is everything.
    """

    sample: PositiveInt = 10_000
    """Documents of the sample, taken from parts all over the corpus."""
    tokenizer_images: Literal["sample", "corpus"] = "sample"
    """Images that train the image tokenizer. sample: those of the sample, cropped at their centre.
    corpus: those of the whole corpus, as they are read, cropped and mirrored at random."""
    tokenizers: Path | None = None
    """Run folder whose tokenizers, and encoder if it has one, are used as they are; None: they are
    trained on the sample."""
    bank: Path | None = None
    """Run folder whose documents are the memory bank; None: one is made of this corpus."""
    mix: Annotated[dict[str, PositiveFloat], Location()] = field(default_factory=dict)
    """Run folders with more training documents, each with its share beside this corpus's 1.0. In an
    epoch none is repeated more than 3 times nor reduced below 0.3."""
    workers: PositiveInt = 1
    """Processes on this machine that make shards, spread over its GPUs; on a cluster, array jobs
    make them (see the command part)."""
    decoded_gb: NonNegativeFloat = 20.0
    """Gigabytes of the run folder for images that the stage tokens has decoded, kept until their
    neighbours are found, so that each is decoded once. Parts that do not fit are decoded again; 0
    keeps none."""


@dataclass(kw_only=True)
class ReconstructionConfig:
    """What is measured of reconstructions besides PSNR, SSIM and the use of the codes."""

    perceptual_file: Path | None = None
    """Weights of torchvision's VGG16 (vgg16-397923af.pth), for LPIPS; None: no LPIPS."""
    inception_file: Path | None = None
    """Weights of pytorch-fid's Inception (pt_inception-2015-12-05-6726825d.pth), for rFID; None:
    no rFID."""


@dataclass(kw_only=True)
class RunEvaluation(EvaluationConfig):
    """A protocol that the run's own model is asked."""

    best_of: str | None = None
    """Name of an evaluation above it, whose best row's swept values are used here. The best row has
    the highest value of the first figure, or the lowest if that is a distance."""

    def check(self) -> None:
        super().check()
        # The file that the settings are recorded in may be read from elsewhere.
        if isinstance(bank := self.setting.get("bank"), str | Path):
            self.setting = {**self.setting, "bank": str(Path(bank).expanduser().absolute())}


@dataclass(kw_only=True)
class Experiment:
    """Everything an experiment fixes; `config.to_mapping` gives the resolved file
    in the run folder."""

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
    """Corpus whose training documents train the text tokenizer; null:
    the captions of this experiment."""

    image_tokenizer: Annotated[Component, IMAGE_TOKENIZERS]
    """Turns images into codes and back."""

    image_tokenizer_training: TrainingConfig = field(default_factory=TrainingConfig)
    """How the image tokenizer is trained on the training images, if it has to be."""

    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """How the image tokenizer is measured on the held-out images."""

    sentinels: PositiveInt = 512
    """Mask tokens of the vocabulary."""

    retriever: Annotated[Component, RETRIEVERS]
    """Finds the documents that go before the query document."""

    index: IndexConfig = field(default_factory=IndexConfig)
    """How the memory bank is searched."""

    retriever_training: TrainingConfig | None = None
    """How the retriever's encoder is trained on the training pairs; None: it stays as it was
    loaded. It is ignored for a retriever with nothing to train."""

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
    besides the JSON lines in the run folder."""

    launcher: Annotated[Component, LAUNCHERS] = field(
        default_factory=lambda: LAUNCHERS.check("here")
    )
    """Starts the experiment's jobs."""

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
    """Last stage that a run of this experiment makes, unless the command line names one; None: the
    last stage of all."""

    def check(self) -> None:
        if self.retriever_training and not RETRIEVERS.get(self.retriever.name).trained:
            # retriever=lexical must be enough for an experiment whose own retriever is trained.
            self.retriever_training = None
            warnings.warn(
                f"retriever_training is left out: the retriever {self.retriever.name} has nothing "
                "to train",
                Notice,
                stacklevel=2,
            )

        names = [logger.name for logger in self.loggers]
        twice = set()
        for name in names:
            if names.count(name) > 1:
                twice.add(name)
        if twice:
            raise UserError(
                f"loggers named twice: {', '.join(sorted(twice))}; name each logger once"
            )
        self._check_aims(self._rows())

    def _rows(self) -> dict[str, list[str]]:
        """The names of the rows of each evaluation.

        Raises:
            UserError: for settings that do not go together.
        """
        points: dict[str, list[dict[str, Any]]] = {}
        for name, evaluation in self.evaluations.items():
            best: Mapping[str, Any] = {}
            if evaluation.best_of is not None:
                if evaluation.best_of not in points:
                    raise UserError(
                        f"evaluations.{name}.best_of is {evaluation.best_of}, which is not an "
                        f"evaluation before it; {choices(evaluation.best_of, points)}"
                    )
                # Which row is the best is not known yet, but all of them set the same keys.
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

        rows = {}
        for name, of in points.items():
            rows[name] = [row_name(name, point) for point in of]
        return rows

    def points_of(
        self, name: str, best: Mapping[str, Any]
    ) -> list[tuple[dict[str, Any], AskConfig]]:
        """Each combination of an evaluation's swept values, with its setting.

        Args:
            best: values of the best row of the evaluation that `best_of` names.

        Raises:
            UserError: for an invalid setting.
        """
        evaluation = self.evaluations[name]
        setting, sweep = {"seed": self.seed, **evaluation.setting}, evaluation.sweep

        # Keys such as decoder.cfg change the experiment's decoder unless the setting has its own.
        in_decoder = any(key.startswith("decoder.") for key in (*sweep, *best))
        if in_decoder and setting.get("decoder") is None:
            in_text = PROTOCOLS.build(evaluation.protocol).answers_in == "text"
            own = self.text_decoder if in_text else self.decoder
            setting["decoder"] = to_mapping(AskConfig(decoder=own))["decoder"]

            # decoder=greedy must be enough for an experiment whose evaluations sweep guidance.
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
                    f"aims: {aim.label}: evaluation is {aim.evaluation}, which is not known; "
                    f"{choices(aim.evaluation, rows)}"
                )
            if aim.row not in rows[aim.evaluation]:
                raise UserError(
                    f"aims: {aim.label}: row is {aim.row}, which {aim.evaluation} does not have; "
                    f"{choices(aim.row, rows[aim.evaluation])}"
                )


def _without_others(values: Mapping[str, Any], decoder: Component) -> dict[str, Any]:
    """The values without keys that other decoders have and this one has not."""
    own = {field.name for field in fields(decoder.config)}
    left_out = set()
    for name in DECODERS.names():
        for field_ in fields(DECODERS.config_class(name)):
            if field_.name not in own:
                left_out.add(f"decoder.{field_.name}")
    return {key: value for key, value in values.items() if key not in left_out}


def row_name(evaluation: str, point: Mapping[str, Any]) -> str:
    """The name of a row of a run's own evaluation: its swept values, or the evaluation's name."""
    return ", ".join(named(point)) or evaluation
