"""Keep a terminal from obeying texts of corpora, names of files, and words of users.

A caption may hold an escape sequence that clears the screen or sets its title, a file name may hold
a line feed, and both may hold marks that reverse the direction of reading. `guarded` shows escape
sequences and such marks as `\\x1b` and `\\u202e` on both output streams, whoever prints them.
`printable` is for a foreign text within a line, and shows line feeds in the same way.
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
"""C1 controls, marks of direction, line separators, and bytes of file names that are not text."""
_IN_A_LINE = re.compile(f"[\x00-\x1f{_HIDDEN}]")
_IN_A_STREAM = re.compile(f"[\x00-\x08\x0b-\x1f{_HIDDEN}]")
_CURSOR_UP = re.compile(r"\n*(\x1b\[A)+")
"""The only escape sequence of progress bars: one bar below another writes it by itself."""


def printable(text: str) -> str:
    r"""Put a text on one line, with characters that a terminal obeys as `\x1b`, `\n`, `\u202e`."""
    return _IN_A_LINE.sub(_escaped, text)


def command_line(*words: object) -> str:
    """Quote `python -m cm3leon.run` and its words for a shell, as messages and pages print it."""
    return shlex.join(["python", "-m", "cm3leon.run", *map(str, words)])


def speaks_for_all() -> bool:
    """Tell whether this process is the first of those that work together, which prints for all."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def is_printable(text: str) -> bool:
    """Tell whether a text can go on one line of a terminal or a script as it is."""
    return not _IN_A_LINE.search(text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode("ascii")


class _Guarded:
    """A stream of text that shows the characters that a terminal would obey.

    A write may begin with carriage returns, as progress bars do.
    """

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
    """Guard both output streams of this process from here on."""
    sys.stdout, sys.stderr = (
        cast(TextIO, stream if isinstance(stream, _Guarded) else _Guarded(stream))
        for stream in (sys.stdout, sys.stderr)
    )


@contextmanager
def guarded() -> Iterator[None]:
    """Guard both output streams until the end of the block."""
    before = sys.stdout, sys.stderr
    guard()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
