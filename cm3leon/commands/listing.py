"""What `--list` shows: commands with their options, the sections of an experiment, components, experiments."""

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
    """One thing that can be named on a command line."""

    heading: str
    """What it is under: COMMANDS, SECTIONS, the plural of a registry, EXPERIMENTS."""
    name: str
    title: str
    """Its first line, or lines."""
    about: Sequence[str] = ()
    """Lines below it, indented as they are."""
    fields: Sequence[FieldDoc] = ()
    """What can be set of it."""
    prefix: str = field(default="", kw_only=True)
    """What goes before the names of its fields on the command line."""

    def text(self, only: str = "") -> str:
        """The thing with its fields, or with those that are called `only` or are below it."""
        lines = [f"  {self.title}", *(line for each in self.about for line in wrapped(each, 4))]
        for doc in self.fields:
            if not only or f"{self.prefix}{doc.name}.".startswith(f"{only}."):
                lines += option_lines(doc, 6, self.prefix)
        return "\n".join(lines)


def listing(words: Sequence[str]) -> str:
    """All that can be named on a command line, or what is wanted of it, as text for a terminal.

    Args:
        words: names of commands, sections, components and experiments, dotted keys, or headings, without any for all;
            and `plugins=` with paths of plugins whose components are shown too.

    Raises:
        UserError: for a name that there is not.
    """
    wanted = [word for word in words if "=" not in word]
    discover(plugins_of(words))
    listed = [*_commands(), *_sections(), *_components(), *_experiments()]
    if not wanted:
        return _under_headings([(each, "") for each in listed])
    chosen = [pair for name in wanted for pair in _found(name, listed)]
    return _under_headings(list(dict.fromkeys(chosen)))


def _found(wanted: str, listed: Sequence[Listed]) -> list[tuple[Listed, str]]:
    """The things of a name, a heading or a key, each with the key that is wanted of it, "" for all."""
    lower = wanted.lower()
    whole = [each for each in listed if lower in (each.name.lower(), *_headings(each.heading))]
    if whole:
        return [(each, "") for each in whole]
    # A key of a section or of a command's options; where its first part is a component's section, of its components.
    keyed = [
        (each, wanted)
        for each in listed
        if any(f"{each.prefix}{doc.name}.".startswith(f"{wanted}.") for doc in each.fields)
    ]
    if keyed:
        return keyed
    section, _, key = wanted.partition(".")
    below = [
        (each, key)
        for each in listed
        if key
        and section.lower() in _headings(each.heading)
        and any(f"{doc.name}.".startswith(f"{key}.") for doc in each.fields)
    ]
    if below:
        return below
    known = {each.name for each in listed} | {each.heading.lower() for each in listed}
    known |= {f"{each.prefix}{doc.name}" for each in listed for doc in each.fields}
    near = nearest(wanted, known)
    hint = f"did you mean {near}? " if near else ""
    headings = ", ".join(dict.fromkeys(each.heading.lower() for each in listed))
    raise UserError(
        f"--list {wanted}: there is no such command, section, component or experiment; {hint}"
        f"(--list alone shows all; its parts are {headings})"
    )


def _headings(heading: str) -> tuple[str, str]:
    """A heading as it is written and in the singular, also with the underscore of a section."""
    plural = heading.lower()
    return plural, plural.removesuffix("s").replace(" ", "_")


def _under_headings(chosen: Sequence[tuple[Listed, str]]) -> str:
    blocks = []
    for heading in dict.fromkeys(each.heading for each, _ in chosen):
        blocks.append(heading)
        blocks += [each.text(only) for each, only in chosen if each.heading == heading]
    return "\n\n".join(blocks) + "\n"


def plugins_of(words: Sequence[str]) -> list[str]:
    """The plugins that a command line names, as absolute paths."""
    named = [parse_override(word) for word in words if word.startswith("plugins=")]
    return with_absolute_plugins(apply_overrides({}, named), Path.cwd()).get("plugins", [])


def _commands() -> Iterator[Listed]:
    for command in map(load_command, COMMANDS):
        yield Listed(
            "COMMANDS", command.name, command.name, [command.summary], described(command.options)
        )


def _sections() -> Iterator[Listed]:
    """The sections of an experiment, those of a sweep and those of a study, each with its keys."""
    for doc in describe(Experiment):
        if "." not in doc.name:
            below = [each for each in describe(Experiment) if each.name.startswith(f"{doc.name}.")]
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
    base = registry.preset_of(name)
    known = registry.describe(base) if base else []
    fields = [doc for doc in registry.describe(name) if doc not in known]
    about = registry.summary(name) + (":" if base else "")
    return Listed(
        registry.plural.upper(), name, f"{name}  ({registry.origin(name)})", [about], fields
    )


def _experiments() -> Iterator[Listed]:
    for name, entry in list_experiments().items():
        title = f"{name}\n    cost    {entry.cost}\n    expect  {entry.expect}"
        yield Listed("EXPERIMENTS", name, title)
