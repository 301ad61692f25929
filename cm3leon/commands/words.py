"""The words behind a command, read as its options; and the options that several commands have in common."""

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
"""What stands for a value in `key=VALUE`, by the first of these words in the sentence about the option."""


@dataclass(kw_only=True)
class ExperimentOptions:
    """Options of a command that takes an experiment, and with it every setting of one."""

    experiment: str
    """An experiment, by a name that --list shows or as the path of a .yaml file."""

    overrides = tuple[str, ...]()
    """The words that are settings of the experiment; no option."""


@dataclass(kw_only=True)
class ExperimentRunOptions(ExperimentOptions):
    """Options of a command that takes an experiment and the folder of its run."""

    run: Path | None = None
    """Run folder; null = runs/NAME. Run again with the same folder to go on."""

    @property
    def folder(self) -> Path:
        """The run folder, also where none is given.

        Raises:
            UserError: for one that can be none, and an experiment that there is not.
        """
        from cm3leon.experiment import experiment_name

        folder = self.run or path_of(f"runs/{experiment_name(self.experiment)}", "run")
        check_folder(folder, "run")
        if folder.resolve() == Path(folder.anchor or "/"):
            raise UserError(
                f"run is {folder}, the root of the file system; choose a folder of its own"
            )
        return folder

    @property
    def is_study(self) -> bool:
        """Whether the experiment is a study of several runs."""
        from cm3leon.experiment import is_study

        return is_study(self.experiment)


@dataclass(kw_only=True)
class RunOptions:
    """Options of a command about a run that was started."""

    run: Path
    """A run folder."""


@dataclass(kw_only=True)
class RedoOptions:
    """Options of a command that makes stages."""

    redo: str = ""
    """Names of finished stages that take long, with commas between them, that are made anew, with those that depend on
    them, where settings differ."""

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
    """Of matrix products: bf16, float32, or auto = bf16 where the processor computes in it."""
    weights: Weights | None = None
    """What the decoder's matrices are kept in: float32, bf16, int8, fp8; null = as the precision."""
    window: PositiveInt | None = None
    """Image codes that a step computes, the next one and drafts behind it; null = 4 for a single image, 1 for more."""
    execution: Execution = "eager"
    """How steps are run: eager, compiled, and on CUDA graph or compiled graph."""


@dataclass(kw_only=True)
class OwnDocuments:
    """Options of a command that retrieves documents."""

    own: Path | None = None
    """File or folder of documents that stand behind those of the memory bank for this command alone, such as a .jsonl
    file with an image and a text a line."""


@dataclass(kw_only=True)
class DataOptions:
    """Options of a command that reads a source."""

    data: Annotated[Component, SOURCES]
    """A corpus, as the section data of an experiment; without data.name it is told by the files under data.path."""

    @classmethod
    def completed(cls, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the name of the source, where its files tell it.

        Raises:
            UserError: for files that do not tell it.
        """
        from cm3leon.data.formats import with_source_name

        if not mapping.get("data"):
            return dict(mapping)
        return {**mapping, "data": with_source_name(mapping["data"])}


def read_options(command: Command, words: Sequence[str]) -> Any:
    """The words as the options of a command.

    Raises:
        UserError: for an option that is missing, unknown or not as it should be.
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

    # A component may be that of a plugin named with it.
    if sections:
        discover(_plugins(cls, mapping))
    if issubclass(cls, DataOptions):
        mapping = cls.completed(mapping)
    try:
        options = from_mapping(cls, mapping)
    except UserError as error:
        refuse([_told(command, sentence) for sentence in sentences_of(error)])
        raise
    if isinstance(options, ExperimentOptions):
        options.overrides = tuple(overrides)
    return options


def _split(words: Sequence[str], cls: type[ExperimentOptions]) -> tuple[list[str], list[str]]:
    """The words that are options of the command, those without a value left out, and those of the experiment."""
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
    """A sentence about an option; of one that is missing, what the command needs, with an example."""
    for doc in describe(command.options):
        if re.match(rf"{doc.name}(\.path)? is missing;", sentence):
            return need(command, doc)
    return sentence


def need(command: Command, doc: FieldDoc) -> str:
    """What a command needs: `generate` needs a run folder: run=DIR, for example run=runs/digits."""
    what = re.split(r"[,;:(]|\.$", doc.sentence)[0].strip()
    given = next(
        (word for word in command.example if re.match(rf"{doc.name}[.=]", word)),
        f"{doc.name}={placeholder(doc)}",
    )
    key, _, value = given.partition("=")
    wanted = "PATH" if key.endswith(".path") else placeholder(doc)
    return (
        f"`{command.name}` needs {what[:1].lower()}{what[1:]}: {key}={wanted}, "
        f"for example {key}={shlex.quote(value)}"
    )


def placeholder(doc: FieldDoc) -> str:
    """What stands for the value of an option: DIR, FILE, NAME, N, TEXT, hf|cm3leon; [DIR,DIR] for a list."""
    if doc.type.startswith("one of "):
        return doc.type.removeprefix("one of ").replace(", ", "|")
    found = re.search("|".join(PLACEHOLDERS), doc.sentence.lower())
    one = PLACEHOLDERS[found[0]] if found else "TEXT"
    return f"[{one},{one}]" if doc.type.startswith("a list") else one


def _check_paths(words: Sequence[str]) -> None:
    """Check that a path is given once: of data.path=tars/{0,1}.tar the shell makes two words, the last of which counts.

    Raises:
        UserError: for a path that is given with different values.
    """
    values: dict[str, dict[str, None]] = {}
    for key, _, value in (word.partition("=") for word in words):
        if key.endswith(".path"):
            values.setdefault(key, {})[value] = None
    for key, given in values.items():
        if len(given) > 1:
            raise UserError(
                f"{key} is given {len(given)} times; several paths are one word, in quotes so that "
                f"the shell leaves its braces: '{key}={{a,b}}.tar', or a list: '{key}=[a.tar, b.tar]'"
            )
