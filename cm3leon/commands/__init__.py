"""The commands of `python -m cm3leon.run`, a file each.

The module of a command has:

    its docstring    what `--help` says of it; the first line stands in the list of commands, and the first
                     example gives the values that a message about a missing option names
    Options          a config dataclass of what may follow the command as key=value
    main(options)    does it, and returns the exit code where it may be another one than 0

A new command is such a file, and its name in the table below. Help and mistakes are answered before torch is loaded:
the modules here import what is heavy inside their functions.
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
"""The names of the commands, and what they are for."""
COMMANDS = tuple(name for names in GROUPS.values() for name in names)


@dataclass(frozen=True)
class Command:
    """A word of the command line: what it does, what it takes, and the function that gets it."""

    name: str
    text: str
    """What there is to say of it, by paragraphs; the first line says what it does."""
    options: type[Any]
    main: Callable[[Any], int | None]

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        return self.text.partition("\n")[0]

    @property
    def example(self) -> list[str]:
        """The words behind the command in the first of its examples."""
        found = re.search(rf"-m cm3leon\.run {self.name} (.*)", self.text)
        return shlex.split(found[1], comments=True) if found else []


def load_command(name: str) -> Command:
    """The command of that name.

    Raises:
        UserError: for a name that there is not.
    """
    if name not in COMMANDS:
        raise UserError(f"{name} is not a known command; {choices(name, COMMANDS)}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Command(name, (module.__doc__ or "").strip(), module.Options, module.main)
