"""What `--help` prints: of the command line, and of one command."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator

from cm3leon.commands import GROUPS, Command, load_command
from cm3leon.commands.words import ExperimentOptions, placeholder
from cm3leon.config import FieldDoc, describe

USAGE = """\
usage: python -m cm3leon.run [command] [key=value ...]
       python -m cm3leon.run [command] --help
       python -m cm3leon.run experiment=NAME [key=value ...] --show
       python -m cm3leon.run --list [NAME ...] | --schema | --help | --version

{commands}

settings of an experiment:
  section.key=value  replaces one value: training.steps=100, aims.0.at_least=0.9
  section=name       picks another component: decoder=cd_k

values:
  A text or a path is taken as it is typed: text=7, prompt='"OPEN" sign', data.path=2024; only
  null means no value, where an option can be without one. Anything else is YAML: 500, 1e-4, true,
  null, [1, 2], {{name: top_p, top_p: 0.9}}. In brackets the same holds for each value, and quotes
  there are YAML's: texts=[7, 'two words'].

flags:
  --show             print the experiment with every default filled in, and stop
  --list [NAME ...]  list commands with their options, the sections of an experiment, components
                     with their settings, and experiments; or only those of the given names:
                     --list training, --list decoder, --list generate
  --schema           print the JSON Schema by which editors check experiments and studies
  --version          print the version
  --help             print this; behind a command, its options and examples

examples:
  python -m cm3leon.run experiment=digits
  python -m cm3leon.run experiment=digits run=runs/short training.steps=200
  python -m cm3leon.run generate run=runs/digits prompt="a handwritten seven" n=8 retrieve=2
  python -m cm3leon.run generate --help
"""


def usage() -> str:
    """The help of the command line: every command in a line, and what all have in common."""
    lines = []
    for purpose, names in GROUPS.items():
        lines.append(f"commands {purpose}:")
        lines += [f"  {name:<17}  {load_command(name).summary}" for name in names]
        lines.append("")
    return USAGE.format(commands="\n".join(lines).rstrip())


def help_of(command: Command) -> str:
    """The help of one command: what it does, with examples, and its options with their defaults."""
    docs = described(command.options)
    required = [f"{doc.name}={placeholder(doc)}" for doc in docs if doc.default == "required"]
    lines = [
        f"usage: python -m cm3leon.run {' '.join([command.name, *required])} [key=value ...]",
        "",
        command.text,
        "",
        "options:",
    ]
    for doc in docs:
        lines += option_lines(doc, 2)

    # Commands with an experiment take its settings too, which are too many to list here.
    if issubclass(command.options, ExperimentOptions):
        lines += ["  section.key=value, section=name"]
        lines += wrapped(
            "Settings of the experiment, which --list shows: training.steps=100, decoder=cd_k.", 6
        )
    return "\n".join(lines) + "\n"


def described(options: type) -> list[FieldDoc]:
    """The options of a command: the required ones, its own, then those shared with other
    commands."""

    def rank(doc: FieldDoc) -> tuple[bool, int]:
        names = {doc.name, f"{doc.name}_"}
        classes = [cls for cls in options.__mro__ if names & inspect.get_annotations(cls).keys()]
        return doc.default != "required", options.__mro__.index(classes[0])

    return sorted(describe(options), key=rank)


def option_lines(doc: FieldDoc, indent: int, prefix: str = "") -> Iterator[str]:
    """An option or setting as lines for a terminal: its type and default, its sentence below."""
    yield from wrapped(f"{prefix}{doc.name}: {doc.type}{default_of(doc)}", indent)
    yield from wrapped(doc.sentence, indent + 4)


def default_of(doc: FieldDoc) -> str:
    """What stands behind an option's type: `, required`, ` = 500`, or nothing."""
    if doc.default == "required":
        return ", required"
    if not doc.default:
        return ""
    return f" = {doc.default}"


def wrapped(text: str, indent: int) -> list[str]:
    """A text as indented lines that fit the terminal."""
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
