"""The words behind a command, read as its options, and options that several commands share.

For example, the words of `caption run=runs/digits image=seven.png decoder=cd_k decoder.k=3`:

    key=value words        run=runs/digits ... decoder.k=3
    nested mapping         {run: runs/digits, image: seven.png, decoder: {name: cd_k, k: 3}}
    checked options        Options(run=Path("runs/digits"), ..., decoder=Component("cd_k", ...))

Of a command that takes an experiment, words that are not its options are settings of the
experiment.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cm3leon.arguments import current_name
from cm3leon.commands import Command
from cm3leon.config import (
    Component,
    FieldDoc,
    PositiveInt,
    apply_overrides,
    component_sections,
    describe,
    from_mapping,
    key_of,
    parse_override,
)
from cm3leon.paths import check_folder, path_of
from cm3leon.registry import SOURCES, discover
from cm3leon.stages.trust import Opening, Trust
from cm3leon.types import Execution, Precision, UserError, Weights, refuse, sentences_of

PLACEHOLDERS = {"folder": "DIR", "file": "FILE", "name": "NAME", "number": "N"}
"""What help writes for the value of an option whose sentence has one of these words first."""


@dataclass(kw_only=True)
class ExperimentOptions:
    """Options of a command that takes an experiment and all of its settings."""

    experiment: str
    """An experiment, by a name that --list shows or as the path of a .yaml file."""

    overrides = tuple[str, ...]()
    """The words that are settings of the experiment; not an option itself."""


@dataclass(kw_only=True)
class ExperimentRunOptions(ExperimentOptions):
    """Options of a command that takes an experiment and the folder of its run."""

    run: Path | None = None
    """Run folder; null = runs/NAME, or runs/NAME-seeds with `seeds=N` of a single run. The same
    command with the same folder continues a run."""

    @property
    def folder(self) -> Path:
        """The run folder, given or by the experiment's name.

        Raises:
            UserError: for a path that cannot be a run folder, and an experiment that does not
                exist.
        """
        from cm3leon.experiment import experiment_name

        name = experiment_name(self.experiment)
        if self.is_study and self.is_single:
            name += "-seeds"
        folder = self.run or path_of(f"runs/{name}", "run")
        check_folder(folder, "run")
        if folder.resolve() == Path(folder.anchor or "/"):
            raise UserError(
                f"run is {folder}, the root of the file system; choose a folder, "
                "for example run=runs/digits"
            )
        return folder

    @property
    def is_study(self) -> bool:
        """Whether the experiment is a study of several runs, or becomes one by `seeds=N`."""
        from cm3leon.experiment import asks_for_seeds, is_study

        return is_study(self.experiment) or asks_for_seeds(self.overrides)

    @property
    def is_single(self) -> bool:
        """Whether the experiment is a single run, or a sweep of one."""
        from cm3leon.experiment import is_study

        return not is_study(self.experiment)


@dataclass(kw_only=True)
class RunOptions:
    """Options of a command about a run that was started."""

    run: Path
    """A run folder."""


@dataclass(kw_only=True)
class RedoOptions:
    """Options of a command that runs stages."""

    redo: str = ""
    """Names of finished stages to run again where their settings have changed, separated by commas;
    the stages that depend on them are run again too. Only expensive stages must be named."""

    @property
    def stages_to_redo(self) -> list[str]:
        """The names one by one."""
        return [name.strip() for name in self.redo.split(",") if name.strip()]


@dataclass(kw_only=True)
class AskingOptions(Opening):
    """Options of a command that asks the model of a run."""

    run: Path
    """A run folder with a finished pretraining."""
    precision: Precision = "auto"
    """Precision of matrix products: bf16, float32, or auto = bf16 if the processor supports it."""
    weights: Weights | None = None
    """Data type of the model's matrices: float32, bf16, int8, fp8; null = as the precision."""
    window: PositiveInt | None = None
    """Image codes that a step computes, the next one and drafts of those behind it; null = 4 for a
    single image, 1 for several."""
    execution: Execution = "eager"
    """How steps are run: eager, compiled, and on CUDA also graph or compiled graph."""


@dataclass(kw_only=True)
class OwnDocuments:
    """Options of a command that retrieves documents."""

    own: Path | None = None
    """File or folder of documents that this command alone adds to the memory bank, such as a .jsonl
    file with an image and a text in each line."""


