"""What makes a result again: a command, and lines of Python."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGE, MASK = "image.png", "mask.png"
"""Names of the files that a page hands out, as the model saw them."""


@dataclass(frozen=True)
class Again:
    """What makes a result again.

    Args:
        command: that is asked of the command line.
        method: that is asked of `CM3Leon`.
        options: that both have, by their names; None and what is empty is left out.
        positional: the first arguments of the method, which are options of the command by their names.
    """

    run: Path
    loading: Mapping[str, Any]
    """What the run was loaded with, by the names that commands and `CM3Leon.load` share."""
    command: str
    method: str
    positional: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    own: str = ""
    """File with documents that stand in the memory bank too; empty = none."""

    def shell(self) -> str:
        """The command, to be run where the page was started and its files lie."""
        own = {"own": self.own}
        given = {"run": self.run, **self.loading, **self.positional, **self.options, **own}
        words = [f"{name}={_word(value)}" for name, value in given.items() if _is_given(value)]
        return shlex.join(["python", "-m", "cm3leon.run", self.command, *words])

    def python(self) -> str:
        """Lines of Python, whose last one names the result."""
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
    """Python that stands for itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _arguments(positional: Sequence[Any], options: Mapping[str, Any]) -> str:
    named = [f"{name}={value!r}" for name, value in options.items() if _is_given(value)]
    return ", ".join([*map(repr, positional), *named])


def _is_given(value: Any) -> bool:
    return value is not None and value != () and value != ""


def _word(value: Any) -> str:
    """A value as the command line reads it: a text as it is."""
    return str(value) if isinstance(value, (str, Path)) else json.dumps(value)
