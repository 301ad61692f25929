"""Experiments: found by name or path, overridden, and checked section by section."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cm3leon.config import (
    SHIPPED,
    Component,
    Location,
    NoEffect,
    Override,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seed,
    apply_overrides,
    choices,
    component_sections,
    from_mapping,
    load_yaml,
    parse_override,
    settled,
    split_key,
    to_mapping,
    typed_value,
)
from cm3leon.data.augment import AugmentConfig
from cm3leon.evaluation.config import Aim, AskConfig, EvaluationConfig, named, with_values
from cm3leon.objectives.packing import PackingConfig
from cm3leon.registry import (
    DECODERS,
    IMAGE_TOKENIZERS,
    LAUNCHERS,
    MODELS,
    OBJECTIVES,
    PROTOCOLS,
    RETRIEVERS,
    SOURCES,
    discover,
    is_known_plugin,
)
from cm3leon.retrievers.index import IndexConfig
from cm3leon.tokenizers.text import TextTokenizerConfig
from cm3leon.training.config import DecoderTrainingConfig, TrainingConfig
from cm3leon.types import Notice, UserError

EARLIER = ("tasks", "task_decoders", "generation", "metrics")
"""Sections of earlier versions, in place of which there is `evaluations`."""
SWEEP = "sweep"
"""Section of dotted keys and the values that they take in turn, which makes an experiment a sweep."""


@dataclass(kw_only=True)
class SplitConfig:
    """How documents are divided; the rest is for training, and is the memory bank."""

    validation: Probability = 0.1
    """Share of the documents that settings are chosen on."""
    held_out: Probability = 0.2
    """Share of the documents that results are reported on."""


@dataclass(kw_only=True)
class ShardsConfig:
    """How the corpus is tokenised, embedded and given its neighbours: in shards, one for each part of the source.

    A sample of it trains the tokenizers and the retriever's encoder, and is what results are reported on; of a small
    corpus that is all of it.
    """

    sample: PositiveInt = 10_000
    """Documents of that sample, taken from parts all over the corpus."""
    tokenizer_images: Literal["sample", "corpus"] = "sample"
    """What the image tokenizer is trained on: the images of the sample, cut to their centre, or those of the whole
    corpus, read as they come and cut and mirrored at random."""
    tokenizers: Path | None = None
    """Run folder whose tokenizers, and encoder if it has one, are used as they are; None trains them on the sample."""
    bank: Path | None = None
    """Run folder whose documents are the memory bank; None makes one of this corpus."""
    mix: Annotated[dict[str, PositiveFloat], Location()] = field(default_factory=dict)
    """Run folders with more training documents, each with the share it is to have beside this corpus's 1.0; none is
    repeated more than 3 times in an epoch nor cut below 0.3 of it."""
    workers: PositiveInt = 1
    """Processes on this machine that make shards; on a cluster, array jobs do (see the command part)."""


@dataclass(kw_only=True)
class ReconstructionConfig:
    """What is measured of reconstructions besides PSNR, SSIM and the use of the codes."""

    perceptual_file: Path | None = None
    """Weights of torchvision's VGG16 (vgg16-397923af.pth), for LPIPS; None leaves it out."""
    inception_file: Path | None = None
    """Weights of pytorch-fid's Inception (pt_inception-2015-12-05-6726825d.pth), for rFID; None leaves it out."""


@dataclass(kw_only=True)
class RunEvaluation(EvaluationConfig):
    """A protocol that the run's own model is asked by."""

    best_of: str | None = None
    """Name of an evaluation above; of what it sweeps, the values of its best row are taken: the one with the highest
    of the figures that stand first."""


