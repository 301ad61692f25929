"""The commands of `python -m cm3leon.run`, a file each.

The module of a command has:

    its docstring    the text of `--help`. Its first line stands in the list of commands, and its
                     first example supplies the values for messages about a missing option
    Options          a config dataclass of what may follow the command as key=value
    main(options)    runs the command, and returns the exit code if it can be other than 0

A new command is such a file, and its name in the table below; docs/architecture.md shows a whole
one. Help and mistakes are answered before torch is loaded, so the modules here import heavy
packages inside their functions.
"""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cm3leon.config import choices
from cm3leon.types import UserError

GROUPS = {
    "to know a machine": ("doctor",),
    "to make a model": ("run", "import", "validate", "plan", "show", "perplexity"),
    "to ask a finished run": (
        "generate",
        "caption",
        "infill",
        "edit",
        "answer",
        "score",
        "search",
        "add",
        "export",
        "push",
        "pull",
        "serve",
        "demo",
    ),
    "to follow jobs": ("status", "logs", "cancel"),
    "that launchers give to jobs": ("part", "point", "collect"),
}
"""The names of the commands, under what they are for."""
COMMANDS = tuple(name for names in GROUPS.values() for name in names)


@dataclass(frozen=True)
class Command:
    """A command: its help, its options, and the function that runs it."""

    name: str
    text: str
    """The help text in paragraphs; the first line says what the command does."""
    options: type[Any]
    main: Callable[[Any], int | None]

    @property
    def summary(self) -> str:
        """What the command does, in one line."""
        return self.text.partition("\n")[0]

    @property
    def example(self) -> list[str]:
        """The words behind the command in its first example; empty without an example."""
        found = re.search(rf"-m cm3leon\.run {self.name} (.*)", self.text)
        if found is None:
            return []
        return shlex.split(found[1], comments=True)


def load_command(name: str) -> Command:
    """Load the command of a name.

    Raises:
        UserError: if there is no such command; it names the nearest one.
    """
    if name not in COMMANDS:
        raise UserError(f"{name} is not a known command; {choices(name, COMMANDS)}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Command(name, (module.__doc__ or "").strip(), module.Options, module.main)
