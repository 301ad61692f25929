"""What `--list` shows: commands, sections of an experiment, components and experiments.

Each thing is a `Listed`, under a heading, with its fields:

    SECTIONS                           the heading
      training: a section              its title
        How the model is trained.      about it
          training.steps: int = 1000   its fields, by their dotted keys
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cm3leon.commands import COMMANDS, load_command
from cm3leon.commands.help import default_of, described, option_lines, wrapped
from cm3leon.config import FieldDoc, apply_overrides, describe, nearest, parse_override
from cm3leon.experiment import Experiment, list_experiments, with_absolute_plugins
from cm3leon.registry import REGISTRIES, Registry, discover
from cm3leon.studies.config import StudyConfig
from cm3leon.studies.points import ExperimentSweep
from cm3leon.types import UserError


@dataclass(frozen=True, eq=False)
class Listed:
    """A command, section, component or experiment, as it is listed."""

    heading: str
    """COMMANDS, SECTIONS, the plural of a registry, or EXPERIMENTS."""
    name: str
    title: str
    """Its first line, or lines."""
    about: Sequence[str] = ()
    """Sentences below the title."""
    fields: Sequence[FieldDoc] = ()
    """Its options or settings."""
    prefix: str = field(default="", kw_only=True)
    """What goes before the names of its fields on the command line."""

    def text(self, only: str = "") -> str:
        """The lines of the thing, with all fields or with the field `only` and those below it."""
        lines = [f"  {self.title}"]
        for sentence in self.about:
            lines += wrapped(sentence, 4)
        for doc in self.fields:
            if not only or self.has(doc, only):
                lines += option_lines(doc, 6, self.prefix)
        return "\n".join(lines)

    def has(self, doc: FieldDoc, key: str) -> bool:
        """Whether a field has a key, or lies below it: training.lora_rank lies below training."""
        return f"{self.prefix}{doc.name}.".startswith(f"{key}.")


def listing(words: Sequence[str]) -> str:
    """The list of everything, or of what the words name, as text for a terminal.

    Args:
        words: names of commands, sections, components and experiments, dotted keys, or headings; no
            word lists everything. `plugins=` with paths of plugins adds their components.

    Raises:
        UserError: for a name that nothing has; it says the nearest one. Also for a setting.
    """
    wanted = [word for word in words if "=" not in word]
    discover(plugins_of([word for word in words if "=" in word], "--list"))
    listed = [*_commands(), *_sections(), *_components(), *_experiments()]
    if not wanted:
        return _under_headings([(each, "") for each in listed])
    chosen = []
    for name in wanted:
        chosen += _found(name, listed)
    return _under_headings(list(dict.fromkeys(chosen)))


def _found(wanted: str, listed: Sequence[Listed]) -> list[tuple[Listed, str]]:
    """The things that a name, a heading or a key stands for, each with the key to show; "" = all.

    Raises:
        UserError: if there are none.
    """
    # The name of a thing (digits), or a heading (components of a registry: decoders, decoder).
    lower = wanted.lower()
    whole = [each for each in listed if lower in (each.name.lower(), *_headings(each.heading))]
    if whole:
        return [(each, "") for each in whole]

    # A key of a section or an option of commands (training.steps, seed).
    keyed = []
    for each in listed:
        if any(each.has(doc, wanted) for doc in each.fields):
            keyed.append((each, wanted))
    if keyed:
        return keyed

    # A setting of the components that a section chooses from (decoder.temperature).
    section, _, key = wanted.partition(".")
    below = []
    for each in listed:
        of_section = key and section.lower() in _headings(each.heading)
        if of_section and any(f"{doc.name}.".startswith(f"{key}.") for doc in each.fields):
            below.append((each, key))
    if below:
        return below

    known = set()
    for each in listed:
        known |= {each.name, each.heading.lower()}
        known.update(f"{each.prefix}{doc.name}" for doc in each.fields)
    near = nearest(wanted, known)
    hint = f"did you mean {near}? " if near else ""
    headings = ", ".join(dict.fromkeys(each.heading.lower() for each in listed))
    raise UserError(
        f"--list {wanted}: there is no such command, section, component or experiment; {hint}"
        f"(--list alone shows all; its parts are {headings})"
    )


def _headings(heading: str) -> tuple[str, str]:
    """A heading as a user may write it: IMAGE TOKENIZERS as image tokenizers, or
    image_tokenizer."""
    plural = heading.lower()
    return plural, plural.removesuffix("s").replace(" ", "_")


def _under_headings(chosen: Sequence[tuple[Listed, str]]) -> str:
    blocks = []
    for heading in dict.fromkeys(each.heading for each, _ in chosen):
        blocks.append(heading)
        blocks += [each.text(only) for each, only in chosen if each.heading == heading]
    return "\n\n".join(blocks) + "\n"


def plugins_of(words: Sequence[str], flag: str) -> list[str]:
    """The plugins that the words behind a flag name, as absolute paths.

    Raises:
        UserError: for a word that is not plugins=.
    """
    for word in words:
        if not word.startswith("plugins="):
            raise UserError(
                f"{flag} takes no {word}; its only setting is plugins=, for example "
                "plugins=[my_plugin.py]"
            )
    named = [parse_override(word) for word in words]
    return with_absolute_plugins(apply_overrides({}, named), Path.cwd()).get("plugins", [])


def _commands() -> Iterator[Listed]:
    for command in map(load_command, COMMANDS):
        yield Listed(
            "COMMANDS", command.name, command.name, [command.summary], described(command.options)
        )


def _sections() -> Iterator[Listed]:
    """The sections of an experiment, the keys of a sweep and the sections of a study."""
    docs = describe(Experiment)
    for doc in docs:
        if "." not in doc.name:
            below = [each for each in docs if each.name.startswith(f"{doc.name}.")]
            title = f"{doc.name}: {doc.type}{default_of(doc)}"
            yield Listed("SECTIONS", doc.name, title, [doc.sentence], below)
    about = "Keys of an experiment that is run at several points."
    yield Listed("SECTIONS", "sweep", "sweep, sweep_...", [about], describe(ExperimentSweep))
    about = "Sections of a study, which has several runs and evaluations."
    yield Listed("SECTIONS", "study", "study", [about], describe(StudyConfig))


def _components() -> Iterator[Listed]:
    for registry in REGISTRIES:
        for name in registry.names():
            yield _component(registry, name)


def _component(registry: Registry[Any], name: str) -> Listed:
    fields = registry.describe(name)
    about = registry.summary(name)

    # A preset is listed with the settings in which it differs from its component.
    if base := registry.preset_of(name):
        known = registry.describe(base)
        fields = [doc for doc in fields if doc not in known]
        about += ":"
    title = f"{name}  ({registry.origin(name)})"
    return Listed(registry.plural.upper(), name, title, [about], fields)


def _experiments() -> Iterator[Listed]:
    for name, entry in list_experiments().items():
        title = f"{name}\n    cost    {entry.cost}\n    expect  {entry.expect}"
        yield Listed("EXPERIMENTS", name, title)