@dataclass(kw_only=True)
class Experiment:
    """Everything an experiment fixes; `config.to_mapping` gives the resolved file kept beside the run."""

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
    """Corpus whose training documents the text tokenizer is trained on; null = the captions of this experiment."""

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
    """How its encoder is trained on the training pairs; None leaves it frozen as it was loaded. It is left out for a
    retriever that has nothing to train."""

    objective: Annotated[Component, OBJECTIVES]
    """What the model learns from a sample."""

    packing: PackingConfig = field(default_factory=PackingConfig)
    """How samples are packed into blocks."""

    model: Annotated[Component, MODELS]
    """The network from ids to logits."""

    training: DecoderTrainingConfig
    """Pretraining."""

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
    """Stage after which a run of this experiment ends, if the command line names none; None = the last one."""

    def check(self) -> None:
        if self.retriever_training and not RETRIEVERS.get(self.retriever.name).trained:
            # So that retriever=lexical is enough for an experiment whose own retriever is trained.
            self.retriever_training = None
            warnings.warn(
                f"retriever_training is left out: the retriever {self.retriever.name} has nothing to train",
                Notice,
                stacklevel=2,
            )
        self._check_aims(self._rows())

    def _rows(self) -> dict[str, list[str]]:
        """The names of the rows of each evaluation. Raises UserError for settings that do not go together."""
        points: dict[str, list[dict[str, Any]]] = {}
        for name, evaluation in self.evaluations.items():
            best: Mapping[str, Any] = {}
            if evaluation.best_of is not None:
                if evaluation.best_of not in points:
                    raise UserError(
                        f"evaluations.{name}.best_of is {evaluation.best_of}, which is no evaluation above; "
                        f"{choices(evaluation.best_of, points)}"
                    )
                # Any of its rows may turn out the best; all of them set the same keys.
                best = points[evaluation.best_of][0]
            points[name] = [point for point, _ in self.points_of(name, best)]
            left_out = [key for key in evaluation.sweep if key not in points[name][0]]
            if left_out:
                warnings.warn(
                    f"evaluations.{name}.sweep: {', '.join(left_out)} is left out, which the experiment's own decoder "
                    "does not have",
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
            # So that decoder=greedy is enough for an experiment whose evaluations set a weight of guidance.
            sweep, best = _without_others(sweep, own), _without_others(best, own)
        whole = replace(evaluation, setting=with_values(setting, best), sweep=sweep)
        return list(whole.points(f"evaluations.{name}.setting"))

    def _check_aims(self, rows: Mapping[str, Sequence[str]]) -> None:
        for aim in self.aims:
            if aim.evaluation not in rows:
                raise UserError(
                    f"aims: {aim.label}: evaluation is {aim.evaluation}; {choices(aim.evaluation, rows)}"
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


@dataclass(kw_only=True)
class Entry:
    """An experiment as experiments.yaml lists it."""

    file: Path
    """YAML file of the experiment, relative to experiments.yaml."""

    cost: str
    """Hardware and time it takes, in one line."""

    expect: str
    """The numbers to expect, in one line."""

    overrides: dict[str, Any] = field(default_factory=dict)
    """Dotted keys and the values they replace in the file."""


def list_experiments(shipped: Path = SHIPPED) -> dict[str, Entry]:
    """The entries of experiments.yaml by name.

    Raises:
        UserError: for a broken experiments.yaml.
    """
    entries = load_yaml(shipped / "experiments.yaml")
    return {
        name: from_mapping(Entry, entry, f"experiments.yaml: {name}")
        for name, entry in entries.items()
    }


def experiment_name(name_or_path: str) -> str:
    """The name of an experiment: `digits` for both `digits` and `mine/digits.yaml`."""
    return Path(name_or_path).stem if _is_path(name_or_path) else name_or_path


def load_experiment(
    name_or_path: str,
    overrides: Sequence[str] = (),
    shipped: Path = SHIPPED,
    *,
    settings: Mapping[str, Any] | None = None,
    trusted_plugins: Sequence[str | Path] | None = None,
    sections: Mapping[str, Any] | None = None,
    unfit: list[str] | None = None,
    earlier: bool = False,
) -> Experiment:
    """Finds an experiment, applies `key=value` overrides, loads its plugins, and checks it.

    `name_or_path` is a name in experiments.yaml or the path of a YAML file. The command line's overrides win over
    those of experiments.yaml, which win over the file. Among them, `overrides=smoke` stands for all the dotted keys in
    `experiments/overrides/smoke.yaml`, and `overrides=mine.yaml` for those of a file of one's own. `settings` are
    dotted keys with their values, for a caller that has no command line. `trusted_plugins` are all that may be loaded,
    see `load_plugins`; None trusts the file that is named. `sections` are whole ones that take the place of the file's.
    `earlier` leaves out what earlier versions asked of a model, for a run that one of them made.
    `unfit` is given what does not go together, in place of an error, by a caller that checks more (`stages/checks.py`).

    Raises:
        UserError: for an unknown experiment, one that is a sweep, a mistake in its file or the overrides, or a plugin
            that is not trusted.
        PluginError: for a plugin that fails to import.
    """
    mapping = load_mapping(
        name_or_path,
        overrides,
        shipped,
        settings=settings,
        trusted_plugins=trusted_plugins,
        sections=sections,
        earlier=earlier,
    )
    if SWEEP in mapping:
        raise UserError(
            f"experiment: {name_or_path} is a sweep, which only the command run takes; give that of one of its points"
        )
    return from_mapping(Experiment, mapping, unfit=unfit)


def load_mapping(
    name_or_path: str,
    overrides: Sequence[str] = (),
    shipped: Path = SHIPPED,
    *,
    settings: Mapping[str, Any] | None = None,
    trusted_plugins: Sequence[str | Path] | None = None,
    sections: Mapping[str, Any] | None = None,
    earlier: bool = False,
) -> dict[str, Any]:
    """What `load_experiment` checks: the sections as they are written, with those of a sweep, if it is one."""
    given = [(split_key(key), value) for key, value in (settings or {}).items()]
    _, mapping = load_listed(name_or_path, shipped, [*given, *_overrides(overrides, shipped)])
    if _is_study(mapping):
        raise UserError(
            f"experiment: {name_or_path} is a study of several runs; give the experiment of one of them"
        )
    mapping = with_absolute_plugins({**mapping, **(sections or {})}, Path.cwd())
    if earlier:
        mapping = {name: value for name, value in mapping.items() if name not in EARLIER}
    _refuse_earlier(name_or_path, mapping)
    if trusted_plugins is not None:
        mapping["plugins"] = load_plugins(
            mapping.get("plugins", []), trusted_plugins, f"{name_or_path}: plugins"
        )
    discover(mapping.get("plugins", []))
    # What a sweep's key takes is read by the type of that key, see `cm3leon.sweep`.
    swept = {SWEEP: mapping.pop(SWEEP)} if SWEEP in mapping else {}
    written = settled(Experiment, mapping)
    if written.get("shards", {}) is None:  # what earlier versions wrote where they had none
        del written["shards"]
    return {**written, **swept}


def typed_settings(
    name_or_path: str, settings: Mapping[str, Any], shipped: Path = SHIPPED
) -> dict[str, Any]:
    """Dotted keys of an experiment with their values, those typed on the command line read as the keys want them."""
    mapping = load_mapping(name_or_path, (), shipped, settings=settings)
    return {
        key: typed_value(Experiment, mapping, split_key(key), value)
        for key, value in settings.items()
    }


def load_plugins(named: Sequence[str], trusted: Sequence[str | Path], where: str) -> list[str]:
    """Load the trusted plugins, which are all that those named in somebody's file may be.

    A named plugin passes if it is among the trusted ones, has the file name of one (which takes its place: the run may
    come from another machine), lies in `plugins/`, or was loaded before in this process.

    Returns:
        The absolute paths of all.

    Raises:
        UserError: for a named plugin that is not trusted.
        PluginError: for a plugin that fails to import.
    """
    given = [str(Path(path).expanduser().resolve()) for path in trusted]
    replaced = {Path(path).name for path in given}
    others = [path for path in named if Path(path).name not in replaced]
    for path in others:
        if not is_known_plugin(Path(path)):
            raise UserError(
                f"{where} names {path}, whose code is not run unasked; if you trust it, add plugins={path}, "
                "or trust=true for every plugin named there"
            )
    discover(given)
    return [*others, *given]


def is_study(name_or_path: str, shipped: Path = SHIPPED) -> bool:
    """Whether an experiment is made of several runs, see `cm3leon.study`. Raises UserError where there is none."""
    file, _ = _find(name_or_path, shipped)
    return _is_study(load_yaml(file))


def _is_study(mapping: Mapping[str, Any]) -> bool:
    """Whether these are the sections of a study: it has runs, or evaluations of models without a corpus."""
    return "runs" in mapping or ("evaluations" in mapping and "data" not in mapping)


def _refuse_earlier(name_or_path: str, mapping: Mapping[str, Any]) -> None:
    """Raises UserError for sections of an earlier version, saying what to write in their place."""
    found = [section for section in EARLIER if section in mapping]
    if found:
        raise UserError(
            f"{name_or_path}: {', '.join(found)} of earlier versions are no sections any more; write what the model is "
            "asked as evaluations, for example evaluations={caption: {title: Captions, protocol: {name: corpus, "
            "task: caption}}} (docs/evaluation.md)"
        )


def is_sweep(name_or_path: str, overrides: Sequence[str] = (), shipped: Path = SHIPPED) -> bool:
    """Whether an experiment is run at several points, see `cm3leon.sweep`. Raises UserError where there is none."""
    file, listed = _find(name_or_path, shipped)
    sections = [key.partition(".")[0] for key in listed] + [
        path[0] for path, _ in _overrides(overrides, shipped)
    ]
    return SWEEP in sections or SWEEP in load_yaml(file)


def load_listed(
    name_or_path: str, shipped: Path, overrides: Sequence[Override]
) -> tuple[Path, dict[str, Any]]:
    """The file of an experiment, and what it says with the overrides of experiments.yaml, then with those given.

    Raises:
        UserError: for an unknown experiment, or overrides that lead nowhere.
    """
    file, listed = _find(name_or_path, shipped)
    sections = component_sections(Experiment)
    mapping = with_absolute_plugins(load_yaml(file), file.parent)
    mapping = apply_overrides(
        mapping, _of_sweep((split_key(key), value) for key, value in listed.items()), sections
    )
    mapping = with_absolute_plugins(mapping, shipped)
    return file, apply_overrides(mapping, _of_sweep(overrides), sections)


def _of_sweep(overrides: Iterable[Override]) -> Iterator[Override]:
    """The overrides with what is behind `sweep` in one piece: a dotted key of the experiment, which is a key there."""
    for path, value in overrides:
        yield (SWEEP, ".".join(path[1:])) if path[0] == SWEEP and len(path) > 1 else path, value


def _find(name_or_path: str, shipped: Path) -> tuple[Path, Mapping[str, Any]]:
    """The YAML file of an experiment, and its overrides in experiments.yaml."""
    if _is_path(name_or_path):
        return Path(name_or_path).expanduser(), {}
    entries = list_experiments(shipped)
    if name_or_path not in entries:
        raise UserError(
            f"experiment is {name_or_path}, which is not known; {choices(name_or_path, entries)}"
        )
    entry = entries[name_or_path]
    return shipped / entry.file, entry.overrides


def _overrides(words: Sequence[str], shipped: Path) -> Iterator[Override]:
    """The overrides of a command line, with those of the files that it names."""
    for word in words:
        key, _, value = word.partition("=")
        if key != "overrides":
            yield parse_override(word)
            continue
        names = sorted(file.stem for file in (shipped / "experiments" / "overrides").glob("*.yaml"))
        if not _is_path(value) and value not in names:
            raise UserError(
                f"overrides is {value}, which is not known; {choices(value, names)}, or a .yaml file"
            )
        file = (
            Path(value).expanduser()
            if _is_path(value)
            else shipped / "experiments" / "overrides" / f"{value}.yaml"
        )
        yield from ((split_key(name), setting) for name, setting in load_yaml(file).items())


def _is_path(name_or_path: str) -> bool:
    return name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path


def with_absolute_plugins(mapping: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The mapping with its plugins' paths made absolute, so that its resolved copy may lie anywhere."""
    if "plugins" not in mapping:
        return mapping
    plugins = from_mapping(_Plugins, {"plugins": mapping["plugins"]}).plugins
    return {
        **mapping,
        "plugins": [str((folder / Path(path).expanduser()).resolve()) for path in plugins],
    }


@dataclass(kw_only=True)
class _Plugins:
    """The one section that is read before the others can be checked."""

    plugins: list[str] = field(default_factory=list)
    """As in `Experiment`."""
