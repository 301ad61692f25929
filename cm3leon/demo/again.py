"""The command, and the lines of Python, that make a result of the page again.

python -m cm3leon.run generate run=runs/digits 'prompt=a seven' n=4 seed=17

from cm3leon import CM3Leon

model = CM3Leon.load('runs/digits')
result = model.generate('a seven', n=4, seed=17)
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGE, MASK = "image.png", "mask.png"
"""Names of the files that the page offers: the images as the model saw them."""


@dataclass(frozen=True)
class Recipe:
    """What is needed to make a result again.

    Args:
        command: name of the command.
        method: name of the method of `CM3Leon`.
        positional: the first arguments of the method, by the names of the command's options.
        options: arguments that both have, by their names; None and empty values are left out.
    """

    run: Path
    loading: Mapping[str, Any]
    """The options that the run was loaded with, which commands and `CM3Leon.load` share."""
    command: str
    method: str
    positional: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    own: str = ""
    """File with documents that are added to the memory bank; empty = none."""

    def shell(self) -> str:
        """The command, for the folder where the page was started, with the offered files in it."""
        own = {"own": self.own}
        given = {"run": self.run, **self.loading, **self.positional, **self.options, **own}
        words = [f"{name}={_word(value)}" for name, value in given.items() if _is_given(value)]
        return shlex.join(["python", "-m", "cm3leon.run", self.command, *words])

    def python(self) -> str:
        """Lines of Python, of which the last one makes the result."""
        loading = _arguments([str(self.run)], self.loading)
        options = dict(self.options)
        lines = ["from cm3leon import CM3Leon", ""]
        if "mask" in options:
            lines[:0] = ["import numpy as np", "from PIL import Image"]
            options["mask"] = _Code(f'np.asarray(Image.open("{MASK}").getchannel("A")) == 0')
        asked = _arguments(list(self.positional.values()), options)
        with_own = f".with_documents({self.own!r})" if self.own else ""
        lines.append(f"model = CM3Leon.load({loading}){with_own}")
        lines.append(f"result = model.{self.method}({asked})")
        return "\n".join(lines)


class _Code(str):
    """Python code, which is written without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _arguments(positional: Sequence[Any], options: Mapping[str, Any]) -> str:
    named = [f"{name}={value!r}" for name, value in options.items() if _is_given(value)]
    return ", ".join([*map(repr, positional), *named])


def _is_given(value: Any) -> bool:
    return value is not None and value != () and value != ""


def _word(value: Any) -> str:
    """A value as the command line reads it: a text as it is, anything else as JSON."""
    return str(value) if isinstance(value, (str, Path)) else json.dumps(value)
