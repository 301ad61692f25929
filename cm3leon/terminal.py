"""What reaches a terminal: texts of corpora, names of files and words of users are shown, never obeyed.

A caption may hold an escape sequence that clears the screen or sets its title, a file name a line feed that begins a
line of its own, and either a mark that reverses the order of what is read. `guarded` keeps the first and the last from
both streams, whoever prints; `printable` is for a foreign text within a line, and shows line feeds too.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

_HIDDEN = "\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
"""C1 controls, marks of direction, line separators, and bytes of file names that are no text."""
_IN_A_LINE = re.compile(f"[\x00-\x1f{_HIDDEN}]")
_IN_A_STREAM = re.compile(f"[\x00-\x08\x0b-\x1f{_HIDDEN}]")
_CURSOR_UP = re.compile(r"\n*(\x1b\[A)+")
"""What a progress bar below another one writes, and nothing with it."""


def printable(text: str) -> str:
    r"""The text on one line, what a terminal would obey written as Python does: `\x1b`, `\n`, `\u202e`."""
    return _IN_A_LINE.sub(_escaped, text)


def command_line(*words: object) -> str:
    """`python -m cm3leon.run` with these words, as a shell takes it: what messages and pages print to be typed."""
    return shlex.join(["python", "-m", "cm3leon.run", *map(str, words)])


def speaks_for_all() -> bool:
    """Whether this process is the first of those that work together, and so the one that says something."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def is_printable(text: str) -> bool:
    """Whether the text is fit for one line of a terminal or a script as it is."""
    return not _IN_A_LINE.search(text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode("ascii")


class _Guarded:
    """A stream of text that shows what a terminal would obey. A write may begin with a carriage return, as those of
    progress bars do."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if _CURSOR_UP.fullmatch(text):
            self.stream.write(text)
        else:
            start = len(text) - len(text.lstrip("\r"))
            self.stream.write(text[:start] + _IN_A_STREAM.sub(_escaped, text[start:]))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard() -> None:
    """Both streams of this process show from here on what a terminal would obey."""
    sys.stdout, sys.stderr = (
        cast(TextIO, stream if isinstance(stream, _Guarded) else _Guarded(stream))
        for stream in (sys.stdout, sys.stderr)
    )


@contextmanager
def guarded() -> Iterator[None]:
    """`guard`, to be undone at the end."""
    before = sys.stdout, sys.stderr
    guard()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
