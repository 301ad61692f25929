"""What `--list` shows: commands with their options, the sections of an experiment, components, experiments."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cm3leon.config import FieldDoc, describe, nearest
from cm3leon.experiment import Experiment, list_experiments
from cm3leon.registry import REGISTRIES, Registry, discover
from cm3leon.study.config import Study
from cm3leon.sweep.points import SweepConfig
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
        lines = [f"  {self.title}", *(line for each in self.about for line in _wrapped(each, 4))]
        for doc in self.fields:
            if not only or f"{self.prefix}{doc.name}.".startswith(f"{only}."):
                lines += _wrapped(f"{self.prefix}{doc.name}: {doc.type}{_default(doc)}", 6)
                lines += _wrapped(doc.sentence, 10)
        return "\n".join(lines)


def listing(
    wanted: Sequence[str], plugins: Sequence[str], commands: Mapping[str, tuple[str, list[type]]]
) -> str:
    """All that can be named on a command line, or what is `wanted` of it, as text for a terminal.

    Args:
        wanted: names of commands, sections, components and experiments, dotted keys, or headings; empty for all.
        plugins: paths of plugins whose components are shown too.
        commands: by their names, what they do, and the classes of their options.

    Raises:
        UserError: for a name that there is not.
    """
    discover(plugins)
    listed = [*_commands(commands), *_sections(), *_components(), *_experiments()]
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


def _commands(commands: Mapping[str, tuple[str, list[type]]]) -> Iterator[Listed]:
    for name, (summary, classes) in commands.items():
        # A command of two directions has an option of each name once.
        docs = {doc.name: doc for cls in classes for doc in describe(cls)}
        yield Listed("COMMANDS", name, name, [summary], list(docs.values()))


def _sections() -> Iterator[Listed]:
    """The sections of an experiment, those of a sweep and those of a study, each with its keys."""
    for doc in describe(Experiment):
        if "." not in doc.name:
            below = [each for each in describe(Experiment) if each.name.startswith(f"{doc.name}.")]
            title = f"{doc.name}: {doc.type}{_default(doc)}"
            yield Listed("SECTIONS", doc.name, title, [doc.sentence], below)
    about = "Keys of an experiment that is run at several points."
    yield Listed("SECTIONS", "sweep", "sweep, sweep_...", [about], describe(SweepConfig))
    about = "Sections of a study, which has several runs and evaluations."
    yield Listed("SECTIONS", "study", "study", [about], describe(Study))


def _components() -> Iterator[Listed]:
    for registry in REGISTRIES:
        for name in registry.names():
            yield _component(registry, name)


def _component(registry: Registry[object], name: str) -> Listed:
    base = registry.preset_of(name)
    doc = (registry.get(name).__doc__ or "").strip().partition("\n")[0]
    known = registry.describe(base) if base else []
    fields = [doc for doc in registry.describe(name) if doc not in known]
    about = f"{base} with other defaults:" if base else doc
    return Listed(
        registry.plural.upper(), name, f"{name}  ({registry.origin(name)})", [about], fields
    )


def _experiments() -> Iterator[Listed]:
    for name, entry in list_experiments().items():
        title = f"{name}\n    cost    {entry.cost}\n    expect  {entry.expect}"
        yield Listed("EXPERIMENTS", name, title)


def _default(doc: FieldDoc) -> str:
    if doc.default == "required":
        return ", required"
    return f" = {doc.default}" if doc.default else ""


def _wrapped(text: str, indent: int) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