@dataclass(kw_only=True)
class DataOptions:
    """Options of a command that reads a source."""

    data: Annotated[Component, SOURCES]
    """A corpus, as the section data of an experiment; without data.name, its format is recognised
    by the files under data.path."""

    @classmethod
    def completed(cls, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the name of the source, recognised by its files if it is not given.

        Raises:
            UserError: for files of no known format.
        """
        from cm3leon.data.formats import with_source_name

        if not mapping.get("data"):
            return dict(mapping)
        return {**mapping, "data": with_source_name(mapping["data"])}


def read_options(command: Command, words: Sequence[str]) -> Any:
    """Read the words as the options of a command.

    Raises:
        UserError: for an option that is missing or unknown, or has a value that it does not allow.
    """
    _check_paths(words)
    cls = command.options
    overrides: list[str] = []
    if issubclass(cls, ExperimentOptions):
        words, overrides = _split(words, cls)
    sections = component_sections(cls)
    mapping = apply_overrides({}, map(parse_override, words), sections)
    known = [key_of(field) for field in fields(cls)]
    mapping = {current_name(name, known): value for name, value in mapping.items()}

    # A component may come from a plugin that the options name.
    if sections:
        discover(_plugins(cls, mapping))
    if issubclass(cls, DataOptions):
        mapping = cls.completed(mapping)

    # A missing option is reported with what the command needs and an example.
    try:
        options = from_mapping(cls, mapping)
    except UserError as error:
        refuse([_told(command, sentence) for sentence in sentences_of(error)])
        raise
    if isinstance(options, ExperimentOptions):
        options.overrides = tuple(overrides)
    return options


def _split(words: Sequence[str], cls: type[ExperimentOptions]) -> tuple[list[str], list[str]]:
    """The words that are options of the command, and those that are settings of the experiment.

    Options without a value, such as run=, are left out.
    """
    names = {field.name for field in fields(cls)}
    own, overrides = [], []
    for word in words:
        key, _, value = word.partition("=")
        if key not in names:
            overrides.append(word)
        elif value:
            own.append(word)
    return own, overrides


def _plugins(cls: type, mapping: Mapping[str, Any]) -> list[str]:
    """The plugins that the options name."""
    if not issubclass(cls, Trust) or "plugins" not in mapping:
        return []
    return from_mapping(Trust, {"plugins": mapping["plugins"]}).plugins


def _told(command: Command, sentence: str) -> str:
    """A sentence about an option; for a missing one, what the command needs, with an example."""
    for doc in describe(command.options):
        if re.match(rf"{doc.name}(\.path)? is missing;", sentence):
            return need(command, doc)
    return sentence


def need(command: Command, doc: FieldDoc) -> str:
    """The sentence about a missing option, from the option's own and the command's first example.

    `generate` needs a run folder: run=DIR, for example run=runs/digits
    """
    what = re.split(r"[,;:(]|\.$", doc.sentence)[0].strip()
    given = f"{doc.name}={placeholder(doc)}"
    for word in reversed(command.example):
        if re.match(rf"{doc.name}[.=]", word):
            given = word
    key, _, value = given.partition("=")
    wanted = "PATH" if key.endswith(".path") else placeholder(doc)
    return (
        f"`{command.name}` needs {what[:1].lower()}{what[1:]}: {key}={wanted}, "
        f"for example {key}={shlex.quote(value)}"
    )


def placeholder(doc: FieldDoc) -> str:
    """What help writes for a value: DIR, FILE, NAME, N, TEXT, hf|cm3leon; [DIR,DIR] for a list."""
    if doc.type.startswith("one of "):
        return doc.type.removeprefix("one of ").replace(", ", "|")
    one = "TEXT"
    if found := re.search("|".join(PLACEHOLDERS), doc.sentence.lower()):
        one = PLACEHOLDERS[found[0]]
    if doc.type.startswith("a list"):
        return f"[{one},{one}]"
    return one


def _check_paths(words: Sequence[str]) -> None:
    """Check that each path is given once.

    The shell makes two words of data.path=tars/{0,1}.tar, and only the last one would count.

    Raises:
        UserError: for a path that is given with several values.
    """
    values: dict[str, dict[str, None]] = {}
    for key, _, value in (word.partition("=") for word in words):
        if key.endswith(".path"):
            values.setdefault(key, {})[value] = None
    for key, given in values.items():
        if len(given) > 1:
            raise UserError(
                f"{key} is given {len(given)} times; several paths are one word, in quotes so that "
                f"the shell leaves its braces: '{key}={{a,b}}.tar', or a list: "
                f"'{key}=[a.tar, b.tar]'"
            )
